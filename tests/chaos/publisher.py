"""Publishes numbered (or identical) readings at QoS 1, open-loop at a rate, and knows what it has published.

paho repeats a QoS 1 message whose PUBACK it has not seen when it reconnects, and to everybody else that is a new
message. So the publisher has a link of its own, which is never cut, and leaves before the broker is restarted. Should
it be cut all the same, what it may have repeated is counted in `repeated`.

Threads: one of its own publishes, paho's reads the PUBACKs, the run's starts, pauses and asks.
"""

from __future__ import annotations

import threading
import time
from typing import Literal, Self

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from mqtt_bridge.tools.embedded import Broker
from tests.waiting import wait_until

DEVICES = 20
WINDOW = 500
"""Messages in flight at most."""
TICK_S = 0.01
END = "end"
"""The device that publishes the very last message."""


class Publisher:
    """`with Publisher(...) as publisher: publisher.allow(1000)` publishes the first thousand."""

    def __init__(self, broker: Broker, *, payload: Literal["unique", "constant"], rate: float | None) -> None:
        """`rate` None: as fast as the broker takes it."""
        self._broker = broker
        self._constant = payload == "constant"
        self._rate = rate
        self.published = 0
        self.repeated = 0
        """Messages that were in flight when the connection was lost: paho publishes them again."""
        self._acknowledged = 0  # written by paho's thread alone
        self._leaving = False
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
        with self._changed:
            self._allowed = max(self._allowed, count)
            self._changed.notify_all()

    def leave(self) -> int:
        """Stop, wait for every PUBACK, disconnect; returns what was allowed, to go on with after `join`."""
        with self._changed:
            allowed, self._allowed = self._allowed, 0
            assert self._changed.wait_for(lambda: self._idle, timeout=60), "the publisher does not pause"
        wait_until(lambda: self._acknowledged == self.published, timeout_s=60, what="the publisher's PUBACKs")
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

    def finish(self) -> None:
        """Publish the last message, after all others, and wait for every PUBACK."""
        wait_until(lambda: self._acknowledged == self.published, timeout_s=60, what="the publisher's PUBACKs")
        self._client.publish(f"chaos/{END}/telemetry", b'{"end": 1}', 1).wait_for_publish(60)

    # -- its thread

    def _run(self) -> None:
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
        while self.published - self._acknowledged >= WINDOW and not self._stop.is_set():
            time.sleep(0.001)
        seq = 0 if self._constant else self.published
        self._client.publish(f"chaos/d{seq % DEVICES}/telemetry", b'{"seq": %d}' % seq, 1)
        self.published += 1

    # -- paho's thread

    def _on_publish(self, *_: object) -> None:
        self._acknowledged += 1

    def _on_disconnect(self, *_: object) -> None:
        if not self._leaving:
            self.repeated += self.published - self._acknowledged
