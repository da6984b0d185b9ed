"""Publishes numbered (or identical) readings, open-loop at a rate, and knows what it has published.

paho repeats a QoS 1 message whose PUBACK it has not seen when it reconnects, and to everybody else that is a new
message. So the publisher has a link of its own, which is never cut, and leaves before the broker is restarted, when
every PUBACK has come. Should it be cut all the same, what it may have repeated is counted in `repeated`.

Threads: one of its own publishes, paho's reads the PUBACKs, the run's starts, pauses and asks.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple, Self

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from mqtt_bridge.tools.embedded import Broker
from tests.chaos.schedule import Parameters
from tests.waiting import wait_until

DEVICES = 20
CYCLE = 65_535
"""Packet ids run from 1 to this: with cyclic payloads, a packet id that comes again brings the same payload."""
WINDOW = 500
"""Messages in flight at most."""
TICK_S = 0.01
END = "end"
"""The device that publishes after all others: the last message, and what the last process is counted with."""


class Reading(NamedTuple):
    """One message, as it is published and as it has to be stored."""

    device: str
    value: int
    qos: int


def reading(number: int, parameters: Parameters) -> Reading:
    """The message with this number, from 0."""
    value = {"unique": number, "constant": 0, "cyclic": number % CYCLE}[parameters.payload]
    unacknowledged = number * 7919 % 1000 < parameters.qos0 * 1000
    return Reading(f"{'q' if unacknowledged else 'd'}{value % DEVICES}", value, 0 if unacknowledged else 1)


class Publisher:
    """`with Publisher(broker, parameters) as publisher: publisher.allow(1000)` publishes the first thousand."""

    def __init__(self, broker: Broker, parameters: Parameters) -> None:
        self._broker = broker
        self._parameters = parameters
        self._rate = None if parameters.backlog else parameters.rate
        self.published = 0
        self.unacknowledged = 0
        """Those of them with QoS 0."""
        self.repeated = 0
        """Messages that were in flight when the connection was lost: paho publishes them again."""
        self.first_s: float | None = None
        """When the first message was published, and the newest one."""
        self.newest_s = 0.0
        self._sent = 0  # with QoS 1, the last ones included
        self._acknowledged = 0  # written by paho's thread alone
        self._ended = 0  # messages of the device END
        self._leaving = False
        self._failure: BaseException | None = None  # what has ended the thread
        self._stop = threading.Event()
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._allowed = 0
        self._idle = False  # the thread waits to be allowed more
        self._client = self._make_client()
        self._thread = threading.Thread(target=self._run, name="chaos-publisher", daemon=True)

    def _make_client(self) -> mqtt.Client:
        client = mqtt.Client(CallbackAPIVersion.VERSION2, "chaos-publisher", protocol=MQTTProtocolVersion.MQTTv311)
        client.max_inflight_messages_set(WINDOW)
        client.reconnect_delay_set(1, 1)
        client.on_publish = self._on_publish
        client.on_disconnect = self._on_disconnect
        return client

    def __enter__(self) -> Self:
        self.join()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join()
        self._leaving = True
        self._client.disconnect()
        self._client.loop_stop()

    # -- what the run says

    def allow(self, count: int) -> None:
        """Go on until `count` messages are published in all."""
        self.check()
        with self._changed:
            self._allowed = max(self._allowed, count)
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what has ended the thread, if anything has."""
        if self._failure is not None:
            raise RuntimeError("the publisher has ended") from self._failure

    def leave(self) -> int:
        """Stop, wait for every PUBACK, disconnect; returns what was allowed, to go on with after `join`."""
        with self._changed:
            allowed, self._allowed = self._allowed, 0
            assert self._changed.wait_for(lambda: self._idle, timeout=60), "the publisher does not pause"
        self._wait_for_pubacks()
        self._leaving = True
        self._client.disconnect()
        self._client.loop_stop()
        return allowed

    def join(self) -> None:
        """Connect (again)."""
        self._leaving = False
        self._client = self._make_client()
        self._client.connect(self._broker.host, self._broker.port)
        self._client.loop_start()
        wait_until(self._client.is_connected, timeout_s=30, what="the publisher to connect")

    def end(self, count: int) -> None:
        """Publish so many last messages, after all others, and wait for every PUBACK."""
        self._wait_for_pubacks()
        for _ in range(count):
            self._publish(f"chaos/{END}/telemetry", b'{"seq": %d}' % self._ended, 1)
            self._ended += 1
        self._wait_for_pubacks()

    @property
    def ended(self) -> int:
        """How many last messages were published."""
        return self._ended

    def _wait_for_pubacks(self) -> None:
        wait_until(lambda: self._acknowledged == self._sent, timeout_s=60, what="the publisher's PUBACKs")

    # -- its thread

    def _run(self) -> None:
        try:
            self._publish_what_is_allowed()
        except BaseException as error:  # raised again by `check`: the run must not wait for a dead publisher
            self._failure = error

    def _publish_what_is_allowed(self) -> None:
        due = 0.0
        before_s = time.monotonic()
        while not self._stop.wait(TICK_S if self._rate else 0.0):
            if self._wait_until_allowed():
                due, before_s = 0.0, time.monotonic()
            now_s = time.monotonic()
            due += (now_s - before_s) * self._rate if self._rate else WINDOW
            before_s = now_s
            while due >= 1 and self.published < self._allowed and not self._stop.is_set():
                due -= 1
                self._publish_one()

    def _wait_until_allowed(self) -> bool:
        """Whether it had to wait."""
        with self._changed:
            if self.published < self._allowed:
                return False
            self._idle = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.published < self._allowed or self._stop.is_set())
            self._idle = False
            return True

    def _publish_one(self) -> None:
        while self._sent - self._acknowledged >= WINDOW:
            if self._stop.wait(0.001):
                return
        self.newest_s = time.monotonic()
        if self.first_s is None:
            self.first_s = self.newest_s
        device, value, qos = reading(self.published, self._parameters)
        self._publish(f"chaos/{device}/telemetry", b'{"seq": %d}' % value, qos)
        self.published += 1
        self.unacknowledged += qos == 0

    def _publish(self, topic: str, payload: bytes, qos: int) -> None:
        self._sent += 1
        code = self._client.publish(topic, payload, qos).rc
        if code is not MQTTErrorCode.MQTT_ERR_SUCCESS and not (qos and code is MQTTErrorCode.MQTT_ERR_NO_CONN):
            raise AssertionError(f"paho did not take a message: {code!r}")

    # -- paho's thread

    def _on_publish(self, *_: object) -> None:
        self._acknowledged += 1  # QoS 0: when it was written to the socket

    def _on_disconnect(self, *_: object) -> None:
        if not self._leaving:
            self.repeated += self._sent - self._acknowledged
