"""Rows of the narrow shape, nearly all rows there are: kept as the bytes that COPY takes.

They are packed where they are made, message by message, and unpacked only where somebody wants to look at them: to
explain them, or to find the one that the server refuses. A tuple for each of them would cost more than all the rest.

Invariant: unpacked, the rows are those that were packed, times to the microsecond and numbers to the last bit.

A row in COPY's binary format (PostgreSQL manual, COPY, "Binary Format"): the number of fields, then for each field its
length and its bytes, big-endian; a length of -1 is NULL.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mqtt_bridge.model import Row

EPOCH_US = 946_684_800_000_000
"""PostgreSQL counts microseconds from 2000-01-01, the bridge from 1970-01-01."""
NULL = struct.pack(">i", -1)

_FIELDS, _TIME = 5, 8
_HEAD = struct.Struct(">hiq")
_LENGTH = struct.Struct(">i")
_NUMBER = struct.Struct(">idi")
_DOUBLE = struct.Struct(">d")

pack_time = _HEAD.pack
"""The first field of a row, and the number of them all: `pack_time(5, 8, time_us - EPOCH_US)`."""
number = _NUMBER.pack
"""The last two fields of a row with a number: `number(8, value, -1)`."""


def head(time_us: int, device: bytes) -> bytes:
    """The first two fields of a row: its time, and its device as `name` makes it."""
    return _HEAD.pack(_FIELDS, _TIME, time_us - EPOCH_US) + device


def name(text: str) -> bytes:
    """A device or a metric, as a field."""
    encoded = text.encode()
    return _LENGTH.pack(len(encoded)) + encoded


def ending(value: float | None, text: str | None) -> bytes:
    """The last two fields of any row."""
    return (NULL if value is None else _LENGTH.pack(8) + _DOUBLE.pack(value)) + (NULL if text is None else name(text))


class Readings(Sequence[Row]):
    """A number of rows `(time_us, device, metric, value or None, value_text or None)`. Nobody changes them."""

    __slots__ = ("data", "size")

    def __init__(self, size: int, data: bytes) -> None:
        self.size = size
        self.data = data

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Readings:
        """These rows, packed. Raises an error of `errors.ROW_BUILDING` where one cannot be."""
        packed = [
            head(time_us, name(device)) + name(metric) + ending(value, text)
            for time_us, device, metric, value, text in rows
        ]
        return cls(len(packed), b"".join(packed))

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Row]:
        position = 0
        for _ in range(self.size):
            _, _, time_us = _HEAD.unpack_from(self.data, position)
            device, position = _field(self.data, position + _HEAD.size)
            metric, position = _field(self.data, position)
            value, position = _field(self.data, position)
            text, position = _field(self.data, position)
            yield (
                time_us + EPOCH_US,
                (device or b"").decode(),
                (metric or b"").decode(),
                None if value is None else _number_of(_DOUBLE.unpack(value)[0]),
                None if text is None else text.decode(),
            )

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Readings({list(self)})"


def _number_of(double: float) -> float:
    """As PostgreSQL shows it: 21, not 21.0."""
    return int(double) if abs(double) < 2**53 and double.is_integer() and str(double) != "-0.0" else double


def _field(data: bytes, position: int) -> tuple[bytes | None, int]:
    (length,) = _LENGTH.unpack_from(data, position)
    position += 4
    return (None, position) if length < 0 else (data[position : position + length], position + length)
