"""What broker and spool still hold when the bridge has left: it should be nothing.

A message whose PUBACK never arrived would come again at the next start: a duplicate that no comparison has seen yet.
So would one that was stored, and is still in the spool.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from mqtt_bridge.spool import FILE_NAME
from mqtt_bridge.tools.embedded import Broker

TIMEOUT_S = 20.0


def left_in_session(broker: Broker, client_id: str, *, protocol: str) -> int | None:
    """Messages that the broker delivers to who takes this session over; None where there is no session.

    Those behind a full window are not counted: what matters is whether there are any.
    """
    session = _Session(client_id, protocol)
    session.take_over(broker)
    return session.messages if session.present else None


def left_in_spool(directory: Path) -> int:
    """Messages that wait in a spool, or were set aside in it as damaged; 0 where there is none.

    Nobody may have it open. Read without the bridge's own code, which would tell us what it believes.
    """
    if not (directory / FILE_NAME).exists():
        return 0
    with closing(sqlite3.connect(directory / FILE_NAME)) as database:
        waiting, damaged = (
            database.execute(f"SELECT coalesce(sum(count), 0) FROM {table}").fetchone()[0]
            for table in ("batches", "damaged")
        )
    return int(waiting) + int(damaged)


class _Session:
    """One client that connects, waits for the answer to an UNSUBSCRIBE, which follows all messages, and leaves."""

    def __init__(self, client_id: str, protocol: str) -> None:
        self.messages = 0
        self.present = False
        self._all_came = threading.Event()
        self._five = protocol == "5"
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id,
            clean_session=None if self._five else False,
            protocol=MQTTProtocolVersion.MQTTv5 if self._five else MQTTProtocolVersion.MQTTv311,
        )
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message
        self._client.on_unsubscribe = lambda *_: self._all_came.set()

    def take_over(self, broker: Broker) -> None:
        if self._five:
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = 3600
            self._client.connect(broker.host, broker.port, clean_start=False, properties=properties)
        else:
            self._client.connect(broker.host, broker.port)
        self._client.loop_start()
        assert self._all_came.wait(TIMEOUT_S), "the broker does not answer who takes over the bridge's session"
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(
        self, client: mqtt.Client, userdata: object, flags: mqtt.ConnectFlags, reason: object, properties: object
    ) -> None:
        self.present = flags.session_present
        client.unsubscribe("chaos-nobody/ever")

    def _on_message(self, *_: object) -> None:
        self.messages += 1
