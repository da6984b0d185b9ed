"""When a share of dead letters is told, and when it counts as high."""

from __future__ import annotations

import pytest

from mqtt_bridge.dead_letter_share import LEAST, SPAN_S, DeadLetterShare, Share


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_span_ends_after_a_minute(clock: Clock) -> None:
    share = DeadLetterShare(clock)

    assert share.count(5_000, dead_letters=500) is None
    clock.now_s += SPAN_S - 1
    assert share.count(5_000, dead_letters=0) is None
    clock.now_s += 1
    assert share.count(1, dead_letters=1) == Share(10_001, 501)


def test_the_next_span_begins_at_zero(clock: Clock) -> None:
    share = DeadLetterShare(clock)
    clock.now_s += SPAN_S
    share.count(1_000, dead_letters=1_000)

    assert share.count(1_000, dead_letters=0) is None
    clock.now_s += SPAN_S

    assert share.count(500, dead_letters=3) == Share(1_500, 3)


def test_a_slow_site_is_judged_by_enough_messages(clock: Clock) -> None:
    share = DeadLetterShare(clock)

    spans = []
    for _ in range(2 * LEAST):
        clock.now_s += 20.0
        spans.append(share.count(1, dead_letters=1))

    assert [span for span in spans if span] == [Share(LEAST, LEAST)] * 2


@pytest.mark.parametrize(
    ("messages", "dead_letters", "high", "text"),
    [(1_000, 99, False, "10%"), (1_000, 100, True, "10%"), (100, 100, True, "100%"), (100, 0, False, "0%")],
)
def test_a_tenth_is_high(messages: int, dead_letters: int, high: bool, text: str) -> None:
    share = Share(messages, dead_letters)

    assert share.high is high
    assert str(share) == text
