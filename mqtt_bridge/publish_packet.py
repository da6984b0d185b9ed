"""PUBLISH as it stands on the wire (MQTT 3.1.1 section 3.3, MQTT 5 section 3.3).

The bridge reads PUBLISH packets itself and leaves all others to paho. paho refuses a whole connection for one
property that it does not like (a byte order mark in a user property, say, which the standard allows): the broker
would deliver that message again and again, and nothing behind it would ever arrive. Here the properties of a message
are its own affair: where they cannot be read, their bytes are kept, and the message goes its way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from mqtt_bridge.model import Publish


class MalformedPublish(Exception):
    """The lengths in a packet contradict each other, or it is none that a broker may send to a QoS 1 subscriber."""


def parse(flags: int, body: bytes | bytearray | memoryview, *, is_v5: bool) -> Publish:
    """Read a PUBLISH: `flags` is the first byte of the packet, `body` what follows its remaining length."""
    qos = flags >> 1 & 3
    if qos > 1:
        raise MalformedPublish(f"a message of QoS {qos}, though nothing above QoS 1 was asked for")
    start = 2 + int.from_bytes(body[:2], "big")
    topic = bytes(body[2:start])
    packet_id = 0
    if qos:
        packet_id = int.from_bytes(body[start : start + 2], "big")
        start += 2
    if start > len(body) or not topic or (qos and not packet_id):
        raise MalformedPublish("a PUBLISH without topic or packet id, or one that is cut short")
    properties = None
    if is_v5:
        length, start = _variable_length(body, start)
        end = start + length
        if end > len(body):
            raise MalformedPublish("properties that are longer than their packet")
        if length:
            properties = _properties(bytes(body[start:end]), length)
        start = end
    return Publish(topic, bytes(body[start:]), qos, bool(flags & 1), bool(flags & 8), packet_id, properties)


def _variable_length(body: bytes | bytearray | memoryview, start: int) -> tuple[int, int]:
    """A variable byte integer (MQTT 5, section 1.5.5), and where it ends."""
    value = 0
    for position, shift in zip(range(start, min(start + 4, len(body))), (0, 7, 14, 21), strict=False):
        value |= (body[position] & 0x7F) << shift
        if not body[position] & 0x80:
            return value, position + 1
    raise MalformedPublish("a length that does not end")


def _properties(content: bytes, length: int) -> Mapping[str, Any]:
    found = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    try:
        found.unpack(_encoded_length(length) + content)  # type: ignore[no-untyped-call]
        readable: Mapping[str, Any] = found.json()  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - paho raises what its parsing happens to trip over; the message matters more
        return {"undecodable": content.hex()}
    return readable


def _encoded_length(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
