"""Devices that publish numbered readings, and the comparison of what was published with what the database holds.

A reading is a topic `{site}/{device}/telemetry` with the payload `{"seq": N}`; N is unique within the site.
"""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from typing import Self

import paho.mqtt.client as mqtt
import psycopg2
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from mqtt_bridge.tools.embedded import Broker
from tests.program import Program
from tests.waiting import wait_until

WINDOW = 500
"""Messages that a publisher has in flight at most."""


@dataclass
class Publisher:
    """One MQTT connection that publishes, and knows what the broker has acknowledged.

    QoS 1 by default. Through a restart of the broker take QoS 2: paho repeats a QoS 1 message whose PUBACK it has
    not seen, and to everybody else that is a new message.
    """

    broker: Broker
    site: str
    qos: int = 1
    devices: int = 20
    published: set[tuple[str, int]] = field(default_factory=set)
    """(device, seq) of every reading."""

    def __post_init__(self) -> None:
        self._count = 0
        self._lock = threading.Lock()
        self._acknowledged = 0  # guarded by the lock
        self._stop = threading.Event()
        self._loader: threading.Thread | None = None
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            f"publisher-{secrets.token_hex(4)}",
            clean_session=False,
            protocol=MQTTProtocolVersion.MQTTv311,
        )
        self._client.max_inflight_messages_set(WINDOW)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_publish = self._note

    def __enter__(self) -> Self:
        self._client.connect(self.broker.host, self.broker.port)
        self._client.loop_start()
        wait_until(self._client.is_connected, what="the publisher to connect")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._loader is not None:
            self._loader.join()
        self._client.disconnect()
        self._client.loop_stop()

    def _note(self, *_: object) -> None:
        with self._lock:
            self._acknowledged += 1

    def publish(self, count: int) -> None:
        """Publish so many readings, at once."""
        for _ in range(count):
            seq = len(self.published)
            device = f"d{seq % self.devices}"
            self.published.add((device, seq))
            self.send(f"{self.site}/{device}/telemetry", b'{"seq": %d}' % seq)

    def send(self, topic: str, payload: bytes, *, qos: int | None = None) -> None:
        """Publish anything, once the broker has room for it."""
        wait_until(lambda: self._count - self._acknowledged < WINDOW, timeout_s=60, what="PUBACKs for the publisher")
        self._client.publish(topic, payload, self.qos if qos is None else qos)
        self._count += 1

    def settle(self) -> None:
        """Wait until the broker has acknowledged all that was published."""
        wait_until(lambda: self._acknowledged == self._count, timeout_s=60, what="the last PUBACK")

    # -- in the background

    def begin(self, *, per_s: int = 1000) -> None:
        """Publish readings at this rate until `end`."""
        self._loader = threading.Thread(target=self._load, args=(per_s // 50,), name="load", daemon=True)
        self._loader.start()

    def _load(self, each: int) -> None:
        while not self._stop.wait(0.02):
            self.publish(each)

    def end(self) -> None:
        """Stop what `begin` began, and wait until the broker has acknowledged all."""
        self._stop.set()
        assert self._loader is not None
        self._loader.join()
        self.settle()

    def go_on(self, count: int) -> None:
        """Wait until what `begin` began has published so many more readings."""
        enough = len(self.published) + count
        wait_until(lambda: len(self.published) >= enough, timeout_s=60, what=f"{count} more readings")


@dataclass(frozen=True)
class Comparison:
    """What was published against what is stored."""

    stored: int
    missing: list[tuple[str, int]]
    duplicated: list[tuple[str, int]]
    unknown: list[tuple[str, int]]
    """Stored, but never published like that."""

    @property
    def exact(self) -> bool:
        """Whether everything is there exactly once."""
        return not (self.missing or self.duplicated or self.unknown)


def compare(database: str, published: set[tuple[str, int]]) -> Comparison:
    """Compare all readings with the metric `seq`."""
    rows = query(database, "SELECT device, value FROM readings WHERE metric = 'seq'")
    stored = Counter((device, int(value)) for device, value in rows)
    return Comparison(
        stored=stored.total(),
        missing=sorted(published - stored.keys()),
        duplicated=sorted(reading for reading, count in stored.items() if count > 1),
        unknown=sorted(stored.keys() - published),
    )


def wait_until_stored(
    database: str, published: set[tuple[str, int]], bridge: Program | None = None, *, timeout_s: float = 60.0
) -> Comparison:
    """Compare when as many readings are stored as were published, and the bridge (if given) holds no more."""

    def all_there() -> bool:
        enough = count_of_readings(database) >= len(published)
        return enough and (bridge is None or not bridge.messages()["in_flight"])

    wait_until(all_there, timeout_s=timeout_s, what=f"{len(published)} readings in the database", interval_s=0.1)
    return compare(database, published)


def count_of_readings(database: str) -> int:
    """Rows with the metric `seq`, -1 where the database does not answer."""
    try:
        return int(query(database, "SELECT count(*) FROM readings WHERE metric = 'seq'")[0][0])
    except psycopg2.Error:
        return -1


def query(database: str, statement: str, *arguments: object) -> list[tuple]:
    """Rows of a statement; committed where it changes something."""
    with closing(psycopg2.connect(database, connect_timeout=5)) as connection:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement, arguments or None)
            return cursor.fetchall() if cursor.description else []
