"""PUBLISH read by the letter of the standard (MQTT 5, section 3.3), to compare with what others make or read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Publish:
    topic: str
    payload: bytes
    qos: int
    dup: bool
    packet_id: int


def read_publish(head: int, body: bytes, *, protocol: int) -> Publish:
    """`head` is the first byte of the packet, `body` what follows the remaining length. QoS 1 or 2, no properties."""
    assert head >> 4 == 3, f"packet type {head >> 4}"
    end = 2 + int.from_bytes(body[:2], "big")
    payload = body[end + 2 :]
    if protocol == 5:
        assert payload[:1] == b"\x00", "properties"
        payload = payload[1:]
    packet_id = int.from_bytes(body[end : end + 2], "big")
    return Publish(body[2:end].decode(), payload, head >> 1 & 3, bool(head & 8), packet_id)
