"""From the disk into the database: a real spool, and a store that does what the test says."""

from __future__ import annotations

import threading

import pytest
from structlog.testing import capture_logs

from mqtt_bridge import drainer as drainer_module
from mqtt_bridge.batches import Batches
from mqtt_bridge.diversion import Diversion
from mqtt_bridge.drainer import Drainer
from mqtt_bridge.errors import Fenced
from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.model import Message
from mqtt_bridge.ownership import AlreadyCommitted
from mqtt_bridge.sink import Stopped
from mqtt_bridge.spool import Spool, SpoolError
from mqtt_bridge.transactions import Stored
from tests.unit.test_pipeline import Translator
from tests.waiting import wait_until


def entry(number):
    return Entry(BatchKey(1, number), 1, number, b"12345678")


def messages(*payloads):
    return [Message(b"t", payload, 1, False, 0, 1, b"12345678") for payload in payloads]


class Store:
    """Keeps what it is given; `error` is raised instead, once."""

    failing_s = 0.0

    def __init__(self):
        self.transactions = []
        self.taken = set()
        """Batches that were committed by a try of which nobody had heard."""
        self.error = None

    @property
    def keys(self):
        return [key for keys in self.transactions for key in keys]

    def store(self, batch):
        error, self.error = self.error, None
        if error is not None:
            raise error
        taken = {key.batch for key in batch.keys} & self.taken
        if taken and batch.also:
            raise AlreadyCommitted
        self.transactions.append([key.batch for key in batch.keys])
        return Stored({"readings": len(batch.translated)})


class House:
    def __init__(self, tmp_path):
        self.spool = Spool(tmp_path, client_id="c", max_bytes=1 << 20)
        self.spool.open()
        self.store = Store()
        self.drained = []
        self.fatal = []
        self.diversion = Diversion(self.store, self.spool, mode="always", crowded=lambda: False)
        self.drainer = Drainer(
            self.spool,
            self.diversion,
            self.store,
            Batches(Translator()),
            on_drained=self.note,
            on_fatal=self.fatal.append,
        )

    def note(self, entries, work, _stored):
        self.drained.append(([entry.key.batch for entry in entries], work, self.spool.messages))

    def put(self, number, *payloads):
        self.spool.append(entry(number), messages(*payloads))

    def close(self):
        self.diversion.stop()
        assert self.drainer.stop(10)
        self.spool.close()


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path)
    yield house
    house.close()


def test_the_oldest_batches_come_first_and_are_settled_when_they_are_off_the_disk(house, monkeypatch):
    monkeypatch.setattr(drainer_module, "TOGETHER_MESSAGES", 1)
    house.put(1, b"a")
    house.put(2, b"b", b"c")

    house.drainer.start()

    wait_until(lambda: len(house.drained) == 2, what="both batches")
    assert [(numbers, left) for numbers, _, left in house.drained] == [([1], 2), ([2], 0)]
    assert house.store.keys == [1, 2]


def test_small_batches_share_a_transaction(house, monkeypatch):
    monkeypatch.setattr(drainer_module, "TOGETHER_MESSAGES", 3)
    for number in range(1, 6):
        house.put(number, b"a")

    house.drainer.start()

    wait_until(lambda: len(house.drained) == 2, what="both transactions")
    assert house.store.transactions == [[1, 2, 3], [4, 5]]
    assert [len(work.messages) for _, work, _ in house.drained] == [3, 2]


def test_batches_with_large_payloads_do_not(house, monkeypatch):
    monkeypatch.setattr(drainer_module, "TOGETHER_BYTES", 10)
    for number in range(1, 4):
        house.put(number, b"1" * 11)

    house.drainer.start()

    wait_until(lambda: len(house.drained) == 3, what="three transactions")
    assert house.store.transactions == [[1], [2], [3]]


def test_where_one_of_several_was_committed_before_each_is_tried_alone(house):
    for number in range(1, 4):
        house.put(number, b"a")
    house.store.taken = {2}

    house.drainer.start()

    wait_until(lambda: len(house.drained) == 3, what="three transactions")
    assert house.store.transactions == [[1], [2], [3]]
    assert house.spool.messages == 0


def test_messages_are_translated_when_they_are_drained(house):
    house.put(1, b"a", b"broken", b"ignored", b"bug")

    with capture_logs():
        house.drainer.start()
        wait_until(lambda: house.drained, what="the batch")

    work = house.drained[0][1]
    assert len(work.translated) == 1
    assert [letter.message.payload for letter in work.dead_letters] == [b"broken", b"bug"]
    assert work.tally.ignored == {"no_values": 1}


def test_a_batch_of_which_nothing_is_left_to_store_still_leaves_its_key(house):
    house.put(1, b"ignored")

    house.drainer.start()

    wait_until(lambda: house.drained, what="the batch")
    assert house.store.keys == [1]


def test_a_disk_that_does_not_let_a_batch_go_is_asked_again_and_the_batch_not_stored_again(house, monkeypatch):
    monkeypatch.setattr(drainer_module, "DISK_AGAIN_S", 0.0)
    refusals = iter([SpoolError("the disk is read-only")] * 3)
    remove = house.spool.remove

    def refuse(sequence):
        for error in refusals:
            raise error
        remove(sequence)

    monkeypatch.setattr(house.spool, "remove", refuse)
    house.put(1, b"a")

    with capture_logs() as logs:
        house.drainer.start()
        wait_until(lambda: house.drained, what="the batch to leave")

    assert house.store.keys == [1]
    assert [log["event"] for log in logs] == ["the disk is read-only"]


def test_who_waits_for_an_empty_disk_is_told(house):
    house.put(1, b"a")
    told = threading.Event()

    def wait():
        if house.diversion.wait_until_empty(3600):
            told.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    wait_until(lambda: house.diversion._changed._waiters, what="somebody to wait")
    house.drainer.start()

    assert told.wait(30)


def test_a_stop_leaves_the_batch_on_the_disk(house):
    house.store.error = Stopped("the bridge stops")
    house.put(1, b"a")

    house.drainer.start()

    wait_until(lambda: not house.drainer.alive, what="the end of the thread")
    assert (house.spool.messages, house.fatal) == (1, [])


@pytest.mark.parametrize("error", [Fenced("another process"), RuntimeError("a bug")])
def test_what_it_cannot_survive_is_told_and_leaves_the_batch_on_the_disk(house, error):
    house.store.error = error
    house.put(1, b"a")

    with capture_logs():
        house.drainer.start()
        wait_until(lambda: not house.drainer.alive, what="the end of the thread")

    assert house.fatal == [error]
    assert house.spool.messages == 1


def test_it_can_be_stopped_without_ever_having_been_started(tmp_path):
    house = House(tmp_path)

    assert house.drainer.stop(1)
    assert not house.drainer.alive
    assert house.drainer.ident is None
    house.spool.close()
