"""Messages that could not be stored: kept whole, with the reason, in `mqtt_bridge.dead_letters`.

They are written in the transaction of the batch that they came in, so that a PUBACK still means durable.
"""

from __future__ import annotations

from psycopg2.extensions import connection as Connection

from mqtt_bridge.model import DeadLetter, Row, Table

TABLE = Table(
    "mqtt_bridge.dead_letters",
    (
        "received_at",
        "topic",
        "payload",
        "qos",
        "retain",
        "properties",
        "route",
        "stage",
        "error",
        "sqlstate",
        "client_id",
    ),
)
TYPES = ("timestamptz", "text", "bytea", "int2", "bool", "jsonb", "text", "text", "text", "text", "text")
"""Catalogue types of those columns, in their order."""

LONGEST_ERROR = 2_000
"""Characters of a reason that are kept."""


def row(letter: DeadLetter, client_id: str) -> Row:
    """The row of a dead letter. Whatever the device sent, this row can be stored."""
    message = letter.message
    return (
        message.received_us,
        storable(message.topic.decode("utf-8", "backslashreplace")),
        message.payload,
        message.qos,
        message.retain,
        message.properties,
        letter.route,
        letter.stage,
        storable(letter.error)[:LONGEST_ERROR],
        letter.sqlstate,
        client_id,
    )


def storable(text: str) -> str:
    """`text` as PostgreSQL can store it: NUL characters and lone surrogates are written as escapes."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def purge_older_than(connection: Connection, days: int) -> int:
    """Delete dead letters that are older than `days`; returns how many. 0 days keeps them for ever."""
    if not days:
        return 0
    with connection.cursor() as cursor:
        cursor.execute(
            "DELETE FROM mqtt_bridge.dead_letters WHERE received_at < now() - make_interval(days => %s)", (days,)
        )
        return cursor.rowcount
