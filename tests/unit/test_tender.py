"""The tender without servers: what it writes, and from when on."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import psycopg2
import pytest

from mqtt_bridge.account import Account
from mqtt_bridge.errors import Fenced
from mqtt_bridge.ledger import BatchKey, Claim
from mqtt_bridge.rates import Rates
from mqtt_bridge.retained import Remembered, Retained
from mqtt_bridge.settings import Settings
from mqtt_bridge.tender import Tender
from tests.waiting import wait_until

FILTERS = frozenset({"a/+"})


class Sink:
    """Writes down what it is asked to note, or raises `error`."""

    def __init__(self) -> None:
        self.noted: list[object] = []
        self.pruned: list[BatchKey] = []
        self.probes = 0
        self.error: Exception | None = None

    def probe(self) -> None:
        self.probes += 1
        self._do()

    def note_retained(self, retained):
        self._do()
        self.noted.append(retained)

    def note_subscriptions(self, filters):
        self._do()
        self.noted.append(filters)

    def prune(self, keys):
        self._do()
        self.pruned += keys

    def run(self, _action):
        self._do()
        return 0

    def _do(self) -> None:
        if self.error:
            raise self.error


class Pipeline:
    """Has ledger rows to delete."""

    session_to_raise = None
    holds_replays = False

    def __init__(self) -> None:
        self.prunable = (BatchKey(1, 1),)

    def balance(self):
        return Account().balance(in_flight=0, queue_depth=0, queue_bytes=0, oldest_us=None)

    def take_prunable(self):
        keys, self.prunable = self.prunable, ()
        return keys

    def give_back(self, keys):
        self.prunable = tuple(keys)


class House:
    """A tender and what is around it; `never` has it withhold what is retained."""

    def __init__(self) -> None:
        self.sink, self.pipeline, self.fenced = Sink(), Pipeline(), []
        self.subscriber = SimpleNamespace(subscriptions=FILTERS)
        self.tender = Tender(
            Settings(),
            sink=self.sink,
            pipeline=self.pipeline,
            subscriber=self.subscriber,
            retained=Retained(FILTERS, policy="never", is_v5=True),
            rates=Rates(),
            on_fenced=self.fenced.append,
        )

    def begin(self) -> None:
        self.tender.begin(Claim(owner_epoch=1, session_epoch=1, entries=(), subscriptions=FILTERS))

    def go_round(self) -> None:
        """At least one whole round from now on."""
        before = self.tender.turns
        wait_until(lambda: self.tender.wake() or self.tender.turns > before + 2, what="the tender")


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.tender.stop()


def test_nothing_is_noted_before_the_client_id_is_claimed(house, monkeypatch):
    monkeypatch.setattr("mqtt_bridge.tender.REPORT_EVERY_S", 0.0)  # everything is due at once
    house.tender.start()

    house.go_round()

    assert house.sink.noted == []
    assert house.sink.probes


def test_what_is_withheld_is_noted_when_the_client_id_is_claimed_and_once(house, monkeypatch):
    monkeypatch.setattr("mqtt_bridge.tender.REPORT_EVERY_S", 0.0)
    house.tender.start()

    house.begin()
    assert house.sink.noted == [Remembered(withheld=FILTERS)]
    house.go_round()

    assert house.sink.noted == [Remembered(withheld=FILTERS)]


def test_what_could_not_be_noted_is_tried_again(house, monkeypatch):
    monkeypatch.setattr("mqtt_bridge.tender.REPORT_EVERY_S", 0.0)
    house.sink.error = psycopg2.OperationalError("away")
    house.begin()
    assert house.sink.noted == []

    house.sink.error = None
    assert not house.tender.tidy_up(0)
    house.tender.start()

    wait_until(lambda: house.sink.noted, what="the note")
    assert house.sink.noted == [Remembered(withheld=FILTERS)]


def test_the_last_round_notes_and_prunes_whatever_is_due(house):
    house.begin()
    house.subscriber.subscriptions = FILTERS | {"b/+"}
    house.tender.start()

    assert house.tender.tidy_up(10)

    assert house.sink.noted[1:] == [FILTERS | {"b/+"}]
    assert house.sink.pruned == [BatchKey(1, 1)]


def test_ledger_rows_that_cannot_be_deleted_are_given_back(house):
    house.begin()
    house.sink.error = psycopg2.OperationalError("away")
    house.tender.start()

    assert house.tender.tidy_up(10)

    assert house.pipeline.prunable == (BatchKey(1, 1),)


def test_whoever_was_cut_off_hears_that_the_client_id_has_another_owner(house):
    house.sink.error = Fenced("another process has taken over this client id")
    house.tender.start()

    house.tender.ask_for_the_owner()

    wait_until(lambda: house.fenced, what="the tender to say so")


def test_it_survives_whatever_a_duty_raises(house):
    house.sink.error = ValueError("a bug")
    house.tender.start()

    house.tender.ask_for_the_owner()
    wait_until(lambda: house.sink.probes, what="the probe")
    house.go_round()

    assert house.tender.alive
