"""Messages that could not be stored: kept whole, with the reason, in `mqtt_bridge.dead_letters`.

They are written in the transaction of the batch that they came in, so that a PUBACK still means durable.

What reads them again (`newest`, `get`, `summary` ...) takes a connection in autocommit mode and a `Selection`. Plain
functions: the caller's thread waits for the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from psycopg2 import sql
from psycopg2.extensions import connection as Connection

from mqtt_bridge.errors import MessageError, Stage
from mqtt_bridge.model import DeadLetter, Message, Row, Table

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
        _storable_content(message.properties),
        letter.route,
        letter.stage,
        storable(letter.error)[:LONGEST_ERROR],
        letter.sqlstate,
        client_id,
    )


def storable(text: str) -> str:
    """`text` as PostgreSQL can store it: NUL characters and lone surrogates are written as escapes."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def _storable_content(content: Any) -> Any:
    """The same for every text in JSON-like content; jsonb refuses both as well."""
    if isinstance(content, str):
        return storable(content)
    if isinstance(content, Mapping):
        return {storable(str(name)): _storable_content(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_storable_content(value) for value in content]
    return content


PURGED_AT_ONCE = 10_000


def purge_older_than(connection: Connection, days: int) -> int:
    """Delete some dead letters that are older than `days`, the oldest first; how many. 0 days keeps them for ever.

    At most `PURGED_AT_ONCE`: a statement that deleted millions would be cut off as overdue, each time it is tried.
    Those that somebody requeues at the moment are left for the next time.
    """
    if not days:
        return 0
    with connection.cursor() as cursor:
        cursor.execute(_PURGE, {"days": days, "limit": PURGED_AT_ONCE})
        return cursor.rowcount


_PURGE = """
DELETE FROM mqtt_bridge.dead_letters WHERE id IN (
    SELECT id FROM mqtt_bridge.dead_letters WHERE received_at < now() - make_interval(days => %(days)s)
    ORDER BY received_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
)
"""


# -- read again


_UNREADABLE_TOPIC = ("The topic is not UTF-8", "The topic has a NUL")
"""How the reasons begin for which `row` had to write escapes into a topic; they come from the routes."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Kept:
    """A dead letter as the table holds it. Times are aware, UTC."""

    id: int
    received_at: datetime
    topic: str
    size_bytes: int
    qos: int
    retain: bool
    properties: Mapping[str, Any] | None
    route: str | None
    stage: Stage
    error: str
    sqlstate: str | None
    client_id: str
    requeued_at: datetime | None
    payload: bytes | None = None
    """None in a list, which is made without reading payloads."""

    def message(self) -> Message:
        """The message as it came, with its arrival time. MessageError when its topic is kept in escapes only."""
        if self.stage == "route" and self.error.startswith(_UNREADABLE_TOPIC):
            reason = "The topic was not readable and is kept in escapes only: it cannot be requeued."
            raise MessageError(reason, stage="route")
        if self.payload is None:
            raise ValueError(f"the payload of dead letter {self.id} has not been read")
        received_us = (self.received_at - _EPOCH) // _MICROSECOND
        topic = self.topic.encode()
        return Message(topic, self.payload, self.qos, self.retain, received_us, properties=self.properties)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters: those that meet every condition that is set. Without any, all of them."""

    ids: tuple[int, ...] = ()
    since: datetime | None = None
    until: datetime | None = None
    """Received before this time."""
    topic_filter: str | None = None
    """An MQTT topic filter, with `+` and `#`."""
    stage: Stage | None = None
    error: str | None = None
    """Part of the reason, in upper or lower case."""
    route: str | None = None
    requeued: bool | None = None
    last_id: int | None = None
    """None later than this one."""

    @property
    def is_everything(self) -> bool:
        """Whether no condition is set."""
        return self == Selection()

    def where(self) -> sql.Composable:
        """The condition of a WHERE."""
        conditions = [
            sql.SQL(condition).format(sql.Literal(value))
            for condition, value in (
                ("id = ANY({})", list(self.ids) or None),
                ("received_at >= {}", self.since),
                ("received_at < {}", self.until),
                ("topic ~ {}", None if self.topic_filter is None else _regex(self.topic_filter)),
                ("stage = {}", self.stage),
                ("strpos(lower(error), lower({})) > 0", None if self.error is None else storable(self.error)),
                ("route = {}", None if self.route is None else storable(self.route)),
                ("(requeued_at IS NOT NULL) = {}", self.requeued),
                ("id <= {}", self.last_id),
            )
            if value is not None
        ]
        return sql.SQL(" AND ").join(conditions) if conditions else sql.SQL("true")


def _regex(topic_filter: str) -> str:
    """A topic filter as a regular expression of PostgreSQL, which knows the same escapes as Python's `re`."""
    # A wildcard in first place matches no topic that begins with $ [MQTT-4.7.2-1]; `a/#` matches `a` as well.
    guard = r"(?!\$)" if topic_filter[:1] in ("+", "#") else ""
    if topic_filter == "#":
        return f"^{guard}"
    below = topic_filter.endswith("/#")
    levels = topic_filter.removesuffix("/#").split("/")
    body = "/".join("[^/]*" if level == "+" else re.escape(level) for level in levels)
    return f"^{guard}{body}{'(/.*)?' if below else ''}$"


_LISTED = sql.SQL(
    "id, received_at, topic, octet_length(payload), qos, retain, properties, route, stage, error, sqlstate, client_id,"
    " requeued_at"
)
_WHOLE = _LISTED + sql.SQL(", payload")


def newest(connection: Connection, selection: Selection, *, limit: int) -> list[Kept]:
    """The dead letters of a selection, newest first, without their payloads."""
    statement = sql.SQL(
        "SELECT {} FROM mqtt_bridge.dead_letters WHERE {} ORDER BY received_at DESC, id DESC LIMIT {}"
    ).format(_LISTED, selection.where(), sql.Literal(limit))
    return [_kept(row) for row in _query(connection, statement)]


def get(connection: Connection, letter_id: int) -> Kept | None:
    """One dead letter, whole; None when there is none of this id."""
    statement = sql.SQL("SELECT {} FROM mqtt_bridge.dead_letters WHERE id = {}").format(_WHOLE, sql.Literal(letter_id))
    return next((_kept(row) for row in _query(connection, statement)), None)


class Group(NamedTuple):
    """Dead letters of one stage and one kind of error."""

    stage: Stage
    error: str
    """As `kind` writes it."""
    letters: int
    requeued: int
    """How many of them have been requeued."""
    topics: int
    newest_at: datetime
    newest_id: int


def kind(error: str) -> str:
    """What many errors have in common: the first line, `#` for each number, and nothing of a detail at the end."""
    return re.sub(r"([ (])(0x[0-9a-f]+|[0-9]+)", r"\1#", re.sub(r" \(.*\)\.$", ".", error.partition("\n")[0]))


_KIND = sql.SQL(
    r"regexp_replace(regexp_replace(split_part(error, E'\n', 1), ' \(.*\)\.$', '.'),"
    r" '([ (])(0x[0-9a-f]+|[0-9]+)', '\1#', 'g')"
)
"""The same as `kind`, for PostgreSQL."""


def summary(connection: Connection, selection: Selection, *, limit: int) -> list[Group]:
    """How many there are of each stage and kind of error, the most frequent first."""
    statement = sql.SQL(
        "SELECT stage, {}, count(*), count(requeued_at), count(DISTINCT topic), max(received_at), max(id)"
        " FROM mqtt_bridge.dead_letters WHERE {} GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2 LIMIT {}"
    ).format(_KIND, selection.where(), sql.Literal(limit))
    groups = (Group(*row) for row in _query(connection, statement))
    return [group._replace(newest_at=group.newest_at.astimezone(UTC)) for group in groups]


# -- taken in hand: requeued, deleted


def bounded(connection: Connection, selection: Selection) -> tuple[Selection, int]:
    """The selection without what may come later, so that work on it has an end; and how many letters that is."""
    statement = sql.SQL("SELECT coalesce(max(id), 0), count(*) FROM mqtt_bridge.dead_letters WHERE {}")
    ((last_id, count),) = _query(connection, statement.format(selection.where()))
    return replace(selection, last_id=last_id), count


def sizes(connection: Connection, selection: Selection, *, after: int, limit: int) -> list[tuple[int, int]]:
    """(id, bytes of payload) of the next dead letters after the id `after`, in the order of ids."""
    statement = sql.SQL(
        "SELECT id, octet_length(payload) FROM mqtt_bridge.dead_letters WHERE {} AND id > {} ORDER BY id LIMIT {}"
    ).format(selection.where(), sql.Literal(after), sql.Literal(limit))
    return [(letter_id, size) for letter_id, size in _query(connection, statement)]


def lock(connection: Connection, ids: Sequence[int]) -> list[Kept]:
    """Lock those of these dead letters that are not requeued, and that nobody else has locked, until COMMIT."""
    statement = sql.SQL(
        "SELECT {} FROM mqtt_bridge.dead_letters WHERE id = ANY({}) AND requeued_at IS NULL ORDER BY id"
        " FOR UPDATE SKIP LOCKED"
    ).format(_WHOLE, sql.Literal(list(ids)))
    return [_kept(row) for row in _query(connection, statement)]


def mark_requeued(connection: Connection, ids: Sequence[int]) -> None:
    """Write that these are requeued; in the transaction that stores their rows."""
    with connection.cursor() as cursor:
        cursor.execute("UPDATE mqtt_bridge.dead_letters SET requeued_at = now() WHERE id = ANY(%s)", (list(ids),))


def delete(connection: Connection, selection: Selection, ids: Sequence[int]) -> int:
    """Delete those of these dead letters that (still) belong to the selection; returns how many."""
    statement = sql.SQL("DELETE FROM mqtt_bridge.dead_letters WHERE id = ANY({}) AND {}")
    with connection.cursor() as cursor:
        cursor.execute(statement.format(sql.Literal(list(ids)), selection.where()))
        return cursor.rowcount


def _query(connection: Connection, statement: sql.Composable) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall()


def _kept(row: tuple[Any, ...]) -> Kept:
    letter = Kept(*row)
    return replace(
        letter,
        received_at=letter.received_at.astimezone(UTC),
        requeued_at=letter.requeued_at and letter.requeued_at.astimezone(UTC),
        payload=None if letter.payload is None else bytes(letter.payload),  # psycopg2 gives a memoryview
    )
