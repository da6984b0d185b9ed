"""The ledger of a bridge whose batches may take the way over the disk."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from mqtt_bridge.acks import AckTracker
from mqtt_bridge.ledger import REACH, BatchKey, BatchKeys, Claim, Entry, Ledger, Seen
from mqtt_bridge.model import Message
from tests.unit.test_ledger import SAME, Database, LedgerMachine


def message(position):
    return Message(b"t", b"", 1, False, 0, position, SAME)


def spooled(ledger, *packet_ids):
    """Receive these, and put them on the disk as one batch; its entry."""
    positions = [ledger.place(packet_id, SAME, dup=False)[0] for packet_id in packet_ids]
    messages = [message(position) for position in positions]
    entry = ledger.entry(messages)
    ledger.spooled(entry, messages)
    return entry


def fresh():
    ledger = Ledger()
    ledger.load(Claim(1, 1, ()))
    return ledger


def test_what_is_on_the_disk_counts_as_committed():
    ledger = fresh()
    spooled(ledger, 1, 2)
    ledger.connected(session_present=True)

    assert [ledger.place(packet_id, SAME, dup=True)[1] for packet_id in (1, 2, 3)] == [
        Seen.COMMITTED, Seen.COMMITTED, Seen.NEW
    ]  # fmt: skip


def test_the_row_of_a_batch_on_the_disk_is_not_pruned_before_the_batch_has_left_it():
    ledger = fresh()
    entry = spooled(ledger, 1, 2)

    ledger.prove([1, 2])
    before = ledger.take_prunable()
    ledger.drained(entry)

    assert (before, ledger.take_prunable()) == ((), (entry.key,))


def test_a_drained_row_is_not_pruned_before_its_acknowledgements_are_proven():
    ledger = fresh()
    entry = spooled(ledger, 1, 2)

    ledger.drained(entry)
    before = ledger.take_prunable()
    ledger.prove([1, 2])

    assert (before, ledger.take_prunable()) == ((), (entry.key,))


def test_of_a_long_outage_only_what_can_come_again_is_kept_in_memory():
    ledger = fresh()
    entries = [spooled(ledger, packet_id) for packet_id in range(1, 101)]

    ledger.prove(range(1, 101))

    assert sum(len(kept) for kept in vars(ledger).values() if isinstance(kept, (dict, set, list))) == 0
    for entry in entries:
        ledger.drained(entry)
    assert len(ledger.take_prunable()) == 100


def test_a_lost_session_prunes_no_row_of_a_batch_on_the_disk():
    ledger = fresh()
    entry = spooled(ledger, 1)

    ledger.connected(session_present=False)
    before = ledger.take_prunable()
    ledger.drained(entry)

    assert (before, ledger.take_prunable()) == ((), (entry.key,))


def test_a_session_counts_as_raised_only_when_the_batch_that_raises_it_has_left_the_disk():
    ledger = fresh()
    ledger.connected(session_present=False)
    entry = spooled(ledger, 1)

    assert entry.raises_session
    assert ledger.session_to_raise == 2
    ledger.drained(entry)
    assert ledger.session_to_raise is None


def test_a_start_knows_what_is_on_the_disk():
    first = fresh()
    entries = [spooled(first, 1, 2), spooled(first, 3)]

    second = Ledger()
    second.load(Claim(2, 1, ()), entries)

    assert [second.place(packet_id, SAME, dup=True)[1] for packet_id in (1, 2, 3, 4)] == [
        Seen.COMMITTED, Seen.COMMITTED, Seen.COMMITTED, Seen.NEW
    ]  # fmt: skip


def test_of_a_long_spool_only_what_can_come_again_is_kept_in_memory():
    batch = 1000
    entries = [Entry(BatchKey(1, n), 1, n * batch + 1, SAME * batch) for n in range(100)]

    ledger = Ledger()
    ledger.load(Claim(2, 1, ()), entries)

    assert len(ledger._committed) <= REACH + 1
    assert ledger.take_prunable() == ()
    for entry in entries[:10]:
        ledger.drained(entry)
    assert set(ledger.take_prunable()) == {entry.key for entry in entries[:10]}


def test_a_set_of_very_many_keys_tells_each_from_its_neighbours():
    keys = BatchKeys()
    inside = {BatchKey(epoch, number) for epoch in (3, 4) for number in (1, 2, 1023, 1024, 1025, 5_000_000)}

    for key in inside:
        keys.add(key)

    around = {BatchKey(epoch + a, number + b) for epoch, number in inside for a in (-1, 0, 1) for b in (-1, 0, 1)}
    assert {key for key in around if key in keys} == inside
    assert (3, 1) not in keys


def test_entries_of_an_earlier_session_on_the_disk_match_nothing():
    entry = Entry(BatchKey(1, 1), 1, 1, SAME)

    ledger = Ledger()
    ledger.load(Claim(2, 2, ()), [entry])

    assert ledger.place(1, SAME, dup=True)[1] is Seen.NEW


ON_DISK = "on the disk"


class ForgivingDatabase(Database):
    """A claim may have deleted a row already that a batch on the disk wants to prune."""

    def commit(self, entry):
        pruned = tuple(key for key in entry.pruned if key in self.rows)
        super().commit(entry._replace(pruned=pruned))
        self.rows[entry.key] = entry

    def claimed_beside(self, entries):
        """What the next owner reads, who has these batches on its disk."""
        keys = {entry.key for entry in entries}
        self.session_epoch = max([self.session_epoch, *(entry.session_epoch for entry in entries)])
        spared = {key: row for key, row in self.rows.items() if key in keys}
        claimed = [row for row in self.claimed() if row.key not in keys]
        self.rows |= spared
        return tuple(claimed)


class SpoolingLedgerMachine(LedgerMachine):
    """Batches go to the disk at any moment, also when nobody knows whether they were committed."""

    def begin_process(self):
        if not hasattr(self, "disk"):
            self.disk = []  # [entry, [(serial, Message)]], oldest first; outlives every process
            self.database = ForgivingDatabase()
        self.queue, self.in_hand, self.placed = [], [], {}
        self.ledger = Ledger(redelivery=self.REDELIVERY)
        self.acks = AckTracker()
        entries = [entry for entry, _ in self.disk]
        claimed = self.database.claimed_beside(entries)
        self.ledger.load(Claim(self.database.owner_epoch, self.database.session_epoch, claimed), entries)

    def is_kept(self, serial):
        return super().is_kept(serial) or any(serial == s for _, batch in self.disk for s, _ in batch)

    @precondition(lambda self: any(fate != ON_DISK for *_, fate in self.in_hand))
    @rule(data=st.data(), told=st.booleans())
    def divert(self, data, told):
        """To the disk, whether it was committed or not. It may be drained before its worker has told of it."""
        work = data.draw(st.sampled_from([work for work in self.in_hand if work[2] != ON_DISK]))
        entry, batch, _ = work
        work[2] = ON_DISK
        self.disk.append((entry, batch))
        if told:
            self.settle_one(work)

    def settle_one(self, work):
        if work[2] != ON_DISK:
            super().settle_one(work)
            return
        entry, batch, _ = work
        self.in_hand.remove(work)
        self.ledger.spooled(entry, [m for _, m in batch])
        self.acks.finish([m.position for _, m in batch])

    @precondition(lambda self: self.disk)
    @rule(removed=st.booleans())
    def drain(self, removed):
        """Commit the oldest batch, under its own key; a crash may come before it is removed."""
        entry, batch = self.disk[0]
        if entry.key not in self.database.rows:
            self.database.commit(entry)
            self.stored.update(serial for serial, _ in batch)
        if removed:
            del self.disk[0]
            for work in [work for work in self.in_hand if work[0] == entry]:
                self.settle_one(work)  # the drainer waits for the worker that put it there
            self.ledger.drained(entry)

    @precondition(lambda self: self.ledger.session_to_raise)
    @rule()
    def raise_session(self):
        # What a batch on the disk knows survives a crash without the database.
        if not any(entry.session_epoch == self.ledger.session_to_raise for entry, _ in self.disk):
            super().raise_session()

    @precondition(lambda self: self.ledger._prunable)
    @rule()
    def prune(self):
        for key in self.ledger.take_prunable():
            self.database.rows.pop(key, None)

    def settle_everything(self):
        super().settle_everything()
        while self.disk:
            self.drain(removed=True)


TestSpoolingLedgerMachine = SpoolingLedgerMachine.TestCase
TestSpoolingLedgerMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
