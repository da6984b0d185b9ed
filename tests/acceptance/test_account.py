"""The account balances at every moment, and at the end the database holds what it says."""

from __future__ import annotations

import random
import threading

from mqtt_bridge.tools.embedded import Broker
from tests.acceptance.traffic import Publisher, compare, query
from tests.program import Program
from tests.proxy import TcpProxy
from tests.waiting import wait_until

DEVICES = 200
ROUNDS = 60
READERS = 4
OUTCOMES = ("stored", "duplicate", "dead_lettered", "ignored", "spooled", "dropped", "in_flight")

PAYLOADS = (
    # Payload, rows, what becomes of it.
    (b'{"temperature": 21.5, "humidity": 40}', 2, "stored"),
    (b"7", 1, "stored"),
    (b'{"state": "on", "level": null}', 1, "stored"),
    (b"{}", 0, "ignored"),
    (b"", 0, "ignored"),
    (b'{"broken": ', 0, "dead_lettered"),
    (b"\xff\xfe", 0, "dead_lettered"),
)


class Reader:
    """Reads `/api/status` over and over; keeps what does not balance."""

    def __init__(self, bridge: Program, stop: threading.Event) -> None:
        self.reads = 0
        self.unbalanced: list[dict[str, int]] = []
        self.backwards: list[tuple[int, int]] = []
        self._bridge = bridge
        self._stop = stop
        self.thread = threading.Thread(target=self._read, name="reader")
        self.thread.start()

    def _read(self) -> None:
        last = 0
        while not self._stop.is_set():
            messages = self._bridge.messages()
            self.reads += 1
            if messages["received"] != sum(messages[outcome] for outcome in OUTCOMES):
                self.unbalanced.append(messages)
            if messages["received"] < last:
                self.backwards.append((last, messages["received"]))
            last = messages["received"]


def publish_mixture(broker: Broker, site: str) -> dict[str, int]:
    """Every device publishes at random; returns what has to become of it, and the rows."""
    choice = random.Random(7)
    expected = {"received": 0, "rows": 0, "stored": 0, "ignored": 0, "dead_lettered": 0}
    with Publisher(broker, site) as publisher:
        for _ in range(ROUNDS):
            for device in range(DEVICES):
                payload, rows, outcome = choice.choice(PAYLOADS)
                publisher.send(f"{site}/d{device}/telemetry", payload, qos=choice.choice((0, 1)))
                expected["received"] += 1
                expected["rows"] += rows
                expected[outcome] += 1
        publisher.settle()
    return expected


def test_thousands_of_reads_balance_while_200_devices_publish_good_and_bad(make_bridge, database, broker, site):
    bridge = make_bridge(database, broker).start().wait_until_ready()
    stop = threading.Event()
    readers = [Reader(bridge, stop) for _ in range(READERS)]

    try:
        expected = publish_mixture(broker, site)
        messages = bridge.wait_for_outcomes(expected["received"])
        wait_until(lambda: sum(reader.reads for reader in readers) >= 2000, timeout_s=60, what="2000 reads")
    finally:
        stop.set()
        for reader in readers:
            reader.thread.join()

    assert [reader.unbalanced for reader in readers] == [[]] * READERS
    assert [reader.backwards for reader in readers] == [[]] * READERS
    assert messages == {
        "received": DEVICES * ROUNDS,
        "stored": expected["stored"],
        "ignored": expected["ignored"],
        "dead_lettered": expected["dead_lettered"],
        "duplicate": 0,
        "spooled": 0,
        "dropped": 0,
        "in_flight": 0,
    }
    assert bridge.status()["rows_stored"] == expected["rows"]
    assert query(database, "SELECT count(*) FROM readings") == [(expected["rows"],)]
    assert query(database, "SELECT count(*) FROM mqtt_bridge.dead_letters") == [(expected["dead_lettered"],)]


def test_reads_balance_while_both_links_are_cut_and_at_the_end_the_database_holds_what_they_say(
    make_bridge, own_postgres, broker, site
):
    postgres = own_postgres()
    with TcpProxy("127.0.0.1", postgres.port) as to_database, TcpProxy(broker.host, broker.port) as to_broker:
        through = postgres.dsn().replace(f":{postgres.port}/", f":{to_database.port}/")
        bridge = make_bridge(through, to_broker, MQTT_PROTOCOL="3.1.1").start().wait_until_ready()
        stop = threading.Event()
        readers = [Reader(bridge, stop) for _ in range(READERS)]

        try:
            with Publisher(broker, site) as publisher:
                for _ in range(2):  # a third short connection in a row would look like a contested client id
                    before = bridge.messages()
                    to_database.refuse()
                    to_database.cut()
                    publisher.publish(1000)
                    wait_until(lambda: bridge.messages()["in_flight"] > 500, timeout_s=30, what="messages to be held")
                    to_broker.cut()
                    wait_until(lambda was=before: redelivered(bridge, was), timeout_s=30, what="redeliveries")
                    to_database.accept()
                    wait_until(
                        lambda was=before: all_settled(bridge, was["stored"] + 1000),
                        timeout_s=60,
                        what="all to be settled",
                    )
                messages = bridge.messages()
        finally:
            stop.set()
            for reader in readers:
                reader.thread.join()

    assert [reader.unbalanced for reader in readers] == [[]] * READERS
    assert [reader.backwards for reader in readers] == [[]] * READERS
    assert messages["stored"] == 2000
    assert messages["received"] == 2000 + messages["duplicate"]
    assert messages["duplicate"] >= 500
    assert compare(postgres.dsn(), publisher.published).exact


def redelivered(bridge: Program, before: dict[str, int]) -> bool:
    return bridge.messages()["duplicate"] >= before["duplicate"] + 250


def all_settled(bridge: Program, distinct: int) -> dict[str, int] | None:
    messages = bridge.messages()
    return messages if messages["stored"] >= distinct and not messages["in_flight"] else None


def test_a_flood_of_qos_0_is_dropped_and_counted_while_qos_1_is_kept(make_bridge, own_postgres, broker, site):
    postgres = own_postgres()
    bridge = make_bridge(postgres.dsn(), broker, BRIDGE_QUEUE_SIZE=200).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        postgres.stop()
        for number in range(1000):
            publisher.send(f"{site}/flood/telemetry", b"%d" % number, qos=0)
        wait_until(lambda: bridge.messages()["received"] == 1000, what="the flood to arrive")
        publisher.publish(100)
        publisher.settle()
        wait_until(lambda: bridge.messages()["received"] == 1100, what="all messages to arrive")
        assert bridge.messages()["dropped"] == 800
        assert bridge.messages()["in_flight"] == 300
        assert bridge.status()["broker"]["reconnects"] == 0
        postgres.start()

    messages = bridge.wait_for_outcomes(1100)
    assert (messages["stored"], messages["dropped"]) == (300, 800)
    assert query(postgres.dsn(), "SELECT count(*) FROM readings WHERE device <> 'flood'") == [(100,)]
