"""Binary COPY against PostgreSQL: it reads what was packed, and fills no column of another type with garbage."""

from __future__ import annotations

import io
import itertools
from datetime import UTC, datetime

import psycopg2
import pytest

from mqtt_bridge import schema
from mqtt_bridge.connections import Connections
from mqtt_bridge.copying import PACKERS, encode_readings, encoder
from mqtt_bridge.errors import SchemaError, Verdict, classify
from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.model import READINGS_COLUMNS, Message, Table, Translation
from mqtt_bridge.transactions import Batch, Transactions

NOW_US = 1_790_000_000_123_456
NOW = datetime(2026, 9, 21, 14, 13, 20, 123456, tzinfo=UTC)
BEFORE_1970 = datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
LARGEST, INFINITE = 1.7976931348623157e308, float("inf")
_numbers = itertools.count(1)
READINGS = Table("readings", READINGS_COLUMNS)


@pytest.fixture
def connections(database):
    pool = Connections(lambda: database, size=1)
    yield pool
    pool.close()


def execute(connection, statement, *args):
    with connection.cursor() as cursor:
        cursor.execute(statement, args or None)
        return cursor.fetchall() if cursor.description else []


def copy(connection, table, data):
    with connection.cursor() as cursor:
        cursor.copy_expert(f"COPY {table} FROM STDIN (FORMAT binary)", io.BytesIO(data))


@pytest.mark.parametrize(
    ("type_", "values"),
    [
        ("timestamptz", [(NOW_US, NOW), (0, datetime(1970, 1, 1, tzinfo=UTC)), (-1, BEFORE_1970)]),
        ("text", [("", ""), ("é€😀", "é€😀"), ("x" * 100_000, "x" * 100_000), ("a\tb\n\\N", "a\tb\n\\N")]),
        ("varchar", [("ä", "ä")]),
        ("float8", [(1.1, 1.1), (-0.0, -0.0), (5e-324, 5e-324), (LARGEST, LARGEST), (7, 7.0), (INFINITE, INFINITE)]),
        ("int2", [(0, 0), (-32768, -32768), (32767, 32767)]),
        ("bool", [(True, True), (False, False)]),
        ("bytea", [(b"", b""), (bytes(range(256)), bytes(range(256)))]),
        ("jsonb", [({"a": [1, None, "é"]}, {"a": [1, None, "é"]}), ({}, {}), ([1], [1])]),
    ],
)  # fmt: skip
def test_what_a_packer_writes_is_what_postgresql_reads(connections, type_, values):
    with connections.connection() as connection:
        execute(connection, f"CREATE TABLE t (n int2, v {type_})")

        copy(connection, "t", encoder(["int2", type_])([[*[(n, v) for n, (v, _) in enumerate(values)], (999, None)]]))

        got = [value for (value,) in execute(connection, "SELECT v FROM t ORDER BY n")]
    got = [bytes(value) if isinstance(value, memoryview) else value for value in got]
    assert got == [value for _, value in values] + [None]
    assert type_ in PACKERS


def test_readings_are_read_as_they_were_written(connections):
    rows = [
        (NOW_US, "gerät", "temp", 21.5, None),
        (NOW_US, "", "", None, ""),
        (NOW_US, "d", "n", 2**53 + 1, "9007199254740993"),
    ]

    with connections.connection() as connection:
        schema.apply(connection, now=NOW)
        copy(connection, "readings (time, device, metric, value, value_text)", encode_readings([rows]))
        stored = execute(connection, "SELECT * FROM readings ORDER BY device DESC")

    expected = [
        (NOW, "gerät", "temp", 21.5, None),
        (NOW, "d", "n", float(2**53), "9007199254740993"),
        (NOW, "", "", None, ""),
    ]
    assert stored == expected


EIGHT_BYTES = ("timestamptz", "timestamp", "float8", "int8", "time", "money", "xid8", "pg_lsn", "macaddr8")


@pytest.mark.parametrize("time", EIGHT_BYTES)
def test_no_pair_of_columns_as_wide_as_those_of_readings_is_taken_for_them(connections, time):
    with connections.connection() as connection:
        schema.apply(connection, now=NOW)
        for value in EIGHT_BYTES:
            execute(connection, "DROP TABLE readings")
            execute(
                connection,
                f"CREATE TABLE readings (time {time}, device text, metric text, value {value}, value_text text)",
            )
            connection.encoders.clear()

            error = store_one(connection)

            if (time, value) == ("timestamptz", "float8"):
                assert error is None
                assert execute(connection, "SELECT time, value FROM readings") == [(NOW, 1.5)]
                continue
            assert execute(connection, "SELECT * FROM readings") == []
            assert classify(error, connected=True).verdict is Verdict.CONFIGURATION
            assert ("readings.time" in str(error)) == (time != "timestamptz")
            assert ("readings.value " in str(error)) == (value != "float8")


def store_one(connection):
    """Store one reading; the error, or None."""
    message = Message(b"t", b"p", 0, False, NOW_US)
    translation = Translation("default", READINGS, [(NOW_US, "d", "m", 1.5, None)])
    batch = Batch(Entry(BatchKey(1, next(_numbers)), 1, 0, b""), [(message, translation)], [])
    execute(connection, "INSERT INTO mqtt_bridge.owners VALUES ('c', 1, 1) ON CONFLICT DO NOTHING")
    try:
        transactions = Transactions(client_id="c", statement_timeout_s=10)
        transactions.owner_epoch = 1
        transactions.run(connection, batch)
    except (psycopg2.Error, SchemaError) as error:
        execute(connection, "ROLLBACK")
        return error
    return None
