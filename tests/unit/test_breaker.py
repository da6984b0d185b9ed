"""When refused rows pause the stream, and when they only become dead letters."""

from __future__ import annotations

from mqtt_bridge.breaker import LET_THROUGH_EVERY_S, ROWS, SECONDS, Breaker


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def tripped(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    assert not breaker.refused("23514", rows=ROWS, topics=[b"a", b"b", b"c"])
    clock.now_s = SECONDS - 1
    assert not breaker.refused("23514", rows=1, topics=[b"a"])
    clock.now_s = SECONDS
    assert breaker.refused("23514", rows=1, topics=[b"a"])
    return breaker


def test_everything_refused_alike_for_long_enough_pauses_the_stream() -> None:
    clock = Clock()
    breaker = tripped(clock)

    clock.now_s += 1

    assert breaker.refused("23514", rows=1, topics=[b"a"])


def test_now_and_then_one_batch_is_let_through_for_what_comes_behind_it_may_be_good() -> None:
    clock = Clock()
    breaker = tripped(clock)

    clock.now_s += LET_THROUGH_EVERY_S

    assert not breaker.refused("23514", rows=1, topics=[b"a"])
    assert breaker.refused("23514", rows=1, topics=[b"a"])


def test_one_topic_never_pauses_the_stream_however_much_it_sends() -> None:
    clock = Clock()
    breaker = Breaker(clock)

    for _ in range(1000):
        clock.now_s += 1
        assert not breaker.refused("22001", rows=ROWS, topics=[b"a", b"b"])


def test_a_few_rows_do_not_pause_the_stream() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.refused("22001", rows=3, topics=[b"a", b"b", b"c"])

    clock.now_s = 10 * SECONDS

    assert not breaker.refused("22001", rows=3, topics=[b"a"])


def test_one_stored_row_starts_the_count_anew() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.refused("22001", rows=ROWS, topics=[b"a", b"b", b"c"])
    clock.now_s = SECONDS

    breaker.stored()

    assert not breaker.refused("22001", rows=ROWS, topics=[b"a", b"b", b"c"])


def test_another_reason_starts_the_count_anew() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.refused("22001", rows=ROWS, topics=[b"a", b"b", b"c"])
    clock.now_s = SECONDS

    assert not breaker.refused("23502", rows=ROWS, topics=[b"a", b"b", b"c"])
