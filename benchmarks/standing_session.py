"""A session at the broker, made before the program that will use it, and ended after it.

Few programs say when their subscription stands. A session with the same client id, made ahead, makes that irrelevant:
what is published while the program still starts waits for it. Ended it must be, since the broker would queue the
messages of every later run for it. MQTT 3.1.1, where a session lives until somebody asks for a clean one.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks.contestant import Stage, Unavailable

ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class StandingSession:
    """One client id at the broker of a stage."""

    stage: Stage
    client_id: str

    def make(self) -> None:
        """A fresh session with the stage's subscription at QoS 1."""
        self.end()
        self._visit(clean=False)

    def end(self) -> None:
        """The broker forgets the client id and what it has queued for it. Idempotent."""
        self._visit(clean=True)

    def _visit(self, *, clean: bool) -> None:
        client = mqtt.Client(CallbackAPIVersion.VERSION2, self.client_id, clean_session=clean)
        answered = threading.Event()

        def on_connect(*_: object) -> None:
            if clean:
                answered.set()
            else:
                client.subscribe(self.stage.topic_filter, qos=1)

        client.on_connect = on_connect
        client.on_subscribe = lambda *_: answered.set()
        client.connect(self.stage.broker_host, self.stage.broker_port)
        client.loop_start()
        answer = answered.wait(ANSWER_S)
        client.disconnect()
        client.loop_stop()
        if not answer:
            raise Unavailable(f"the broker gave no answer within {ANSWER_S:g} s")
