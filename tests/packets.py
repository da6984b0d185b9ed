"""MQTT packets as bytes, and a reader of them that is too simple to be wrong: what the bridge's own is compared with.

Nothing here is shared with the bridge, nor with the scripted broker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PINGRESP = b"\xd0\x00"


class Publish(NamedTuple):
    """A PUBLISH, all of it."""

    topic: bytes
    payload: bytes = b""
    qos: int = 1
    retain: bool = False
    dup: bool = False
    packet_id: int = 1
    """Not sent with QoS 0."""
    properties: bytes = b""
    """MQTT 5, encoded, without their length."""

    def encode(self, *, is_v5: bool) -> bytes:
        """As it stands on the wire."""
        body = text(self.topic)
        if self.qos:
            body += self.packet_id.to_bytes(2)
        if is_v5:
            body += with_length(self.properties)
        return bytes([0x30 | self.dup << 3 | self.qos << 1 | self.retain]) + with_length(body + self.payload)


def suback(packet_id: int, *, is_v5: bool) -> bytes:
    """SUBACK that grants QoS 1 for one filter."""
    return b"\x90" + with_length(packet_id.to_bytes(2) + (b"\x00" if is_v5 else b"") + b"\x01")


def unsuback(packet_id: int, *, is_v5: bool) -> bytes:
    """UNSUBACK for one filter."""
    return b"\xb0" + with_length(packet_id.to_bytes(2) + (b"\x00\x00" if is_v5 else b""))


def text(value: bytes) -> bytes:
    """A string or binary value after its length of two bytes."""
    return len(value).to_bytes(2) + value


def variable(value: int) -> bytes:
    """A variable byte integer."""
    encoded = bytearray()
    while True:
        value, digit = divmod(value, 128)
        encoded.append(digit | (0x80 if value else 0))
        if not value:
            return bytes(encoded)


def with_length(data: bytes) -> bytes:
    """The data after its length as a variable byte integer."""
    return variable(len(data)) + data


class Malformed(Exception):
    """No packet, or none that may be sent to a subscriber of QoS 1."""


def read_publishes(stream: bytes, *, is_v5: bool) -> tuple[list[Publish], bool]:
    """The PUBLISH packets that the stream begins with, their aliases resolved; and whether a malformed one ended them.

    It stops as well where a packet is not there to its end, and where one of another kind begins.
    """
    found: list[Publish] = []
    aliases: dict[int, bytes] = {}
    while stream and stream[0] >> 4 == 3:
        try:
            packet, rest = _split(stream)
            if packet is None:
                break
            found.append(_read(stream[0], packet, is_v5=is_v5, aliases=aliases))
        except Malformed:
            return found, True
        stream = rest
    # No QoS above 1 was asked for: that much is known by the first byte.
    return found, bool(stream) and stream[0] >> 4 == 3 and stream[0] >> 1 & 3 > 1


def _split(stream: bytes) -> tuple[bytes | None, bytes]:
    """The body of the first packet, None where it is not there to its end; and what follows."""
    length = 0
    for count, byte in enumerate(stream[1:5]):
        length += (byte % 128) * 128**count
        if byte < 128:
            body = stream[2 + count :]
            return (None, b"") if len(body) < length else (body[:length], body[length:])
    if len(stream) < 5:
        return None, b""
    raise Malformed


def _read(head: int, body: bytes, *, is_v5: bool, aliases: dict[int, bytes]) -> Publish:
    qos = head >> 1 & 3
    if qos > 1:
        raise Malformed
    topic, body = _take_text(body)
    packet_id = 0
    if qos:
        packet_id, body = int.from_bytes(_take(body, 2)[0]), body[2:]
        if not packet_id:
            raise Malformed
    properties = b""
    if is_v5:
        properties, body = _take_properties(body)
        topic = _resolve(properties, topic, aliases)
    if not topic:
        raise Malformed
    return Publish(topic, body, qos, bool(head & 1), bool(head & 8), packet_id, properties)


def _take(body: bytes, size: int) -> tuple[bytes, bytes]:
    if len(body) < size:
        raise Malformed
    return body[:size], body[size:]


def _take_text(body: bytes) -> tuple[bytes, bytes]:
    size, body = _take(body, 2)
    return _take(body, int.from_bytes(size))


def _take_properties(body: bytes) -> tuple[bytes, bytes]:
    # A packet that begins like the body: so there is one reader of lengths.
    properties, rest = _split(b"\x30" + body)
    if properties is None:
        raise Malformed
    return properties, rest


def _resolve(properties: bytes, topic: bytes, aliases: dict[int, bytes]) -> bytes:
    """Where the alias stands alone, as it does in these tests."""
    if len(properties) == 3 and properties[0] == 0x23:
        alias = int.from_bytes(properties[1:])
        if topic:
            aliases[alias] = topic
        return aliases.get(alias, b"")
    return topic


def cut(stream: bytes, sizes: Sequence[int]) -> list[bytes]:
    """The stream in pieces of these sizes, over and over."""
    pieces, at, turn = [], 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        pieces.append(stream[at : at + size])
        at, turn = at + size, turn + 1
    return pieces
