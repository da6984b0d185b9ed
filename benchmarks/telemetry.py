"""The messages of the benchmarks: as many as wanted, no two alike, all of the same length.

    bench/device-000042/telemetry   {"temperature":21.53,"humidity":45.1,"battery":3.712,"rssi":-67,"ts":1760000000123}

Device and time together are unique, so what a database holds can be counted without any id in the payload. One length
for all is what makes the load cheap: PUBLISH packets stand in one buffer at a regular distance (`Packets`), and packet
ids are written into thousands of them by two slice assignments.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

TOPIC = "bench/device-%06d/telemetry"
FILTER = "bench/+/telemetry"
PROBE = 999_999
"""A device beside the others, whose rows a latency run looks for."""
DEVICES = 1_000
READINGS = 4

_HEADER_QOS1 = 0x32


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent: `messages` over `devices` topics, each with `readings` values, padded by a text to `size_bytes`."""

    messages: int
    devices: int = DEVICES
    readings: int = READINGS
    size_bytes: int = 0
    """At least so many bytes of payload; what is missing is one text more, and a row more."""

    @property
    def rows_per_message(self) -> int:
        """Rows that the bridge makes of a message."""
        return self.readings + bool(self._padding)

    @property
    def payload_bytes(self) -> int:
        """Length of every payload."""
        return len(self.payload(0, 1_760_000_000_000))

    def payload(self, number: int, ts: int) -> bytes:
        """The payload of message `number`, with this time in the unit that its number of digits says."""
        return self._template % (*self._values(number), ts)

    def payloads(self, start_ms: int) -> Iterator[bytes]:
        """Every payload; a device's own follow each other by a millisecond."""
        template, values, devices = self._template, self._values, self.devices
        for number in range(self.messages):
            yield template % (*values(number), start_ms + number // devices)

    @property
    def _template(self) -> bytes:
        if self._padding:
            return self._plain[:-1] + b',"note":"' + b"x" * self._padding + b'"}'
        return self._plain

    @property
    def _plain(self) -> bytes:
        if self.readings == READINGS:
            return b'{"temperature":%d.%02d,"humidity":%d.%d,"battery":3.%03d,"rssi":-%d,"ts":%d}'
        metrics = b"".join(b'"m%02d":%%d.%%02d,' % number for number in range(1, self.readings))
        return b'{"temperature":%d.%02d,' + metrics + b'"ts":%d}'

    @property
    def _padding(self) -> int:
        plain = len(self._plain % (*self._values(0), 1_760_000_000_000))
        return max(0, self.size_bytes - plain - len(',"note":""'))

    def _values(self, number: int) -> tuple[int, ...]:
        if self.readings == READINGS:
            return (
                10 + number % 30,
                number % 100,
                10 + number % 90,
                number % 10,
                number % 1_000,
                40 + number % 50,
            )
        return tuple(
            part for each in range(self.readings) for part in (10 + (number + each) % 90, (number * 7 + each) % 100)
        )


@dataclass(frozen=True, slots=True)
class Packets:
    """PUBLISH packets of QoS 1 in one buffer: message n begins at `n * stride`, its packet id stands at `id_offset`."""

    data: bytearray
    stride: int
    id_offset: int

    def __len__(self) -> int:
        return len(self.data) // self.stride


def packets(load: Load, *, protocol: int, start_ms: int | None = None) -> Packets:
    """Every message of a load as it stands on the wire, with packet id 1. `protocol` is 4 (MQTT 3.1.1) or 5.

    The times lie in the hour before now: nothing is early, late, or in a partition that is not there.
    """
    if start_ms is None:
        start_ms = int(time.time() * 1000) - 3_600_000
    heads = [_head(device, load.payload_bytes, protocol) for device in range(min(load.devices, load.messages))]
    data = bytearray().join(
        part
        for number, payload in enumerate(load.payloads(start_ms))
        for part in (heads[number % load.devices], payload)
    )
    head_bytes = len(heads[0])
    return Packets(data, head_bytes + load.payload_bytes, head_bytes - (2 if protocol == 4 else 3))


def publish(device: int, payload: bytes, packet_id: int) -> bytes:
    """One PUBLISH of MQTT 3.1.1, for what is made while it is sent."""
    head = bytearray(_head(device, len(payload), 4))
    head[-2:] = packet_id.to_bytes(2, "big")
    return bytes(head) + payload


def _head(device: int, payload_bytes: int, protocol: int) -> bytes:
    """Everything before the payload (MQTT 5, section 3.3)."""
    topic = (TOPIC % device).encode()
    variable = len(topic).to_bytes(2, "big") + topic + b"\x00\x01" + (b"" if protocol == 4 else b"\x00")
    return bytes([_HEADER_QOS1]) + remaining_length(len(variable) + payload_bytes) + variable


def remaining_length(value: int) -> bytes:
    """A variable byte integer (MQTT 5, section 1.5.5)."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
