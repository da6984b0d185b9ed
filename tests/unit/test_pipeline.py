"""From receive to acknowledgement, with a store and a translator that do what the test says."""

from __future__ import annotations

import itertools
import sys
import threading
from collections import Counter

import pytest
from structlog.testing import capture_logs

from mqtt_bridge import batches as batches_module
from mqtt_bridge import pipeline as pipeline_module
from mqtt_bridge.acks import AckTracker
from mqtt_bridge.batches import Batches
from mqtt_bridge.dead_letter_share import DeadLetterShare
from mqtt_bridge.errors import Fenced, MessageError
from mqtt_bridge.ledger import REACH, Claim, Ledger
from mqtt_bridge.model import READINGS_COLUMNS, DeadLetter, Run, Table, Translation
from mqtt_bridge.pipeline import MESSAGE_OVERHEAD, Limits, Pipeline
from mqtt_bridge.sink import Stopped
from mqtt_bridge.transactions import Stored
from tests.waiting import wait_until

READINGS = Table("readings", READINGS_COLUMNS)
AT_ONCE = 0.0
NEVER = 3600.0
"""A batch wait that no test lives to see the end of."""


class Translator:
    """A row for every payload, but for those that say otherwise."""

    def translate(self, message, tally):
        payload = message.payload
        if payload == b"ignored":
            return Translation("default", READINGS, [], "no_values")
        if payload == b"broken":
            raise MessageError("no JSON", stage="decode", route="default")
        if payload == b"bug":
            raise ZeroDivisionError("unforeseen")
        if payload == b"nan":
            tally.nan_skipped += 1
        return Translation("default", READINGS, [(message.received_us, "d", "m", 1.0, None)])


class Store:
    """Keeps what it is given. While the gate is shut, batches wait in `entered`."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.lock = threading.Lock()
        self.entered = []
        self.batches = []
        self.error = None
        self.refuse = frozenset()
        self.spools = False

    def store(self, batch):
        with self.lock:
            self.entered.append(batch)
        self.gate.wait()
        if self.error is not None:
            raise self.error
        refused = tuple(
            DeadLetter(message, "default", "store", "refused", "23514")
            for message, _ in batch.translated
            if message.payload in self.refuse
        )
        with self.lock:
            self.batches.append(batch)
        if self.spools:
            return None
        return Stored({"readings": len(batch.translated) - len(refused)}, refused)

    @property
    def payloads(self):
        """What was stored, in the order of the batches."""
        return [message.payload for batch in self.batches for message, _ in batch.translated]


class Hall:
    """A pipeline with its surroundings."""

    def __init__(self, *, start=True, clock_us=None, wants_replay=lambda topic: True, redelivery="marked", **limits):
        self.store = Store()
        self.ledger = Ledger(redelivery=redelivery)
        self.ledger.load(Claim(1, 1, ()))
        self.fatal = []
        self.sessions_lost = 0
        limits = {"workers": 1, "batch_wait_s": AT_ONCE} | limits
        self.pipeline = Pipeline(
            Batches(Translator()),
            self.store,
            ledger=self.ledger,
            acks=AckTracker(),
            limits=Limits(**limits),
            on_fatal=self.fatal.append,
            on_session_lost=self.lose_session,
            wants_replay=wants_replay,
            **({"clock_us": clock_us} if clock_us else {}),
        )
        self.packet_ids = itertools.count(1)
        self.acknowledged = self.connect()
        if start:
            self.pipeline.start()

    def lose_session(self):
        self.sessions_lost += 1

    def connect(self, *, session_present=True):
        """The packet ids that will be acknowledged on a new connection."""
        acknowledged = []
        self.pipeline.connected(session_present=session_present, send_acks=acknowledged.extend)
        return acknowledged

    def receive(self, *payloads, qos=1, retain=False):
        for payload in payloads:
            packet_id = next(self.packet_ids) if qos else 0
            self.pipeline.receive(Run.of_one(b"t", payload, qos, retain=retain, packet_id=packet_id))

    def redeliver(self, packet_id, payload):
        self.pipeline.receive(Run.of_one(b"t", payload, 1, packet_id=packet_id, dup=True))

    def balance(self):
        balance = self.pipeline.balance()
        assert balance.balanced
        return balance

    def settle(self):
        wait_until(lambda: not self.balance().in_flight, what="the pipeline to be empty")

    def close(self):
        self.store.gate.set()
        assert self.pipeline.stop()


@pytest.fixture
def hall_of():
    """Makes a Hall, as often as called."""
    halls = []

    def make(**kwargs):
        halls.append(Hall(**kwargs))
        return halls[-1]

    yield make
    for hall in halls:
        hall.close()


def numbered(numbers):
    return [str(number).encode() for number in numbers]


# -- batches


def test_a_message_is_stored_and_then_acknowledged(hall_of):
    hall = hall_of()
    hall.store.gate.clear()

    hall.receive(b"a")
    wait_until(lambda: hall.store.entered, what="the batch to be under way")
    assert hall.acknowledged == []
    hall.store.gate.set()

    hall.settle()
    assert hall.store.payloads == [b"a"]
    assert hall.acknowledged == [1]
    assert hall.balance().outcomes["stored"] == 1
    assert hall.balance().rows == {"readings": 1}


def test_a_batch_goes_when_it_is_full(hall_of):
    hall = hall_of(batch_size=3, batch_wait_s=NEVER)

    hall.receive(*numbered(range(7)))

    wait_until(lambda: len(hall.store.batches) == 2, what="two full batches")
    assert [len(batch.translated) for batch in hall.store.batches] == [3, 3]
    assert hall.store.payloads == numbered(range(6))
    assert hall.balance().queue_depth == 1


def test_a_batch_goes_when_it_has_waited(hall_of):
    hall = hall_of(batch_size=1000, batch_wait_s=0.01)

    hall.receive(*numbered(range(7)))

    hall.settle()
    assert hall.store.payloads == numbered(range(7))


def test_a_batch_goes_although_the_clock_was_set_back(hall_of):
    now_us = [2_000_000_000_000_000]
    hall = hall_of(batch_size=1000, batch_wait_s=0.01, clock_us=lambda: now_us[0], start=False)
    hall.receive(b"a")
    now_us[0] -= 3_600_000_000

    hall.pipeline.start()

    wait_until(lambda: hall.store.batches, what="the batch", timeout_s=3)


def test_a_batch_of_large_messages_ends_early(hall_of, monkeypatch):
    monkeypatch.setattr(pipeline_module, "BATCH_BYTES", 10)
    hall = hall_of(start=False)

    hall.receive(b"123456", b"123456", b"123456", b"123456789012345", b"1")
    hall.pipeline.start()

    hall.settle()
    assert [len(batch.translated) for batch in hall.store.batches] == [2, 2, 1]


def test_messages_of_many_rows_are_stored_in_several_transactions(hall_of, monkeypatch):
    monkeypatch.setattr(batches_module, "TRANSACTION_ROWS", 3)
    hall = hall_of(start=False)
    hall.receive(b"a", b"b", b"ignored", b"c", b"d", b"e", b"f", b"broken")

    hall.pipeline.start()

    hall.settle()
    assert [len(batch.translated) for batch in hall.store.batches] == [3, 3, 0]
    assert hall.store.payloads == [b"a", b"b", b"c", b"d", b"e", b"f"]
    assert len({batch.entry.key for batch in hall.store.batches}) == 3
    assert hall.acknowledged == list(range(1, 9))


def test_the_account_balances_between_the_parts_of_a_batch(hall_of, monkeypatch):
    monkeypatch.setattr(batches_module, "TRANSACTION_ROWS", 1)
    hall = hall_of(start=False)
    hall.pipeline._store = gated = Gated(hall.store, b"b")
    hall.receive(b"a", b"b", b"c")

    hall.pipeline.start()
    wait_until(lambda: hall.balance().outcomes["stored"] == 1, what="the first part")
    assert hall.balance().in_flight == 2
    assert hall.acknowledged == [1]
    gated.gate.set()

    hall.settle()


def test_a_stream_of_ignored_messages_leaves_a_ledger_row_now_and_then(hall_of):
    hall = hall_of()

    for packet_id in range(1, 40_000, 1_000):
        hall.pipeline.receive(Run.of_one(b"t", b"ignored", 1, packet_id=packet_id))
        hall.settle()

    assert 2 <= len(hall.store.batches) <= 4
    assert all(not batch.translated and batch.entry.fingerprints for batch in hall.store.batches)
    assert len(hall.acknowledged) == 40


def test_messages_are_stored_in_their_order_by_one_worker(hall_of):
    hall = hall_of(batch_size=7)

    hall.receive(*numbered(range(500)))

    hall.settle()
    assert hall.store.payloads == numbered(range(500))
    assert hall.acknowledged == list(range(1, 501))


def test_acknowledgements_keep_the_receive_order_although_batches_overtake_each_other(hall_of):
    hall = hall_of(workers=2, batch_size=2)
    slow = Gated(hall.store, b"0")
    hall.pipeline._store = slow

    hall.receive(*numbered(range(6)))
    wait_until(lambda: len(hall.store.batches) == 2, what="the other worker to store two batches")
    assert hall.acknowledged == []
    assert hall.balance().in_flight == 2
    slow.gate.set()

    hall.settle()
    assert hall.acknowledged == [1, 2, 3, 4, 5, 6]


class Gated:
    """Holds the batch that contains a payload until the gate is opened."""

    def __init__(self, store, payload):
        self.store_, self.payload, self.gate = store, payload, threading.Event()

    def store(self, batch):
        if any(message.payload == self.payload for message, _ in batch.translated):
            assert self.gate.wait(10)
        return self.store_.store(batch)


def test_a_batch_has_one_ledger_row_with_all_its_deliveries(hall_of):
    hall = hall_of(start=False)
    hall.receive(b"a", b"ignored", b"broken")
    hall.receive(b"b", qos=0)

    hall.pipeline.start()

    hall.settle()
    (batch,) = hall.store.batches
    assert batch.entry.first_position == 1
    assert len(batch.entry.fingerprints) == 3 * 8
    assert [letter.message.payload for letter in batch.dead_letters] == [b"broken"]
    assert hall.acknowledged == [1, 2, 3]


# -- what becomes of a message


def test_what_is_ignored_needs_no_transaction_only_its_turn(hall_of):
    hall = hall_of()

    hall.receive(b"ignored", b"ignored")

    hall.settle()
    assert hall.store.batches == []
    assert hall.acknowledged == [1, 2]
    assert hall.balance().ignored == {"no_values": 2}
    assert hall.balance().outcomes["ignored"] == 2


def test_what_is_ignored_waits_for_what_came_before_it(hall_of):
    hall = hall_of(workers=2, batch_size=1)
    hall.store.gate.clear()

    hall.receive(b"a", b"ignored")
    wait_until(lambda: hall.balance().outcomes["ignored"], what="the second to be done with")
    assert hall.acknowledged == []
    hall.store.gate.set()

    hall.settle()
    assert hall.acknowledged == [1, 2]


def test_what_cannot_be_decoded_becomes_a_dead_letter(hall_of):
    hall = hall_of(start=False)
    hall.receive(b"a", b"broken", b"b")

    hall.pipeline.start()

    hall.settle()
    (batch,) = hall.store.batches
    assert [(letter.route, letter.stage, letter.error) for letter in batch.dead_letters] == [
        ("default", "decode", "no JSON")
    ]
    assert hall.store.payloads == [b"a", b"b"]
    assert hall.balance().dead_letters == {"decode": 1}
    assert hall.acknowledged == [1, 2, 3]


def test_a_bug_in_a_decoder_costs_one_message(hall_of):
    hall = hall_of(start=False)
    hall.receive(b"a", b"bug", b"b")

    with capture_logs() as logs:
        hall.pipeline.start()
        hall.settle()

    (batch,) = hall.store.batches
    assert [letter.error for letter in batch.dead_letters] == ["unforeseen ZeroDivisionError: unforeseen"]
    assert hall.store.payloads == [b"a", b"b"]
    assert [log["topic"] for log in logs if log["log_level"] == "error"] == [b"t"]
    assert hall.pipeline.alive


def test_what_the_server_refuses_is_counted_as_a_dead_letter_and_acknowledged(hall_of):
    hall = hall_of(start=False)
    hall.store.refuse = {b"b"}
    hall.receive(b"a", b"b", b"c")

    hall.pipeline.start()

    hall.settle()
    assert hall.balance().outcomes["stored"] == 2
    assert hall.balance().dead_letters == {"store": 1}
    assert hall.balance().rows == {"readings": 2}
    assert hall.acknowledged == [1, 2, 3]


def test_repairs_are_counted(hall_of):
    hall = hall_of()

    hall.receive(b"nan", b"nan", b"a")

    hall.settle()
    assert hall.balance().repairs["nan_skipped"] == 2


@pytest.mark.parametrize("qos", [0, 1])
def test_replays_are_ignored_where_they_are_not_wanted(hall_of, qos):
    hall = hall_of(wants_replay=lambda topic: topic != b"t")

    hall.receive(b"a", qos=qos, retain=True)
    hall.receive(b"b", qos=qos)

    hall.settle()
    assert hall.store.payloads == [b"b"]
    assert hall.balance().ignored == {"retained": 1}
    assert hall.acknowledged == ([1, 2] if qos else [])


def test_replays_are_stored_where_they_are_wanted(hall_of):
    hall = hall_of(wants_replay=lambda topic: topic == b"t")

    hall.receive(b"a", retain=True)

    hall.settle()
    assert hall.store.payloads == [b"a"]
    assert hall.balance().ignored == {}


def test_only_replays_are_asked_about(hall_of):
    hall = hall_of(wants_replay=lambda topic: pytest.fail("nobody replayed it"))

    hall.receive(b"a")

    hall.settle()
    assert hall.store.payloads == [b"a"]


def test_whether_a_replay_is_wanted_is_decided_when_it_comes(hall_of):
    answers = [False, True]
    hall = hall_of(start=False, wants_replay=lambda topic: answers.pop(0))
    hall.receive(b"unwanted", b"wanted", retain=True)

    assert answers == []
    hall.pipeline.start()

    hall.settle()
    assert hall.store.payloads == [b"wanted"]


def test_an_ignored_replay_that_is_delivered_again_is_ignored_again(hall_of):
    hall = hall_of(wants_replay=lambda topic: False)
    hall.receive(b"a", retain=True)
    hall.settle()

    again = hall.connect()
    hall.pipeline.receive(Run.of_one(b"t", b"a", 1, retain=True, dup=True, packet_id=1))

    hall.settle()
    assert again == [1]
    assert hall.store.batches == []
    assert hall.balance().ignored == {"retained": 2}


def test_a_replay_that_was_stored_is_a_duplicate_though_it_is_not_wanted_any_more(hall_of):
    answers = [True, False]
    hall = hall_of(wants_replay=lambda topic: answers.pop(0))
    hall.receive(b"a", retain=True)
    hall.settle()

    again = hall.connect()
    hall.pipeline.receive(Run.of_one(b"t", b"a", 1, retain=True, dup=True, packet_id=1))

    assert again == [1]
    assert hall.balance().outcomes["duplicate"] == 1


def test_a_long_stream_of_ignored_replays_writes_a_ledger_row_now_and_then(hall_of):
    # Else a later process would measure new packet ids against a row that is more than half a lap old.
    hall = hall_of(wants_replay=lambda topic: False, batch_size=100)

    for _ in range(REACH // 500):
        hall.receive(*[b"a"] * 500, retain=True)
        hall.settle()

    rows = [batch.entry for batch in hall.store.batches]
    assert 1 < len(rows) < 10
    assert all(row.fingerprints for row in rows)
    assert hall.store.payloads == []


def test_a_replay_is_held_until_it_is_durable(hall_of):
    hall = hall_of(start=False)
    hall.store.gate.clear()
    hall.receive(b"live")
    assert not hall.pipeline.holds_replays

    hall.receive(b"a", retain=True)
    assert hall.pipeline.holds_replays  # in the queue
    hall.pipeline.start()
    wait_until(lambda: hall.store.entered, what="the batch to be under way")
    assert hall.pipeline.holds_replays  # in a worker's hands
    hall.store.gate.set()

    hall.settle()
    assert not hall.pipeline.holds_replays


# -- bounds


def test_qos_0_is_dropped_newest_first_when_there_is_no_room_and_counted(hall_of):
    hall = hall_of(queue_size=3, start=False)

    hall.receive(*numbered(range(5)), qos=0)
    assert hall.balance().outcomes["dropped"] == 2
    hall.pipeline.start()

    hall.settle()
    assert hall.store.payloads == numbered(range(3))
    assert hall.balance().received == 5
    assert hall.acknowledged == []


def test_qos_0_is_dropped_when_the_bytes_are_used_up(hall_of):
    hall = hall_of(queue_bytes=2 * (MESSAGE_OVERHEAD + 11), start=False)

    hall.receive(b"0123456789", b"0123456789", b"0123456789", qos=0)

    assert hall.balance().outcomes["dropped"] == 1
    assert hall.balance().queue_bytes == 2 * (MESSAGE_OVERHEAD + 11)


def test_qos_1_is_never_dropped(hall_of):
    hall = hall_of(queue_size=3, start=False)
    hall.receive(*numbered(range(3)), qos=0)

    hall.receive(*numbered(range(10, 20)))
    hall.receive(b"late", qos=0)

    assert hall.balance().outcomes["dropped"] == 1
    assert hall.pipeline.full
    hall.pipeline.start()
    hall.settle()
    assert hall.store.payloads == numbered([*range(3), *range(10, 20)])
    assert len(hall.acknowledged) == 10


def test_a_flood_of_qos_0_does_not_keep_qos_1_out(hall_of):
    hall = hall_of(queue_size=3, start=False)

    hall.receive(*numbered(range(50)), qos=0)

    assert not hall.pipeline.full
    assert hall.pipeline.wait_for_room(0)


def test_who_waits_for_room_gets_it_when_a_batch_is_stored(hall_of):
    hall = hall_of(queue_size=2)
    hall.store.gate.clear()
    hall.receive(b"a", b"b")
    assert hall.pipeline.full
    assert not hall.pipeline.wait_for_room(0)

    hall.store.gate.set()

    assert hall.pipeline.wait_for_room(10)
    hall.settle()
    assert not hall.pipeline.full


def test_nothing_is_held_when_all_is_done(hall_of):
    hall = hall_of(workers=2, batch_size=5)

    hall.receive(*numbered(range(100)), qos=0)
    hall.receive(*numbered(range(100)), b"ignored", b"broken")

    hall.settle()
    assert (hall.balance().queue_depth, hall.balance().queue_bytes, hall.balance().oldest_us) == (0, 0, None)


def test_the_oldest_message_is_known_in_queue_and_in_hand(hall_of):
    now_us = itertools.count(1000)
    hall = hall_of(clock_us=lambda: next(now_us), batch_size=1, start=False)
    hall.store.gate.clear()
    hall.receive(b"a", b"b")
    assert hall.balance().oldest_us == 1000

    hall.pipeline.start()
    wait_until(lambda: hall.store.entered, what="the first to be in hand")

    assert hall.balance().oldest_us == 1000
    assert hall.balance().in_flight == 2
    assert hall.balance().queue_depth == 1


# -- reconnects


def test_a_pending_message_that_comes_again_is_acknowledged_once_on_the_new_connection_after_its_commit(hall_of):
    hall = hall_of()
    hall.store.gate.clear()
    hall.receive(b"a", b"b")
    wait_until(lambda: hall.store.entered, what="the first batch")
    old = hall.acknowledged

    hall.pipeline.disconnected()
    new = hall.connect()
    hall.redeliver(1, b"a")
    hall.redeliver(2, b"b")
    assert new == []
    hall.store.gate.set()

    hall.settle()
    assert (old, new) == ([], [1, 2])
    assert sorted(hall.store.payloads) == [b"a", b"b"]
    assert hall.balance().outcomes["duplicate"] == 2
    assert hall.balance().received == 4


def test_a_committed_message_that_comes_again_is_acknowledged_at_once(hall_of):
    hall = hall_of()
    hall.receive(b"a")
    hall.settle()

    hall.pipeline.disconnected()
    new = hall.connect()
    hall.redeliver(1, b"a")

    assert new == [1]
    assert hall.store.payloads == [b"a"]
    assert hall.balance().outcomes == Counter(stored=1, duplicate=1) | dict.fromkeys(
        ("dead_lettered", "ignored", "spooled", "dropped"), 0
    )


def test_a_commit_while_there_is_no_connection_is_not_acknowledged_before_the_redelivery(hall_of):
    hall = hall_of()
    hall.store.gate.clear()
    hall.receive(b"a")
    hall.pipeline.disconnected()
    hall.store.gate.set()
    hall.settle()
    assert hall.acknowledged == []

    new = hall.connect()
    assert new == []
    hall.redeliver(1, b"a")

    assert new == [1]


def test_a_resend_on_the_same_connection_is_a_duplicate_and_acknowledged_once(hall_of):
    hall = hall_of()
    hall.store.gate.clear()
    hall.receive(b"a")
    hall.redeliver(1, b"a")
    hall.store.gate.set()

    hall.settle()
    assert hall.acknowledged == [1]
    assert hall.balance().outcomes["duplicate"] == 1


def test_a_resend_of_an_ignored_message_is_acknowledged_once(hall_of):
    hall = hall_of()
    hall.receive(b"ignored")
    hall.settle()

    hall.redeliver(1, b"ignored")

    hall.settle()
    assert hall.acknowledged == [1]


def test_the_first_message_of_a_new_session_is_not_taken_for_one_of_the_old(hall_of):
    hall = hall_of()
    hall.receive(b"on")
    hall.settle()

    new = hall.connect(session_present=False)
    hall.redeliver(1, b"on")

    hall.settle()
    assert hall.sessions_lost == 1
    assert hall.pipeline.session_to_raise is None, "the batch has carried it"
    assert hall.store.payloads == [b"on", b"on"]
    assert [batch.entry.raises_session for batch in hall.store.batches] == [False, True]
    assert new == [1]


def test_what_a_lost_session_left_in_the_queue_is_stored_and_not_acknowledged(hall_of):
    hall = hall_of(start=False)
    hall.receive(b"a")

    new = hall.connect(session_present=False)
    hall.pipeline.receive(Run.of_one(b"t", b"b", 1, packet_id=1))
    hall.pipeline.start()

    hall.settle()
    assert hall.store.payloads == [b"a", b"b"]
    assert new == [1]
    (batch,) = hall.store.batches
    assert len(batch.entry.fingerprints) == 8


def test_proven_rows_are_pruned_by_the_next_batch(hall_of):
    hall = hall_of()
    for payload in (b"a", b"b"):
        hall.receive(payload)
        hall.settle()

    hall.pipeline.prove([1])
    hall.receive(b"c")
    hall.settle()

    first, _, third = hall.store.batches
    assert third.entry.pruned == (first.entry.key,)
    assert hall.pipeline.take_prunable() == ()


def test_a_message_without_a_connection_is_stored_all_the_same(hall_of):
    hall = hall_of()
    hall.pipeline.disconnected()

    hall.receive(b"a")

    hall.settle()
    assert hall.store.payloads == [b"a"]
    assert hall.acknowledged == []


# -- the end


def test_draining_ends_the_waiting_for_more(hall_of):
    hall = hall_of(batch_size=1000, batch_wait_s=NEVER)
    hall.receive(b"a")

    assert hall.pipeline.drain(10)

    assert hall.store.payloads == [b"a"]
    assert hall.acknowledged == [1], "sent before the drain was over"


def test_a_drain_that_takes_too_long_says_so(hall_of):
    hall = hall_of()
    hall.store.gate.clear()
    hall.receive(b"a")

    assert not hall.pipeline.drain(0.01)

    assert hall.balance().in_flight == 1


def test_an_empty_pipeline_is_drained_at_once(hall_of):
    assert hall_of(start=False).pipeline.drain(0)


def test_stopping_leaves_the_queue_unacknowledged(hall_of):
    hall = hall_of(batch_size=1000, batch_wait_s=NEVER)
    hall.receive(b"a", b"b")

    assert hall.pipeline.stop()

    assert not hall.pipeline.alive
    assert hall.store.batches == []
    assert hall.acknowledged == []
    assert hall.balance().in_flight == 2


def test_stopping_tells_when_a_worker_hangs(hall_of):
    hall = hall_of()
    hall.store.gate.clear()
    hall.receive(b"a")
    wait_until(lambda: hall.store.entered, what="the batch to be under way")

    assert not hall.pipeline.stop(timeout_s=0.01)


def test_start_and_stop_may_be_called_in_any_number(hall_of):
    hall = hall_of(start=False)

    assert hall.pipeline.stop()
    assert hall.pipeline.stop()

    other = hall_of()
    other.pipeline.start()
    assert other.pipeline.alive
    other.close()
    other.close()
    assert not other.pipeline.alive


def test_stopping_frees_who_waits_for_room(hall_of):
    hall = hall_of(queue_size=1, start=False)
    hall.receive(b"a")
    freed = threading.Event()
    waiting = threading.Thread(target=lambda: hall.pipeline.wait_for_room(NEVER) and freed.set())
    waiting.start()

    hall.pipeline.stop()

    waiting.join(10)
    assert freed.is_set()


def test_a_store_that_is_stopped_leaves_its_batch_to_the_broker(hall_of):
    hall = hall_of()
    hall.store.error = Stopped("stopped")

    hall.receive(b"a")

    wait_until(lambda: not hall.pipeline.alive, what="the worker to end")
    assert hall.acknowledged == []
    assert hall.balance().in_flight == 1
    assert hall.fatal == []


@pytest.mark.parametrize("error", [Fenced("another process"), RuntimeError("a bug")])
def test_what_a_worker_cannot_survive_ends_the_bridge(hall_of, error):
    hall = hall_of()
    hall.store.error = error

    with capture_logs():
        hall.receive(b"a")
        wait_until(lambda: hall.fatal, what="the end")

    assert hall.fatal == [error]
    wait_until(lambda: not hall.pipeline.alive, what="the worker to end")
    assert hall.acknowledged == []
    assert hall.balance().in_flight == 1


# -- the account


@pytest.fixture
def restless_threads():
    """Threads take turns five hundred times as often as they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless_threads")
def test_the_account_balances_at_every_moment_while_threads_hammer_it(hall_of):
    hall = hall_of(workers=4, batch_size=16, queue_size=200)
    hall.store.refuse = {b"refused"}
    kinds = itertools.cycle([b"a", b"ignored", b"broken", b"refused", b"nan"])
    done, checks, unbalanced = threading.Event(), [], []

    def check():
        while not done.wait(0.0001):
            balance = hall.pipeline.balance()
            checks.append(balance.in_flight)
            if not balance.balanced or balance.in_flight < balance.queue_depth or balance.queue_bytes < 0:
                unbalanced.append(balance)

    checker = threading.Thread(target=check)
    checker.start()
    # As in life one thread receives; each connection brings again what the one before left unacknowledged.
    connections, sent, received = [hall.acknowledged], {}, 0
    while len(checks) < 2000:
        hall.pipeline.disconnected()
        connections.append(hall.connect())
        for packet_id in sorted(set(sent).difference(*connections)):
            hall.redeliver(packet_id, sent[packet_id])
            received += 1
        for _ in range(100):
            sent[len(sent) + 1] = payload = next(kinds)
            hall.receive(payload)
            hall.receive(payload, qos=0)
            received += 2
        hall.pipeline.wait_for_room(10)
    hall.settle()
    done.set()
    checker.join()

    balance = hall.balance()
    assert unbalanced == []
    assert sum(in_flight > 0 for in_flight in checks) > 500, "the checks saw it at work"
    assert balance.received == sum(balance.outcomes.values()) == received
    assert balance.rows["readings"] == balance.outcomes["stored"]
    assert sorted(itertools.chain(*connections)) == sorted(sent), "each acknowledged once"


# -- what the watchdog asks


def test_a_batch_in_hand_shows_no_change_until_it_is_settled(hall_of):
    hall = hall_of()
    assert hall.pipeline.batches_in_hand() == {}
    hall.store.gate.clear()
    hall.receive(b"a", b"b")
    wait_until(lambda: hall.store.entered, what="the batch to be under way")

    seen = [hall.pipeline.batches_in_hand() for _ in range(3)]
    hall.store.gate.set()
    hall.settle()

    assert len(seen[0]) == 1
    assert seen[0] == seen[1] == seen[2]
    assert hall.pipeline.batches_in_hand() == {}


def test_every_batch_shows_another_sign(hall_of):
    hall = hall_of()
    hall.store.gate.clear()
    signs, taken = [], []
    for number in range(3):
        hall.receive(b"same")
        wait_until(lambda count=number + 1: len(hall.store.entered) == count, what="the batch to be under way")
        signs.append(next(iter(hall.pipeline.batches_in_hand().values())))
        taken.append(hall.pipeline.taken)
        hall.store.gate.set()
        hall.settle()
        hall.store.gate.clear()

    assert len(set(signs)) == 3
    assert taken == [1, 2, 3]


def test_a_part_of_a_batch_that_is_stored_is_a_sign(hall_of, monkeypatch):
    monkeypatch.setattr(batches_module, "TRANSACTION_ROWS", 1)
    hall = hall_of(start=False)
    hall.receive(b"a", b"b")
    hall.store.gate.clear()
    hall.pipeline.start()
    wait_until(lambda: hall.store.entered, what="the first part")
    first = hall.pipeline.batches_in_hand()

    let_one_through(hall)
    wait_until(lambda: len(hall.store.entered) == 2, what="the second part")

    assert hall.pipeline.batches_in_hand() != first


def let_one_through(hall):
    hall.store.gate.set()
    wait_until(lambda: hall.store.batches, what="the first part to be stored")


def test_messages_wait_for_a_free_worker_only_while_there_is_one(hall_of):
    hall = hall_of(workers=1, start=False)
    assert not hall.pipeline.waits_for_a_free_worker
    hall.receive(b"a")
    assert hall.pipeline.waits_for_a_free_worker

    hall.store.gate.clear()
    hall.pipeline.start()
    wait_until(lambda: hall.store.entered, what="the batch to be under way")
    hall.receive(b"b")

    assert hall.balance().queue_depth == 1
    assert not hall.pipeline.waits_for_a_free_worker


def test_a_delivery_is_held_from_its_arrival_until_it_is_settled(hall_of):
    hall = hall_of(start=False)
    hall.receive(b"a")
    [position] = [message.position for message in hall.pipeline._queue]
    assert hall.pipeline.holds(position)
    assert not hall.pipeline.holds(position + 1)

    hall.store.gate.clear()
    hall.pipeline.start()
    wait_until(lambda: hall.store.entered, what="the batch to be under way")
    assert hall.pipeline.holds(position)
    hall.store.gate.set()
    hall.settle()

    assert not hall.pipeline.holds(position)


def test_a_message_of_qos_0_holds_no_position(hall_of):
    hall = hall_of(start=False)
    hall.receive(b"a", qos=0)
    [message] = hall.pipeline._queue

    assert not hall.pipeline.holds(message.position)


def test_who_asks_what_is_held_while_the_lock_hangs_gets_an_answer(hall_of):
    hall = hall_of()

    with hall.pipeline._lock:
        assert hall.pipeline.holds(1, timeout_s=0.0)
        assert hall.pipeline.batches_in_hand() == {}
        assert not hall.pipeline.waits_for_a_free_worker


# -- a high share of dead letters


def warned_of(logs):
    return [(log["share"], log["dead_letters"], log["messages"]) for log in logs if "many messages" in log["event"]]


def test_a_high_share_of_dead_letters_is_warned_of_once_a_minute_whatever_stage_they_failed_at(hall_of):
    hall, now_s = hall_of(), [0.0]
    hall.pipeline._share = DeadLetterShare(lambda: now_s[0])
    hall.store.refuse = frozenset({b"refused"})

    with capture_logs() as logs:
        for _ in range(3):
            hall.receive(*[b"good"] * 79, *[b"broken"] * 10, *[b"refused"] * 10)
            hall.settle()
            now_s[0] += 60.0
            hall.receive(b"ignored")
            hall.settle()

    assert warned_of(logs) == [("20%", 20, 100)] * 3
    assert hall.balance().outcomes["stored"] == 3 * 79


def test_a_low_share_of_dead_letters_is_not_warned_of(hall_of):
    hall, now_s = hall_of(), [0.0]
    hall.pipeline._share = DeadLetterShare(lambda: now_s[0])
    hall.receive(*[b"good"] * 94, *[b"broken"] * 5)
    hall.settle()
    now_s[0] += 60.0

    with capture_logs() as logs:
        hall.receive(b"good")
        hall.settle()

    assert warned_of(logs) == []


# -- over the disk


@pytest.fixture
def spooling(hall_of):
    """A hall with two batches on the disk, of two messages each."""
    hall = hall_of(batch_size=2, batch_wait_s=NEVER)
    hall.store.spools = True
    hall.receive(b"a", b"broken", b"ignored", b"b")
    hall.settle()
    return hall


def drain(hall):
    """Both batches at once, as the drainer does."""
    spooled = [message for batch in hall.store.batches for message in batch.messages]
    entries = [batch.entry for batch in hall.store.batches]
    work = Batches(Translator()).whole(spooled)
    hall.pipeline.drained(entries, work, Stored({"readings": len(work.translated)}))
    return {entry.key for entry in entries}


def test_what_is_on_the_disk_is_acknowledged_and_its_outcome_known_when_it_is_drained(spooling):
    assert spooling.acknowledged == [1, 2, 3, 4]
    before = Counter(spooling.balance().outcomes)

    drain(spooling)

    assert +before == {"spooled": 4}
    assert +Counter(spooling.balance().outcomes) == {"stored": 2, "dead_lettered": 1, "ignored": 1}


def test_rows_of_batches_from_the_disk_go_when_all_is_proven_and_drained(spooling):
    spooling.pipeline.prove([1, 2, 3, 4])
    before = spooling.pipeline.take_prunable()

    drained = drain(spooling)

    assert before == ()
    assert set(spooling.pipeline.take_prunable()) == drained


class OvertakingStore(Store):
    """Has put the batch on the disk, and does not come back to tell of it before the gate opens."""

    def store(self, batch):
        with self.lock:
            self.batches.append(batch)
        self.gate.wait()
        return


def test_a_batch_that_is_drained_before_its_worker_has_told_of_it_waits_for_that(hall_of):
    hall = hall_of(batch_size=2, batch_wait_s=NEVER, start=False)
    store = hall.pipeline._store = hall.store = OvertakingStore()
    store.gate.clear()
    hall.pipeline.start()
    hall.receive(b"a", b"b")
    wait_until(lambda: store.batches, what="the batch on the disk")
    draining = threading.Thread(target=drain, args=(hall,))
    draining.start()
    draining.join(0.1)
    assert hall.balance().outcomes | {"spooled": 0, "stored": 0} == hall.balance().outcomes
    assert hall.pipeline.take_prunable() == ()

    store.gate.set()
    draining.join(30)

    assert hall.acknowledged == [1, 2]
    assert +Counter(hall.balance().outcomes) == {"stored": 2}
    assert hall.pipeline.take_prunable() == ()  # not before its acknowledgements are proven
    hall.pipeline.prove([1, 2])
    assert hall.pipeline.take_prunable() == (store.batches[0].entry.key,)


def test_a_stop_frees_a_drainer_that_waits_for_a_worker(hall_of):
    hall = hall_of(batch_size=2, batch_wait_s=NEVER, start=False)
    store = hall.pipeline._store = hall.store = OvertakingStore()
    store.gate.clear()
    hall.pipeline.start()
    hall.receive(b"a", b"b")
    wait_until(lambda: store.batches, what="the batch on the disk")

    hall.pipeline.stop(0)

    with pytest.raises(Stopped):
        drain(hall)


def test_what_was_found_on_the_disk_counts_as_received(hall_of):
    hall = hall_of()

    hall.pipeline.found_in_spool(7)

    assert (hall.balance().received, +Counter(hall.balance().outcomes)) == (7, {"spooled": 7})
