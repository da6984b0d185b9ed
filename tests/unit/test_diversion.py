"""Where batches go: a store and a disk that do what the test says, and a clock that it turns."""

from __future__ import annotations

import threading

import pytest
from structlog.testing import capture_logs

from mqtt_bridge import diversion as diversion_module
from mqtt_bridge.diversion import LINGER_S, OUTAGE_S, Diversion
from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.sink import Impatient, Stopped
from mqtt_bridge.spool import NoSpool, SpoolError
from mqtt_bridge.transactions import Batch, Stored
from tests.waiting import wait_until

STORED = Stored({"readings": 1})


def batch(number=1):
    return Batch(Entry(BatchKey(1, number), 1, number, b"12345678"), (), (), ())


class Disk(NoSpool):
    """Takes batches as long as there is room."""

    def __init__(self):
        self.kept = []
        self.room = 1000
        self.error = None

    @property
    def messages(self):
        return len(self.kept)

    @property
    def full(self):
        return len(self.kept) >= self.room

    def append(self, entry, _messages):
        if self.error:
            raise self.error
        if self.full:
            return False
        self.kept.append(entry.key.batch)
        return True


class Database:
    """Stores, or fails for `failing_s` already; then patience decides."""

    def __init__(self):
        self.failing_s = 0.0
        self.stored = []
        self.tries = 0

    def store(self, batch, *, patience_s):
        self.tries += 1
        while self.failing_s:
            if patience_s() <= 0:
                raise Impatient("no patience left")
            self.failing_s += 1
        self.stored.append(batch.entry.key.batch)
        return STORED


class House:
    def __init__(self, mode):
        self.database, self.disk = Database(), Disk()
        self.is_crowded = False
        self.diversion = Diversion(self.database, self.disk, mode=mode, crowded=lambda: self.is_crowded)

    def store(self, number=1):
        return self.diversion.store(batch(number))

    def beside(self, number=1):
        """Store in a thread of its own; what came of it, once it is there."""
        came = []

        def run():
            try:
                came.append(self.store(number))
            except Stopped as error:
                came.append(error)

        threading.Thread(target=run, daemon=True).start()
        return came

    def drain(self):
        del self.disk.kept[0]
        self.diversion.removed()


@pytest.fixture
def outage():
    return House("outage")


def test_while_the_database_stores_the_disk_is_not_used(outage):
    assert outage.store() is STORED
    assert outage.disk.kept == []


def test_an_outage_begins_after_ten_seconds_of_failure(outage):
    outage.database.failing_s = 1.0

    assert outage.store() is None

    assert outage.database.failing_s >= OUTAGE_S
    assert (outage.disk.kept, outage.database.stored) == ([1], [])


def test_a_database_that_comes_back_before_that_was_no_outage(outage):
    outage.database.failing_s = 1.0
    outage.database.store = lambda batch, patience_s: STORED if patience_s() > 0 else pytest.fail("no patience")

    assert outage.store() is STORED
    assert outage.disk.kept == []


def test_while_the_queue_is_crowded_a_failure_is_an_outage_at_once(outage):
    outage.is_crowded = True
    outage.database.failing_s = 0.001

    assert outage.store() is None
    assert outage.database.tries == 0


def test_a_crowded_queue_alone_is_no_outage(outage):
    outage.is_crowded = True

    assert outage.store() is STORED


def test_in_a_shutdown_a_failure_is_an_outage_at_once(outage):
    outage.diversion.hurry()
    outage.database.failing_s = 0.001

    assert outage.store() is None
    assert outage.database.tries == 0


def test_nothing_overtakes_what_is_on_the_disk(outage):
    outage.database.failing_s = OUTAGE_S
    outage.store(1)
    outage.database.failing_s = 0.0

    assert outage.store(2) is None
    outage.drain()
    outage.drain()

    assert outage.store(3) is STORED
    assert outage.database.stored == [3]


def test_an_outage_and_its_end_are_told_once(outage):
    with capture_logs() as logs:
        outage.database.failing_s = OUTAGE_S
        outage.store(1)
        outage.store(2)
        outage.drain()
        outage.drain()

    assert [log["event"] for log in logs] == [
        "the database is away: messages go to the disk",
        "the spool is empty: messages go to the database again",
    ]


def test_a_full_disk_holds_the_batch_until_there_is_room(outage):
    outage.database.failing_s = OUTAGE_S
    outage.disk.room = 1
    outage.store(1)
    came = outage.beside(2)
    wait_until(lambda: any(outage.diversion.turns(t.ident) for t in threading.enumerate() if t.daemon), what="a try")
    assert came == []

    outage.drain()

    wait_until(lambda: came, what="the second batch to find room")
    assert came == [None]
    assert outage.disk.kept == [2]


def test_what_an_empty_disk_has_no_room_for_is_stored_directly():
    always = House("always")
    always.disk.room = 0

    assert always.store() is STORED


def test_a_disk_without_room_and_a_database_that_fails_are_tried_in_turn(monkeypatch, outage):
    monkeypatch.setattr(diversion_module, "ROOM_AGAIN_S", 0.0)
    outage.disk.room = 0
    outage.database.failing_s = OUTAGE_S
    came = outage.beside()
    wait_until(lambda: outage.database.tries > 3, what="some tries")

    outage.disk.room = 1

    wait_until(lambda: came, what="the end")
    assert came == [None]


def test_always_goes_to_the_disk_even_when_the_database_stores():
    always = House("always")

    assert always.store() is None
    assert (always.disk.kept, always.database.stored) == ([1], [])


def test_off_takes_nothing_and_waits_until_what_is_found_there_is_stored():
    off = House("off")
    off.disk.kept = [1]
    came = off.beside(2)
    wait_until(lambda: any(off.diversion.turns(t.ident) for t in threading.enumerate() if t.daemon), what="a try")
    assert came == []

    off.drain()

    wait_until(lambda: came, what="the batch to be stored")
    assert (came, off.disk.kept) == ([STORED], [])


def test_off_without_a_disk_waits_for_the_database_for_ever():
    diversion = Diversion(Database(), NoSpool(), mode="off", crowded=lambda: True)

    assert diversion.patience_s() == float("inf")
    assert not diversion.diverts
    assert diversion.store(batch()) is STORED


def test_an_error_that_leaves_the_fate_of_a_batch_unknown_is_nobody_elses_to_store():
    always = House("always")
    always.disk.error = SpoolError("the disk is gone")

    with pytest.raises(SpoolError):
        always.store()

    assert always.database.tries == 0


def test_stopping_frees_whoever_waits():
    off = House("off")
    off.disk.kept = [1]
    came = off.beside()

    off.diversion.stop()

    wait_until(lambda: came, what="the end of the wait")
    assert isinstance(came[0], Stopped)
    with pytest.raises(Stopped):
        off.diversion.wait_for_batch()


def test_batches_may_grow_only_while_an_outage_makes_nobody_wait_for_them(outage):
    assert outage.diversion.linger_s == 0.0
    outage.database.failing_s = OUTAGE_S
    assert outage.diversion.linger_s == LINGER_S
    outage.diversion.hurry()
    assert outage.diversion.linger_s == 0.0


def test_with_always_batches_may_grow_while_the_database_is_away():
    always = House("always")
    assert always.diversion.linger_s == 0.0

    always.database.failing_s = 1.0

    assert always.diversion.linger_s == LINGER_S


def test_waiting_for_an_empty_disk_gives_up_at_once_while_the_database_fails(outage):
    outage.disk.kept = [1]
    outage.database.failing_s = 1.0
    assert not outage.diversion.wait_until_empty(3600)

    outage.database.failing_s = 0.0
    threading.Timer(0.01, outage.drain).start()
    assert outage.diversion.wait_until_empty(60)
