"""paho's client as it is, with the interface of `fast_client`: for a paho that the fast one does not fit.

It uses public parts only, and pays for it: about 100 us of CPU a message. And paho's own strictness comes with it: it
ends the connection for a property that it does not like, and the broker delivers that message again and again. Before
2.2 paho counts only whole packets as signs of life, and overlooks the reason of a DISCONNECT that says nothing else.

Threads: the network thread reads; `acknowledge` may be called by any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import MQTTErrorCode

from mqtt_bridge.fast_client import DISLIKES, OnMalformed, OnRun, is_of_paho
from mqtt_bridge.model import Properties, Run
from mqtt_bridge.publish_packet import MalformedPublish, TopicAliases
from mqtt_bridge.publish_properties import USER_PROPERTY


class StockClient(mqtt.Client):
    """Hands `on_run` each message as it comes, as a run of one, and `on_malformed` what should end the connection."""

    def __init__(self, on_run: OnRun, on_malformed: OnMalformed, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_run = on_run
        self._on_malformed = on_malformed
        self._aliases = TopicAliases()
        self.on_message = self._receive

    def acknowledge(self, packet_ids: Sequence[int]) -> None:
        """Queue the PUBACKs of these, in this order."""
        for packet_id in packet_ids:
            self.ack(packet_id, 1)

    def take_received(self) -> int:
        """0: it does not tell."""
        return 0

    def part(self) -> None:
        """Nothing: paho closes the socket as soon as it has written DISCONNECT, which is no better than to close it."""
        self.disconnect()

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        """As paho's; a packet that paho cannot read is told of, where it raises whatever happens then (before 2.2)."""
        try:
            return super().loop_read(max_packets)
        except DISLIKES as error:
            if not is_of_paho(error):
                raise
            self._on_malformed(MalformedPublish(f"a packet that paho-mqtt cannot read: {error!r}"))
            return MQTTErrorCode.MQTT_ERR_PROTOCOL

    def _receive(self, _client: object, _userdata: object, message: mqtt.MQTTMessage) -> None:
        topic, properties = self._aliases.resolve(_topic(message), _properties(message))
        if message.qos > 1 or not topic or (message.qos and not message.mid):
            what = f"a message of QoS {message.qos} to the topic {topic!r} with the packet id {message.mid}"
            self._on_malformed(MalformedPublish(what))
            return
        self._on_run(
            Run.of_one(
                topic,
                bytes(message.payload),
                message.qos,
                retain=message.retain,
                dup=message.dup,
                packet_id=message.mid,
                properties=properties,
            )
        )


def _topic(message: mqtt.MQTTMessage) -> bytes:
    try:
        return message.topic.encode()
    except UnicodeDecodeError:
        return bytes(message._topic)  # paho has no public name for a topic that is not UTF-8


def _properties(message: mqtt.MQTTMessage) -> Properties:
    if message.properties is None or message.properties.isEmpty():  # type: ignore[no-untyped-call]
        return None
    found: dict[str, Any] = message.properties.json()  # type: ignore[no-untyped-call]
    if USER_PROPERTY in found:
        found[USER_PROPERTY] = [list(pair) for pair in found[USER_PROPERTY]]
    return found
