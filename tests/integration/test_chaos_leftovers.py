"""The chaos harness sees what broker and spool still hold for a client that has left."""

from __future__ import annotations

import secrets
import threading

import paho.mqtt.client as mqtt
import paho.mqtt.publish
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.model import Message
from mqtt_bridge.spool import Spool
from tests.chaos.leftovers import left_in_session, left_in_spool


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_messages_that_wait_for_a_client_are_counted_and_then_they_are_gone(broker, protocol):
    client_id = f"absent-{secrets.token_hex(4)}"
    leave_a_session(broker, client_id)
    for _ in range(3):
        paho.mqtt.publish.single(f"{client_id}/topic", b"1", 1, hostname=broker.host, port=broker.port)

    assert left_in_session(broker, client_id, protocol=protocol) == 3
    assert left_in_session(broker, client_id, protocol=protocol) == 0


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_session_that_does_not_exist_is_not_taken_for_an_empty_one(broker, protocol):
    assert left_in_session(broker, f"nobody-{secrets.token_hex(4)}", protocol=protocol) is None


def test_messages_that_wait_in_a_spool_are_counted_and_no_spool_is_an_empty_one(tmp_path):
    spool = Spool(tmp_path, client_id="bridge", max_bytes=1 << 20)
    messages = [Message(b"devices/1/telemetry", b"1", 1, False, 1_700_000_000_000_000, n, bytes(8)) for n in range(3)]
    assert left_in_spool(tmp_path) == 0
    spool.open()
    assert spool.append(Entry(BatchKey(1, 1), 1, 0, bytes(24)), messages)
    spool.close()

    assert left_in_spool(tmp_path) == 3


def leave_a_session(broker, client_id: str) -> None:
    """Subscribe, and leave."""
    subscribed = threading.Event()
    client = mqtt.Client(
        CallbackAPIVersion.VERSION2, client_id, clean_session=False, protocol=MQTTProtocolVersion.MQTTv311
    )
    client.on_connect = lambda *_: client.subscribe(f"{client_id}/#", 1)
    client.on_subscribe = lambda *_: subscribed.set()
    client.connect(broker.host, broker.port)
    client.loop_start()
    assert subscribed.wait(10)
    client.disconnect()
    client.loop_stop()
