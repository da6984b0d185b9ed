"""Which deliveries are known: examples, then a simulated broker that does everything a broker may do."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from structlog.testing import capture_logs

from mqtt_bridge.acks import AckTracker
from mqtt_bridge.ledger import LAP, REACH, SWEEP, BatchKey, Claim, Entry, Ledger, Seen, fingerprint
from mqtt_bridge.model import Message

SAME = fingerprint(b"devices/1", b"on", retain=False)
OTHER = fingerprint(b"devices/1", b"off", retain=False)


def message(position, mark=SAME, *, qos=1):
    return Message(b"devices/1", b"on", qos, False, 0, position=position, fingerprint=mark)


def loaded(*entries, redelivery="marked", owner_epoch=2, session_epoch=1):
    """The ledger of a process that has just taken over, with its session at the broker."""
    ledger = Ledger(redelivery=redelivery)
    ledger.load(Claim(owner_epoch, session_epoch, entries))
    ledger.connected(session_present=True)
    return ledger


def fresh(**kwargs):
    return loaded(owner_epoch=1, **kwargs)


def receive(ledger, ids, *, mark=SAME, dup=False):
    """The positions of these deliveries, all of which must be new."""
    places = [ledger.place(packet_id, mark, dup=dup) for packet_id in ids]
    assert {seen for _, seen in places} <= {Seen.NEW}
    return [position for position, _ in places]


def commit(ledger, positions, mark=SAME):
    """The ledger row of a batch of these positions, committed and settled."""
    messages = [message(position, mark) for position in positions]
    entry = ledger.entry(messages)
    ledger.settled(entry, messages)
    return entry


def next_pruned(ledger):
    """The rows that the next batch would delete."""
    return ledger.entry([]).pruned


# -- fingerprints


def test_a_fingerprint_is_eight_stable_bytes_of_topic_retain_flag_and_payload():
    # Pinned: a process must recognise what its predecessor, perhaps of an older version, has committed.
    assert fingerprint(b"a", b"b", retain=False).hex() == "ffc151170352baa3"


def test_topic_and_payload_do_not_run_into_each_other():
    assert fingerprint(b"ab", b"c", retain=False) != fingerprint(b"a", b"bc", retain=False)
    assert fingerprint(b"a", b"", retain=False) != fingerprint(b"a", b"", retain=True)


# -- positions


def test_positions_go_on_where_packet_ids_wrap():
    ledger = fresh()

    positions = receive(ledger, [LAP - 1, LAP, 1, 2])

    assert positions == [LAP - 1, LAP, LAP + 1, LAP + 2]


def test_packet_ids_may_be_skipped():
    ledger = fresh()

    assert receive(ledger, [5, 9, 9 + REACH, 60_000, 20]) == [5, 9, 9 + REACH, 60_000, LAP + 20]


def test_a_constant_payload_is_new_each_time_through_two_wraps():
    ledger = fresh()
    ids = [packet_id for _ in range(2) for packet_id in range(1, LAP + 1)] + [1, 2, 3]

    for first in range(0, len(ids), 5000):
        positions = receive(ledger, ids[first : first + 5000])
        commit(ledger, positions)
        ledger.prove(positions)

    assert positions[-1] == 2 * LAP + 3


def test_a_redelivery_across_a_wrap_is_recognised():
    ledger = fresh()
    positions = receive(ledger, [LAP - 1, LAP, 1, 2])
    commit(ledger, positions)

    ledger.connected(session_present=True)

    assert [ledger.place(i, SAME, dup=True) for i in (LAP - 1, LAP, 1, 2)] == [(p, Seen.COMMITTED) for p in positions]
    assert receive(ledger, [3]) == [LAP + 3]


# -- redeliveries


def test_a_redelivery_of_what_waits_for_its_commit_is_pending():
    ledger = fresh()
    (position,) = receive(ledger, [1])

    ledger.connected(session_present=True)

    assert ledger.place(1, SAME, dup=True) == (position, Seen.PENDING)


def test_a_redelivery_of_what_is_committed_is_committed():
    ledger = fresh()
    (position,) = receive(ledger, [1])
    commit(ledger, [position])

    ledger.connected(session_present=True)

    assert ledger.place(1, SAME, dup=True) == (position, Seen.COMMITTED)


@pytest.mark.parametrize("committed", [False, True])
def test_a_delivery_that_is_sent_again_on_its_own_connection_is_a_resend(committed):
    ledger = fresh()
    (position,) = receive(ledger, [1])
    if committed:
        commit(ledger, [position])

    assert ledger.place(1, SAME, dup=True) == (position, Seen.RESENT)


def test_what_is_redelivered_twice_on_one_connection_is_a_resend_the_second_time():
    ledger = fresh()
    (position,) = receive(ledger, [1])
    ledger.connected(session_present=True)

    assert ledger.place(1, SAME, dup=True) == (position, Seen.PENDING)
    assert ledger.place(1, SAME, dup=True) == (position, Seen.RESENT)


def test_a_duplicate_that_was_never_received_is_new():
    ledger = fresh()

    assert ledger.place(1, SAME, dup=True) == (1, Seen.NEW)


def test_uncommitted_deliveries_that_come_again_before_committed_ones_are_new():
    ledger = fresh()
    positions = receive(ledger, range(1, 7))
    entry = commit(ledger, positions[3:])

    restarted = loaded(entry)

    assert receive(restarted, [1, 2, 3], dup=True) == positions[:3]
    assert [restarted.place(i, SAME, dup=True)[1] for i in (4, 5, 6)] == [Seen.COMMITTED] * 3


def test_without_the_dup_flag_nothing_is_known_unless_the_setting_says_so():
    entry = Entry(BatchKey(1, 1), 1, 1, SAME)

    assert loaded(entry).place(1, SAME, dup=False)[1] is Seen.NEW
    assert loaded(entry, redelivery="unmarked").place(1, SAME, dup=False) == (1, Seen.COMMITTED)


def test_a_broker_that_does_not_mark_redeliveries_may_begin_with_one_that_was_not_committed():
    ledger = fresh(redelivery="unmarked")
    positions = receive(ledger, range(1, 7))
    entry = commit(ledger, positions[3:])

    restarted = loaded(entry, redelivery="unmarked")
    places = [restarted.place(packet_id, SAME, dup=False) for packet_id in range(1, 7)]

    assert [seen for _, seen in places] == [Seen.NEW] * 3 + [Seen.COMMITTED] * 3
    assert [position for position, _ in places] == positions


def test_a_broker_that_renumbers_redeliveries_is_believed_in_nothing():
    ledger = fresh(redelivery="renumbered")
    positions = receive(ledger, [1, 2, 2, 1])
    entry = commit(ledger, positions)

    assert positions == [1, 2, 3, 4]
    assert entry.fingerprints == b""
    ledger.connected(session_present=True)
    assert ledger.place(1, SAME, dup=True) == (5, Seen.NEW)
    ledger.connected(session_present=False)
    assert ledger.place(1, SAME, dup=True)[1] is Seen.NEW


def test_an_ignored_delivery_is_forgotten():
    ledger = fresh()
    (position,) = receive(ledger, [1])
    ledger.forget([position])

    ledger.connected(session_present=True)

    assert ledger.place(1, SAME, dup=True) == (position, Seen.NEW)


def test_an_ignored_delivery_that_is_sent_again_on_its_own_connection_is_a_resend():
    ledger = fresh()
    (position,) = receive(ledger, [1])
    ledger.forget([position])

    assert ledger.place(1, SAME, dup=True) == (position, Seen.RESENT)


# -- a broker that counts as no incrementing broker does


def test_an_id_that_steps_back_warns_and_ends_the_matching():
    ledger = fresh()
    receive(ledger, [1, 2, 3])

    with capture_logs() as logs:
        position, seen = ledger.place(2, SAME, dup=False)
        receive(ledger, [2, 1, 2], dup=True)

    assert (position, seen) == (4, Seen.NEW)
    assert [log["log_level"] for log in logs] == ["warning"]
    assert "MQTT_REDELIVERY" in logs[0]["event"]
    assert ledger.entry([message(position)]).fingerprints == b""


def test_another_message_at_a_known_position_ends_the_matching():
    ledger = fresh()
    receive(ledger, [1, 2])
    ledger.connected(session_present=True)

    with capture_logs() as logs:
        place = ledger.place(1, OTHER, dup=True)

    assert place == (3, Seen.NEW)
    assert len(logs) == 1


def test_a_new_session_is_matched_again_after_one_in_which_the_count_was_lost():
    ledger = fresh()
    receive(ledger, [2, 1])

    ledger.connected(session_present=False)
    (position,) = receive(ledger, [1])
    ledger.connected(session_present=True)

    assert ledger.place(1, SAME, dup=True) == (position, Seen.PENDING)


def test_a_session_in_which_the_count_was_lost_is_not_matched_by_the_next_process_either():
    # A broker that reuses the lowest free id, and a device that always says the same.
    ledger = fresh()
    database = Database()
    positions = receive(ledger, [1, 2, 3])
    database.store(ledger, positions)
    lost = receive(ledger, [1])
    database.store(ledger, lost)
    never_stored = 1  # delivered under packet id 1 once more, and the process is killed before it is stored
    receive(ledger, [never_stored])

    restarted = loaded(*database.claimed(), session_epoch=database.session_epoch)

    assert restarted.place(never_stored, SAME, dup=True)[1] is Seen.NEW


# -- sessions


def test_nothing_matches_across_sessions():
    ledger = fresh()
    positions = receive(ledger, [1, 2, 3])
    commit(ledger, positions[:2])

    ledger.connected(session_present=False)
    again = [ledger.place(packet_id, SAME, dup=True) for packet_id in (1, 2, 3)]

    assert [seen for _, seen in again] == [Seen.NEW] * 3
    assert min(position for position, _ in again) > max(positions)


def test_positions_and_packet_ids_stay_congruent_in_a_new_session():
    ledger = fresh()
    receive(ledger, [LAP, 1])

    ledger.connected(session_present=False)

    assert receive(ledger, [1, 2]) == [2 * LAP + 1, 2 * LAP + 2]


def test_a_lost_session_is_written_by_every_batch_until_one_is_committed():
    ledger = fresh()

    ledger.connected(session_present=False)
    entries = [ledger.entry([message(position)]) for position in receive(ledger, [1, 2])]

    assert ledger.session_to_raise == 2
    assert [(entry.session_epoch, entry.raises_session) for entry in entries] == [(2, True), (2, True)]
    ledger.settled(entries[0], [])
    assert ledger.session_to_raise is None
    assert not ledger.entry([]).raises_session


def test_a_session_lost_again_is_not_satisfied_by_the_raise_of_the_one_before():
    ledger = fresh()
    ledger.connected(session_present=False)
    ledger.connected(session_present=False)

    ledger.session_raised(2)

    assert ledger.session_to_raise == 3


def test_a_lost_session_stays_lost_across_further_reconnects():
    ledger = fresh()
    ledger.connected(session_present=False)

    ledger.connected(session_present=True)

    assert ledger.session_to_raise == 2


def test_a_batch_of_a_lost_session_leaves_no_fingerprints_in_the_new_one():
    ledger = fresh()
    old = [message(position) for position in receive(ledger, [1, 2])]

    ledger.connected(session_present=False)
    new = [message(position) for position in receive(ledger, [1])]
    entry = ledger.entry(old + new)

    assert (entry.first_position, entry.fingerprints) == (new[0].position, SAME)


def test_rows_of_a_lost_session_are_pruned_when_they_are_settled():
    ledger = fresh()
    settled = commit(ledger, receive(ledger, [1]))
    messages = [message(position) for position in receive(ledger, [2])]
    unsettled = ledger.entry(messages)

    ledger.connected(session_present=False)
    assert next_pruned(ledger) == (settled.key,)
    ledger.settled(unsettled, messages)

    assert next_pruned(ledger) == (unsettled.key,)


# -- restarts


def test_a_restarted_process_knows_what_was_committed_and_only_that():
    ledger = fresh()
    positions = receive(ledger, range(1, 6))
    entry = commit(ledger, positions[:3])

    restarted = loaded(entry)

    seen = [restarted.place(packet_id, SAME, dup=True) for packet_id in range(1, 6)]
    assert seen == list(zip(positions, [Seen.COMMITTED] * 3 + [Seen.NEW] * 2, strict=True))


def test_a_restart_after_several_laps_goes_on_counting_from_the_ledger():
    first_position = 3 * LAP + 100

    restarted = loaded(Entry(BatchKey(1, 7), 1, first_position, SAME * 3))

    assert restarted.place(102, SAME, dup=True) == (first_position + 2, Seen.COMMITTED)
    assert receive(restarted, [103]) == [first_position + 3]


def test_keys_of_a_restarted_process_are_its_own():
    restarted = loaded(Entry(BatchKey(1, 1), 1, 1, SAME), owner_epoch=2)

    assert restarted.entry([]).key == BatchKey(2, 1)
    assert restarted.entry([]).key == BatchKey(2, 2)


def test_gaps_in_a_ledger_row_match_nothing():
    ledger = fresh()
    positions = receive(ledger, [1, 2, 3, 4])
    entry = commit(ledger, [positions[0], positions[3]])

    assert (entry.first_position, entry.fingerprints) == (1, SAME + bytes(16) + SAME)
    restarted = loaded(entry)
    seen = [restarted.place(packet_id, SAME, dup=True)[1] for packet_id in (1, 2, 3, 4)]
    assert seen == [Seen.COMMITTED, Seen.NEW, Seen.NEW, Seen.COMMITTED]


def test_what_lies_out_of_reach_is_not_known_after_a_restart():
    far = Entry(BatchKey(1, 1), 1, 1, SAME)
    near = Entry(BatchKey(1, 2), 1, REACH + 100, SAME)

    restarted = loaded(far, near)

    assert next_pruned(restarted) == (far.key,)


def test_messages_without_qos_leave_no_fingerprints():
    ledger = fresh()

    entry = ledger.entry([message(0, b"", qos=0), message(0, b"", qos=0)])

    assert (entry.first_position, entry.fingerprints) == (0, b"")


# -- pruning


def test_a_row_is_pruned_when_all_of_it_is_proven_and_not_before():
    ledger = fresh()
    positions = receive(ledger, [1, 2, 3])
    entry = commit(ledger, positions)
    commit(ledger, receive(ledger, [4]))

    ledger.prove(positions[:2])
    assert next_pruned(ledger) == ()

    ledger.prove(positions[2:])
    assert next_pruned(ledger) == (entry.key,)
    assert next_pruned(ledger) == ()


def test_a_proven_row_is_pruned_though_nothing_newer_has_come():
    ledger = fresh()
    entry = commit(ledger, receive(ledger, [1]))

    ledger.prove([1])

    assert next_pruned(ledger) == (entry.key,)


def test_a_row_that_was_never_proven_is_pruned_before_distances_from_it_become_ambiguous():
    ledger = fresh()
    entry = commit(ledger, receive(ledger, [1]))

    receive(ledger, range(2, REACH + SWEEP + 3))

    assert entry.key in ledger.take_prunable()
    assert REACH + SWEEP < LAP // 2


def test_rows_that_could_not_be_deleted_are_given_back():
    ledger = fresh()
    first = commit(ledger, receive(ledger, [1]))
    commit(ledger, receive(ledger, [2]))
    ledger.prove([1])

    ledger.give_back(ledger.take_prunable())

    assert ledger.take_prunable() == (first.key,)
    assert ledger.take_prunable() == ()


def test_a_ledger_lags_when_much_was_received_and_nothing_was_stored():
    ledger = fresh()
    for packet_id in range(1, REACH // 2, 100):
        positions = receive(ledger, [packet_id])
        ledger.forget(positions)
    assert ledger.lags

    ledger.entry([message(position) for position in receive(ledger, [REACH // 2])])

    assert not ledger.lags


def test_a_ledger_does_not_lag_behind_what_it_was_loaded_with():
    restarted = loaded(Entry(BatchKey(1, 7), 1, 3 * LAP, SAME))

    assert not restarted.lags


def test_a_ledger_does_not_lag_because_a_new_session_counts_anew():
    ledger = fresh()
    commit(ledger, receive(ledger, [1]))

    ledger.connected(session_present=False)

    assert not ledger.lags


def test_a_row_is_not_pruned_before_its_commit_is_known():
    ledger = fresh()
    positions = receive(ledger, [1])

    ledger.entry([message(position) for position in positions])
    ledger.prove(positions)

    assert next_pruned(ledger) == ()


def test_a_row_without_fingerprints_is_pruned_when_it_is_settled():
    ledger = fresh()
    messages = [message(0, b"", qos=0)]
    entry = ledger.entry(messages)

    ledger.settled(entry, messages)

    assert next_pruned(ledger) == (entry.key,)


def test_rows_of_a_predecessor_are_pruned_when_their_redeliveries_are_proven():
    entries = Entry(BatchKey(1, 1), 1, 1, SAME * 2), Entry(BatchKey(1, 2), 1, 3, SAME)
    restarted = loaded(*entries)
    positions = [restarted.place(packet_id, SAME, dup=True)[0] for packet_id in (1, 2, 3)]

    restarted.prove(positions)

    assert set(next_pruned(restarted)) == {entries[0].key, entries[1].key}


def test_no_more_rows_are_pruned_at_once_than_a_statement_should_carry():
    ledger = fresh()
    keys = []
    for packet_id in range(1, 702):
        positions = receive(ledger, [packet_id])
        keys.append(commit(ledger, positions).key)
        ledger.prove(positions)

    pruned = [next_pruned(ledger) for _ in range(3)]

    # The rows made meanwhile carried some away already.
    assert max(map(len, pruned)) <= 500
    assert next_pruned(ledger) == ()


def test_what_was_acknowledged_before_a_cut_is_forgotten_once_it_is_out_of_reach():
    ledger = fresh()
    database = Database()
    database.store(ledger, receive(ledger, [1, 2, 3]))  # acknowledged; the cut comes before the proof
    ledger.connected(session_present=True)

    next_id = 4
    while next_id < REACH + 3000:
        positions = receive(ledger, range(next_id, next_id + 500))
        database.store(ledger, positions)
        ledger.prove(positions)
        next_id += 500
    database.store(ledger, receive(ledger, [next_id]))

    assert min(entry.first_position for entry in database.claimed()) > 3


def test_a_killed_process_loses_no_constant_payload_to_an_entry_that_is_one_lap_older():
    ledger = fresh()
    database = Database()
    database.store(ledger, receive(ledger, [1, 2, 3]))  # acknowledged; the cut comes before the proof
    ledger.connected(session_present=True)
    for first in range(4, LAP - 500, 500):
        positions = receive(ledger, range(first, first + 500))
        database.store(ledger, positions)
        ledger.prove(positions)
    positions = receive(ledger, [*range(first + 500, LAP + 1), 1])
    database.store(ledger, positions)
    ledger.prove(positions)
    receive(ledger, [2])  # delivered, and the process is killed before it is stored

    restarted = loaded(*database.claimed())

    assert restarted.place(2, SAME, dup=True)[1] is Seen.NEW


# -- everything at once


@dataclass
class Database:
    """What PostgreSQL keeps of the ledger."""

    rows: dict[BatchKey, Entry] = field(default_factory=dict)
    session_epoch: int = 1
    owner_epoch: int = 1

    def commit(self, entry):
        assert entry.key not in self.rows
        self.rows[entry.key] = entry
        for key in entry.pruned:
            assert key in self.rows, "a row is pruned that is not there"
            del self.rows[key]
        if entry.raises_session:
            self.session_epoch = max(self.session_epoch, entry.session_epoch)

    def store(self, ledger, positions, mark=SAME):
        """Commit and settle a batch of these positions."""
        messages = [message(position, mark) for position in positions]
        entry = ledger.entry(messages)
        self.commit(entry)
        ledger.settled(entry, messages)

    def claimed(self):
        """What the next owner reads, in order."""
        self.rows = {k: e for k, e in self.rows.items() if e.session_epoch >= self.session_epoch and e.fingerprints}
        return tuple(self.rows[key] for key in sorted(self.rows))


@dataclass
class Publish:
    """A message at the broker."""

    serial: int
    mark: bytes
    packet_id: int = 0
    was_sent: bool = False


class Broker:
    """Incrementing packet ids, a window, redelivery in order at every reconnect; PUBACKs and barriers on the wire."""

    def __init__(self, *, first_id, window, marks_redeliveries):
        self.first_id = first_id
        self.window = window
        self.marks_redeliveries = marks_redeliveries
        self.serials = 0
        self.lose_session()

    def lose_session(self):
        self.next_id = self.first_id
        self.queue = deque()
        self.in_flight = []
        self.unsent = deque()
        self.wire = deque()

    def publish(self, mark):
        self.serials += 1
        self.queue.append(Publish(self.serials, mark))

    def connect(self):
        self.wire.clear()
        self.unsent = deque(self.in_flight)

    def deliver(self):
        """The next PUBLISH and its DUP flag, or None when there is nothing, or the window is full."""
        if not self.unsent and self.queue and len(self.in_flight) < self.window:
            publish = self.queue.popleft()
            publish.packet_id = self.next_id
            self.next_id = self.next_id % LAP + 1
            self.in_flight.append(publish)
            self.unsent.append(publish)
        if not self.unsent:
            return None
        publish = self.unsent.popleft()
        dup, publish.was_sent = publish.was_sent and self.marks_redeliveries, True
        return publish, dup

    def read_wire(self):
        """Read one packet; a barrier is answered with its mark."""
        kind, value = self.wire.popleft()
        if kind == "barrier":
            return value
        assert self.in_flight, "a PUBACK for nothing"
        assert self.in_flight[0].packet_id == value, "a PUBACK out of order"
        del self.in_flight[0]
        return None


class LedgerMachine(RuleBasedStateMachine):
    """A bridge with the real ledger and the real order of acknowledgements, between broker and database.

    A message is followed by its serial number, which neither ledger nor broker know. Some ids are spent on messages
    of a long quiet stretch, so that a run crosses laps of packet ids.
    """

    REDELIVERY = "marked"

    @initialize(first_id=st.sampled_from([1, 2, LAP - 20, LAP - 3, LAP]), window=st.integers(2, 12))
    def begin(self, first_id, window):
        self.broker = Broker(first_id=first_id, window=window, marks_redeliveries=self.REDELIVERY == "marked")
        self.database = Database()
        self.stored = Counter()  # by serial
        self.kept = set()  # serials that the broker took on and never forgot
        self.begin_process()
        self.connect(session_present=False)

    def begin_process(self):
        self.queue = []  # (serial, Message)
        self.in_hand = []  # [entry, [(serial, Message)], committed?]
        self.placed = {}  # position -> serial, as far as this process has seen
        self.ledger = Ledger(redelivery=self.REDELIVERY)
        self.acks = AckTracker()
        self.ledger.load(Claim(self.database.owner_epoch, self.database.session_epoch, self.database.claimed()))

    def is_kept(self, serial):
        """Whether it is durable: whatever the broker and this process forget, it will be stored."""
        return self.stored[serial] > 0

    def connect(self, *, session_present):
        self.broker.connect()
        self.ledger.connected(session_present=session_present)
        self.acks.open(lambda packet_ids: self.broker.wire.extend(("puback", each) for each in packet_ids))

    # -- the broker

    @rule(marks=st.lists(st.sampled_from([SAME, SAME, OTHER]), min_size=3, max_size=8))
    def publish(self, marks):
        for mark in marks:
            self.broker.publish(mark)
            self.kept.add(self.broker.serials)

    @precondition(lambda self: self.broker.unsent or self.broker.queue)
    @rule(count=st.integers(2, 12))
    def deliver(self, count):
        for _ in range(count):
            if delivery := self.broker.deliver():
                self.receive(*delivery)

    def receive(self, publish, dup):
        position, seen = self.ledger.place(publish.packet_id, publish.mark, dup=dup)
        waiting = [serial for serial, _ in self.queue] + [s for _, batch, _ in self.in_hand for s, _ in batch]
        if seen is Seen.NEW:
            assert publish.serial not in waiting, "a pending message is taken for a new one"
            assert not self.is_kept(publish.serial), "a committed message is taken for a new one"
            self.placed[position] = publish.serial
            self.queue.append((publish.serial, message(position, publish.mark)))
        elif seen is Seen.PENDING:
            assert publish.serial in waiting, "a new message is taken for a pending one"
            assert self.placed[position] == publish.serial
        elif seen is Seen.COMMITTED:
            assert self.is_kept(publish.serial), "a new message is taken for a committed one: it is lost"
        if seen is not Seen.RESENT:
            self.acks.add(position, publish.packet_id, finished=seen is Seen.COMMITTED)
        return seen

    @precondition(lambda self: self.REDELIVERY == "marked" and any(p.was_sent for p in self.broker.in_flight))
    @rule(data=st.data())
    def resend_on_a_timer(self, data):
        sent = [p for p in self.broker.in_flight if p not in self.broker.unsent]
        if sent:
            publish = data.draw(st.sampled_from(sent))
            assert self.receive(publish, True) is Seen.RESENT

    @precondition(lambda self: self.broker.wire)
    @rule(count=st.integers(1, 12))
    def read_acknowledgements(self, count):
        for _ in range(min(count, len(self.broker.wire))):
            mark = self.broker.read_wire()
            if mark is not None:
                self.ledger.prove(self.acks.prove(mark))

    @precondition(lambda self: self.acks.unproven)
    @rule()
    def send_barrier(self):
        self.broker.wire.append(("barrier", self.acks.mark()))

    # -- the workers

    def take(self, count):
        batch, self.queue = self.queue[:count], self.queue[count:]
        self.in_hand.append([self.ledger.entry([m for _, m in batch]), batch, False])

    @precondition(lambda self: self.queue)
    @rule(counts=st.lists(st.integers(1, 4), min_size=1, max_size=3))
    def take_batches(self, counts):
        for count in counts:
            if self.queue:
                self.take(count)

    @precondition(lambda self: any(not committed for *_, committed in self.in_hand))
    @rule(data=st.data())
    def commit(self, data):
        self.commit_one(data.draw(st.sampled_from([work for work in self.in_hand if not work[2]])))

    def commit_one(self, work):
        entry, batch, _ = work
        self.database.commit(entry)
        self.stored.update(serial for serial, _ in batch)
        work[2] = True

    @precondition(lambda self: any(committed for *_, committed in self.in_hand))
    @rule(data=st.data())
    def settle(self, data):
        self.settle_one(data.draw(st.sampled_from([work for work in self.in_hand if work[2]])))

    def settle_one(self, work):
        entry, batch, _ = work
        self.in_hand.remove(work)
        self.ledger.settled(entry, [m for _, m in batch])
        self.acks.finish([m.position for _, m in batch])

    @precondition(lambda self: self.in_hand)
    @rule(data=st.data())
    def commit_and_settle(self, data):
        work = data.draw(st.sampled_from(self.in_hand))
        if not work[2]:
            self.commit_one(work)
        self.settle_one(work)

    @precondition(lambda self: self.ledger.session_to_raise)
    @rule()
    def raise_session(self):
        if (epoch := self.ledger.session_to_raise) is not None:
            self.database.session_epoch = max(self.database.session_epoch, epoch)
            self.ledger.session_raised(epoch)

    @precondition(lambda self: self.ledger._prunable)
    @rule()
    def prune(self):
        for key in self.ledger.take_prunable():
            del self.database.rows[key]

    @rule(
        random=st.randoms(use_true_random=False),
        marks=st.lists(st.sampled_from([SAME, OTHER]), min_size=6, max_size=12),
    )
    def be_busy(self, random, marks):
        """Deliver, batch, commit and settle, each but a part of it and out of order, as several workers do."""
        self.publish(marks=marks)
        self.deliver(count=random.randint(3, 12))
        self.take_batches(counts=[random.randint(1, 4) for _ in range(3)])
        for work in random.sample(self.in_hand, len(self.in_hand)):
            if not work[2] and random.random() < 0.6:
                self.commit_one(work)
            if work[2] and random.random() < 0.7:
                self.settle_one(work)
        if self.acks.unproven and random.random() < 0.5:
            self.send_barrier()
        self.read_acknowledgements(count=random.randint(0, 12))

    # -- misfortunes

    @rule()
    def cut(self):
        self.acks.close()
        self.connect(session_present=True)
        self.deliver(count=12)

    @rule(luck=st.integers(1, 4))
    def lose_session(self, luck):
        if luck != 1:
            return
        self.acks.close()
        self.kept -= {p.serial for p in (*self.broker.queue, *self.broker.in_flight)}
        self.broker.lose_session()
        self.connect(session_present=False)

    @rule(data=st.data())
    def kill(self, data):
        # A crash between the loss of a session and its writing is the hole that the documents admit.
        self.raise_session()
        for work in self.in_hand:
            if not work[2] and data.draw(st.booleans(), label="commits although its process is dead"):
                self.commit_one(work)
        self.database.owner_epoch += 1
        self.begin_process()
        self.connect(session_present=True)
        self.deliver(count=12)

    # -- and quiet times

    def settle_everything(self):
        while (delivery := self.broker.deliver()) or self.queue or self.in_hand or self.broker.wire:
            if delivery:
                self.receive(*delivery)
            if self.queue:
                self.take(count=2000)
            for work in list(self.in_hand):
                if not work[2]:
                    self.commit_one(work)
                self.settle_one(work)
            if self.acks.unproven:
                self.send_barrier()
            self.read_acknowledgements(count=len(self.broker.wire))

    @precondition(lambda self: len(self.broker.in_flight) < 2 and not self.queue)
    @rule(length=st.sampled_from([5_000, 33_000, LAP - 10, LAP - 1, LAP, LAP + 3]))
    def live_through_a_quiet_stretch(self, length):
        """One message in a thousand is followed; the ids of the others are spent."""
        self.settle_everything()
        for step in range(0, length, 1000):
            self.broker.next_id = (self.broker.next_id + min(1000, length - step) - 2) % LAP + 1
            self.publish(marks=[SAME])
            self.settle_everything()

    @invariant()
    def nothing_is_stored_twice(self):
        assert all(times <= 1 for times in getattr(self, "stored", Counter()).values())

    @invariant()
    def what_the_broker_forgot_is_stored(self):
        if not hasattr(self, "broker"):
            return
        at_broker = {p.serial for p in (*self.broker.queue, *self.broker.in_flight)}
        assert not [serial for serial in self.kept - at_broker if not self.is_kept(serial)], "acknowledged and lost"

    def teardown(self):
        if not hasattr(self, "broker"):
            return
        self.cut()
        self.settle_everything()
        assert {serial for serial in self.kept if not self.stored[serial]} == set()
        self.publish(marks=[SAME])
        self.settle_everything()
        self.publish(marks=[SAME])
        self.settle_everything()


class UnmarkedLedgerMachine(LedgerMachine):
    """The same with a broker that never sets DUP."""

    REDELIVERY = "unmarked"


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestUnmarkedLedgerMachine = UnmarkedLedgerMachine.TestCase
TestUnmarkedLedgerMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


# -- whole runs


RUNS = st.tuples(st.integers(-6, 12), st.integers(1, 9), st.booleans(), st.booleans())
"""How far the first packet id is from the last one; how many follow one another; with DUP; all alike."""


class RunMachine(RuleBasedStateMachine):
    """A run that is placed at once gets the positions, and leaves the ledger, as if placed one by one.

    The one ledger gets whole runs, where it takes them; the other gets single deliveries. What is out of reach may be
    forgotten a little later within a run: so both are made to forget before they are compared.
    """

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("mqtt_bridge.ledger.LAP", 211)
        self.patch.setattr("mqtt_bridge.ledger.REACH", 80)
        self.patch.setattr("mqtt_bridge.ledger.SWEEP", 12)
        self.positions = []
        self.batches = []
        self.taken_at_once = 0

    def teardown(self):
        self.patch.undo()

    @initialize(
        redelivery=st.sampled_from(["marked", "unmarked", "renumbered"]),
        epoch=st.integers(1, 2),
        known=st.integers(0, 5),
        first=st.integers(1, 300),
    )
    def begin(self, redelivery, epoch, known, first):
        entries = [Entry(BatchKey(1, 1), epoch, first, SAME * known, (), False)] if known else []
        self.ledgers = loaded(*entries, redelivery=redelivery), loaded(*entries, redelivery=redelivery)

    @rule(run=RUNS)
    def receive(self, run):
        step, size, dup, alike = run
        last_id = self.ledgers[0]._last_id or 0
        ids = [(last_id + step + offset - 1) % 211 + 1 for offset in range(size)]
        marks = [SAME if alike else fingerprint(b"%d" % packet_id, b"", retain=False) for packet_id in ids]

        together = None if dup else self.ledgers[0].place_run(ids, marks)
        if together is None:
            places = [self.ledgers[0].place(each, mark, dup=dup) for each, mark in zip(ids, marks, strict=True)]
        else:
            self.taken_at_once += 1
            places = [(position, Seen.NEW) for position in together]
        others = [self.ledgers[1].place(each, mark, dup=dup) for each, mark in zip(ids, marks, strict=True)]

        assert places == others
        self.positions += [
            message(position, mark) for (position, seen), mark in zip(places, marks, strict=True) if seen is Seen.NEW
        ]

    @precondition(lambda self: self.positions)
    @rule(size=st.integers(1, 20))
    def commit(self, size):
        messages, self.positions = self.positions[:size], self.positions[size:]
        for ledger in self.ledgers:
            ledger.settled(ledger.entry(messages), messages)
        self.batches.append([each.position for each in messages])

    @precondition(lambda self: self.batches)
    @rule()
    def prove(self):
        positions = self.batches.pop(0)
        for ledger in self.ledgers:
            ledger.prove(positions)

    @rule(session_present=st.booleans())
    def reconnect(self, session_present):
        for ledger in self.ledgers:
            ledger.connected(session_present=session_present)

    @invariant()
    def they_are_the_same(self):
        if not hasattr(self, "ledgers"):
            return
        for ledger in self.ledgers:
            ledger._forget_out_of_reach()
        states = [
            {name: value for name, value in vars(ledger).items() if name != "_prunable"} for ledger in self.ledgers
        ]
        assert states[0] == states[1]
        assert sorted(self.ledgers[0]._prunable) == sorted(self.ledgers[1]._prunable)


TestRunMachine = RunMachine.TestCase
TestRunMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_run_that_goes_on_from_the_last_is_placed_at_once():
    ledger = fresh()

    assert ledger.place_run([1, 2, 3], [SAME] * 3) == range(1, 4)
    assert ledger.place_run([7, 8], [SAME] * 2) == range(7, 9)
    assert ledger.place_run([LAP // 2 + 8], [SAME]) == range(LAP // 2 + 8, LAP // 2 + 9)


@pytest.mark.parametrize("ids", [[8], [9, 11], [10, 9], [LAP, 1], [7, 8]])
def test_a_run_that_does_not_is_left_to_be_placed_one_by_one_and_nothing_is_changed(ids):
    ledger = fresh()
    ledger.place_run([1, 2, 3, 4, 5, 6, 7, 8], [SAME] * 8)
    before = {name: str(value) for name, value in vars(ledger).items()}

    assert ledger.place_run(ids, [SAME] * len(ids)) is None

    assert {name: str(value) for name, value in vars(ledger).items()} == before
