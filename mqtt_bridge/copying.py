"""Rows into the bytes of COPY ... WITH (FORMAT binary), and those to the server.

The format (PostgreSQL manual, COPY, "Binary Format"): a header, then for each row the number of fields, and for each
field its length and its bytes, big-endian; a length of -1 is NULL. Binary COPY does not check types, so an `Encoder`
is made from the types that the table has in the catalogue, never from those that it should have.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from mqtt_bridge.model import Row, Table

HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
TRAILER = b"\xff\xff"
EPOCH_US = 946_684_800_000_000
"""PostgreSQL counts microseconds from 2000-01-01, the bridge from 1970-01-01."""

Encoder = Callable[[Iterable[Row]], bytes]
"""Turns rows into COPY data, header and trailer included. Raises ValueError for a row that cannot be encoded."""

_NULL = struct.pack(">i", -1)
_SHORT = struct.Struct(">ih").pack
_LONG = struct.Struct(">iq").pack
_DOUBLE = struct.Struct(">id").pack
_LENGTH = struct.Struct(">i").pack


def _bytes(value: bytes) -> bytes:
    return _LENGTH(len(value)) + value


def _text(value: str) -> bytes:
    return _bytes(value.encode())


def _jsonb(value: Any) -> bytes:
    return _bytes(b"\x01" + json.dumps(value).encode())


PACKERS: dict[str, Callable[[Any], bytes]] = {
    "timestamptz": lambda value: _LONG(8, value - EPOCH_US),
    "text": _text,
    "varchar": _text,
    "float8": lambda value: _DOUBLE(8, value),
    "int2": lambda value: _SHORT(2, value),
    "bool": lambda value: b"\x00\x00\x00\x01" + (b"\x01" if value else b"\x00"),
    "bytea": _bytes,
    "jsonb": _jsonb,
}
"""Catalogue type -> packer of one field. A time is an int: microseconds since 1970, UTC."""


def encoder(types: Sequence[str]) -> Encoder:
    """An encoder for rows whose columns are of these catalogue types."""
    packers = [PACKERS[type_] for type_ in types]
    count = struct.pack(">h", len(packers))

    def encode(rows: Iterable[Row]) -> bytes:
        parts = [HEADER]
        for row in rows:
            parts.append(count)
            parts += [_NULL if value is None else pack(value) for pack, value in zip(packers, row, strict=True)]
        parts.append(TRAILER)
        return b"".join(parts)

    return encode


class ReadingsEncoder:
    """The same for the narrow shape, which is nearly every row: two `struct` calls and a cached middle a row.

    One instance may serve any number of threads and connections: its cache is a dict of finished values.
    """

    CACHED = 100_000
    """Pairs of device and metric remembered; beyond, the cache starts anew."""
    LONGEST = 300
    """Longer ones are not remembered: nobody can fill the memory with names."""

    def __init__(self) -> None:
        self._middles: dict[tuple[str, str], bytes] = {}

    def __call__(self, rows: Iterable[Row]) -> bytes:
        middles = self._middles
        head, value_and_null = struct.Struct(">hiq").pack, struct.Struct(">idi").pack
        parts = [HEADER]
        append = parts.append
        for time_us, device, metric, value, text in rows:
            append(head(5, 8, time_us - EPOCH_US))
            append(middles.get((device, metric)) or self._middle(device, metric))
            if text is None and value is not None:
                append(value_and_null(8, value, -1))  # nearly always
            else:
                append(_NULL if value is None else _DOUBLE(8, value))
                append(_NULL if text is None else _text(text))
        append(TRAILER)
        return b"".join(parts)

    def _middle(self, device: str, metric: str) -> bytes:
        middle = _text(device) + _text(metric)
        if len(middle) <= self.LONGEST:
            if len(self._middles) >= self.CACHED:
                self._middles.clear()
            self._middles[device, metric] = middle
        return middle


def statement(table: Table) -> sql.Composed:
    """The statement that takes COPY data for `table`."""
    return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(
        sql.Identifier(*table.name.split(".")), sql.SQL(", ").join(map(sql.Identifier, table.columns))
    )


def send(cursor: Cursor, text: sql.Composable | str, data: bytes) -> None:
    """Run `text`, which ends with a COPY statement, and give it `data`: one round trip."""
    cursor.copy_expert(text, io.BytesIO(data), size=1 << 18)
