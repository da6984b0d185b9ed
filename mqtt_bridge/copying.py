"""Rows into the bytes of COPY ... WITH (FORMAT binary), and those to the server.

The format (PostgreSQL manual, COPY, "Binary Format"): a header, then for each row the number of fields, and for each
field its length and its bytes, big-endian; a length of -1 is NULL. Binary COPY does not check types, so an `Encoder`
is made from the types that the table has in the catalogue, never from those that it should have.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from typing import Any

from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from mqtt_bridge.model import Row, Table
from mqtt_bridge.readings import EPOCH_US, NULL, Readings

HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
TRAILER = b"\xff\xff"
Encoder = Callable[[Iterable[Collection[Row]]], bytes]
"""Turns the rows of one message after the other into COPY data, header and trailer included.

Raises ValueError for a row that cannot be encoded.
"""

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

    def encode(parts: Iterable[Collection[Row]]) -> bytes:
        data = [HEADER]
        for row in chain.from_iterable(parts):
            data.append(count)
            data += [NULL if value is None else pack(value) for pack, value in zip(packers, row, strict=True)]
        data.append(TRAILER)
        return b"".join(data)

    return encode


def encode_readings(parts: Iterable[Collection[Row]]) -> bytes:
    """An `Encoder` for the narrow shape, which nearly all rows have: they are packed already."""
    packed = [part.data if type(part) is Readings else Readings.of(part).data for part in parts]
    return b"".join([HEADER, *packed, TRAILER])


def statement(table: Table) -> sql.Composed:
    """The statement that takes COPY data for `table`."""
    return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(
        sql.Identifier(*table.name.split(".")), sql.SQL(", ").join(map(sql.Identifier, table.columns))
    )


def send(cursor: Cursor, text: sql.Composable | str, data: bytes) -> None:
    """Run `text`, which ends with a COPY statement, and give it `data`: one round trip."""
    cursor.copy_expert(text, io.BytesIO(data), size=1 << 18)
