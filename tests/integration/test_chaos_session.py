"""The chaos harness sees what a broker still holds for a client that has left."""

from __future__ import annotations

import secrets
import threading

import paho.mqtt.client as mqtt
import paho.mqtt.publish
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from tests.chaos.session import left_in_session


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
