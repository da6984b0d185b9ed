"""The account against the places where the messages sit, under load, with outages, cuts and redeliveries.

Over and over the pipeline is held still by its own lock, and everything is counted by hand: the queue, the workers'
hands, the rows and the dead letters in the database. A message may be in two places only for the moment between its
commit and its settlement, in a worker's hands and in the database; never twice in one, and never nowhere.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import psycopg2
import pytest

from mqtt_bridge import subscriber
from mqtt_bridge.bridge import Bridge
from mqtt_bridge.model import Run
from mqtt_bridge.settings import load
from mqtt_bridge.tools.embedded import Broker
from tests.acceptance.traffic import Publisher
from tests.proxy import TcpProxy
from tests.waiting import wait_until

ROUNDS = 3
OUTCOMES = ("stored", "duplicate", "dead_lettered", "ignored", "dropped")
SITE = "account"


def payload(number: int) -> bytes:
    """The number, in a message that becomes a row, a dead letter (one of ten), or nothing (one of ten)."""
    texts = {0: '{"seq": %d, broken', 1: '{"ignored": null, "seq": [], "number%d": null}'}
    return (texts.get(number % 10, '{"seq": %d}') % number).encode()


def number_of(content: bytes) -> int:
    return int("".join(filter(str.isdigit, content.decode())))


class Places(NamedTuple):
    """Where the messages are at one moment, by number, counted there."""

    arrived: Counter[int]
    queued: Counter[int]
    in_hand: Counter[int]
    rows: Counter[int]
    letters: Counter[int]
    booked: dict[str, int]
    held: int
    owed: int

    def faults(self) -> list[str]:
        """What does not fit together."""
        held = self.queued + self.in_hand
        durable = self.rows + self.letters
        ignored = {number for number in self.arrived if number % 10 == 1}
        # A batch in which all is ignored leaves no trace: what comes again is ignored again, and is no duplicate.
        ignored_again = self.booked["ignored"] - len(ignored - held.keys())
        unsettled = sum(self.in_hand.values())
        statements = {
            "a message is held twice": max(held.values(), default=1) > 1,
            "a message is stored twice": max(durable.values(), default=1) > 1,
            "a message is queued although it is durable": bool(durable & self.queued),
            "a message is nowhere": bool(self.arrived.keys() - held.keys() - durable.keys() - ignored),
            "something is stored that never arrived": bool(durable.keys() - self.arrived.keys()),
            "received": self.booked["received"] != self.arrived.total(),
            "duplicate": self.booked["duplicate"] + ignored_again != self.arrived.total() - len(self.arrived),
            "ignored": not 0 <= ignored_again <= sum(self.arrived[number] - 1 for number in ignored),
            "stored": not 0 <= self.rows.total() - self.booked["stored"] <= unsettled,
            "dead_lettered": not 0 <= self.letters.total() - self.booked["dead_lettered"] <= unsettled,
            "what is settled is not what is durable": (
                self.booked["stored"] + self.booked["dead_lettered"] != len(durable.keys() - self.in_hand.keys())
            ),
            "dropped": self.booked["dropped"] != 0,
            "held": self.held != held.total(),
            "owed": self.owed != held.total(),
        }
        return [f"{what}: {self._summary()}" for what, wrong in statements.items() if wrong]

    def _summary(self) -> str:
        totals = {name: value.total() for name, value in self._asdict().items() if isinstance(value, Counter)}
        nowhere = (
            self.arrived.keys() - self.queued.keys() - self.in_hand.keys() - self.rows.keys() - self.letters.keys()
        )
        lost = sorted(number for number in nowhere if number % 10 != 1)[:10]
        both = sorted((self.rows + self.letters) & self.queued)[:10]
        twice = [number for number, count in (self.rows + self.letters).items() if count > 1][:10]
        return f"{totals}, {self.booked}, held {self.held}, nowhere {lost}, queued and durable {both}, twice {twice}"


class Auditor:
    """Takes what arrives down, and looks into every place, over and over."""

    def __init__(self, bridge: Bridge, database: str) -> None:
        self.audits = self.at_work = 0
        self.faults: list[str] = []
        self.arrivals: list[int] = []
        self._pipeline = bridge._pipeline
        self._connection = psycopg2.connect(database, application_name="auditor")
        self._connection.autocommit = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._audit, name="auditor")
        self._listen_in()

    def _listen_in(self) -> None:
        receive = self._pipeline.receive

        def note_and_receive(run: Run) -> None:
            self.arrivals.extend(map(number_of, run.payloads))
            receive(run)

        self._pipeline.receive = note_and_receive  # type: ignore[method-assign]

    def __enter__(self) -> Auditor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._connection.close()

    def _audit(self) -> None:
        while not self._stop.is_set() and not self.faults:
            places = self.look()
            self.audits += 1
            self.at_work += bool(places.queued or places.in_hand)
            self.faults += places.faults()

    def look(self) -> Places:
        """Hold the pipeline still, and count everything where it is. Workers may commit meanwhile, but not settle."""
        pipeline = self._pipeline
        with pipeline._lock:
            # A message that is on its way in has been noted, and waits for this lock.
            account = pipeline._account
            arrived = Counter(self.arrivals[: account.received])
            queued, in_hand = numbers(pipeline._queue), Counter()
            for messages in pipeline._in_hand.values():
                in_hand += numbers(messages)
            booked = {"received": account.received} | {
                outcome: account._outcomes[outcome]
                for outcome in ("stored", "duplicate", "dead_lettered", "ignored", "dropped")
            }
            return Places(arrived, queued, in_hand, *self._durable(), booked, pipeline._held, pipeline._owed)

    def _durable(self) -> tuple[Counter[int], Counter[int]]:
        with self._connection.cursor() as cursor:
            # One statement, one snapshot.
            cursor.execute(
                "SELECT array(SELECT value::bigint FROM readings), array(SELECT payload FROM mqtt_bridge.dead_letters)"
            )
            rows, letters = cursor.fetchone() or ((), ())
        return Counter(rows), Counter(number_of(bytes(letter)) for letter in letters)


def numbers(messages: object) -> Counter[int]:
    return Counter(number_of(message.payload) for message in messages)


class Load:
    """Publishes numbered messages, from the beginning to the end of a `with`."""

    def __init__(self, broker: Broker) -> None:
        self.count = 0
        self._publisher = Publisher(broker, SITE)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish, name="load")

    def __enter__(self) -> Load:
        self._publisher.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._publisher.__exit__()

    def end(self) -> None:
        """Publish no more; all that was published is at the broker."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
            self._publisher.settle()

    def _publish(self) -> None:
        while not self._stop.wait(0.01):
            for _ in range(10):
                self._publisher.send(f"{SITE}/d{self.count % 50}/telemetry", payload(self.count))
                self.count += 1


@pytest.fixture
def links(database: str, broker: Broker) -> Iterator[tuple[TcpProxy, TcpProxy]]:
    """To the database, and to the broker."""
    with closing(psycopg2.connect(database)) as connection:
        port = connection.info.port
    with TcpProxy("127.0.0.1", port) as to_database, TcpProxy(broker.host, broker.port) as to_broker:
        yield to_database, to_broker


def test_the_account_says_where_every_message_is_at_every_moment(database, broker, links, monkeypatch):
    monkeypatch.setattr(subscriber, "CONTESTED_CUTS", 1000)
    to_database, to_broker = links
    bridge = Bridge(load(settings(database, to_database, to_broker), env_file=None))
    running = threading.Thread(target=bridge.run, name="bridge")
    running.start()
    try:
        wait_until(lambda: not bridge.status()["reasons"], timeout_s=30, what="the bridge to be ready")
        with Auditor(bridge, database) as auditor, Load(broker) as published:
            for _ in range(ROUNDS):
                weather_a_storm(bridge, to_database, to_broker)
            published.end()
            wait_until(
                lambda: len(set(auditor.arrivals)) == published.count and not counts(bridge)["in_flight"],
                timeout_s=60,
                what="everything to be settled",
            )
            wait_until(lambda: auditor.audits >= 100 or auditor.faults, timeout_s=60, what="a hundred audits")
        last = look_at_what_is_shown(auditor, bridge, database)
    finally:
        bridge.request_stop()
        running.join(30)

    assert auditor.faults == []
    assert auditor.at_work >= 20
    assert last.faults() == []
    everything = set(range(published.count))
    assert set(last.rows) == {number for number in everything if number % 10 > 1}
    assert set(last.letters) == {number for number in everything if number % 10 == 0}
    assert last.booked["duplicate"] >= ROUNDS * 200


def weather_a_storm(bridge: Bridge, to_database: TcpProxy, to_broker: TcpProxy) -> None:
    """An outage of the database with a cut of the broker's link in it, then cuts of both while all flows."""
    to_database.refuse()
    to_database.cut()
    before = counts(bridge)
    wait_until(lambda: counts(bridge)["in_flight"] > 300, timeout_s=30, what="messages to be held")
    to_broker.cut()
    wait_until(lambda: counts(bridge)["duplicate"] >= before["duplicate"] + 200, timeout_s=30, what="redeliveries")
    to_database.accept()
    wait_until(lambda: counts(bridge)["stored"] > before["stored"] + 300, timeout_s=30, what="the backlog to be stored")
    for link in (to_database, to_broker, to_database):
        link.cut()
        so_far = counts(bridge)["stored"]
        wait_until(
            lambda least=so_far + 50: counts(bridge)["stored"] > least, timeout_s=30, what="progress after a cut"
        )


def counts(bridge: Bridge) -> dict[str, int]:
    messages: dict[str, int] = bridge.status()["messages"]
    return messages


def look_at_what_is_shown(auditor: Auditor, bridge: Bridge, database: str) -> Places:
    """One more look, in a moment in which no redelivery comes between it and what the status page shows."""
    auditor._connection = psycopg2.connect(database)

    def as_shown() -> Places | None:
        places = auditor.look()
        return places if counts(bridge) == places.booked | {"spooled": 0, "in_flight": 0} else None

    with closing(auditor._connection):
        return wait_until(as_shown, timeout_s=30, what="the status page to show what is there")


def settings(database: str, to_database: TcpProxy, to_broker: TcpProxy) -> dict[str, str]:
    port = psycopg2.extensions.parse_dsn(database)["port"]
    return {
        "DATABASE_URL": database.replace(f":{port}/", f":{to_database.port}/"),
        "MQTT_HOST": to_broker.host,
        "MQTT_PORT": str(to_broker.port),
        "MQTT_CLIENT_ID": "account",
        "MQTT_TOPICS": f"{SITE}/{{device}}/telemetry",
        "BRIDGE_BATCH_SIZE": "100",
        "HTTP_PORT": "0",
    }
