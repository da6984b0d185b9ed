"""Ledger and ownership in PostgreSQL: the statements that keep what `ledger` knows, and that fence older processes.

A client id has one owner, the process that claimed it last. Every batch is committed under a shared advisory lock and
only while its process is the owner; claiming takes the lock exclusively, and so waits until every older transaction
has ended before it reads the ledger.

Threads: none of its own. Every function is given a connection, or makes SQL for a transaction of the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import connection as Connection

from mqtt_bridge.errors import Fenced, TableAltered
from mqtt_bridge.ledger import BatchKey, Claim, Entry


def lock_key(client_id: str) -> sql.Composable:
    """The advisory lock of a client id: exclusive to take it over, shared to commit under it."""
    return sql.SQL("hashtextextended('mqtt_bridge owner ' || {}, 0)").format(sql.Literal(client_id))


def claim(connection: Connection, client_id: str) -> Claim:
    """Take over `client_id`: from now on every older process is fenced. Runs in its own transaction.

    The exclusive lock waits until every transaction of older processes has ended; the ledger is read in a later
    statement, with a new snapshot, and so sees all that they committed.
    """
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute(sql.SQL("SELECT pg_advisory_xact_lock({})").format(lock_key(client_id)))
        cursor.execute(_TAKE_OVER, {"client_id": client_id})
        owner_epoch, session_epoch, subscriptions = cursor.fetchone() or (0, 0, None)
        cursor.execute(_FORGET_OLD_SESSIONS, {"client_id": client_id, "session_epoch": session_epoch})
        cursor.execute(_READ, {"client_id": client_id})
        entries = tuple(
            Entry(BatchKey(epoch, batch), session_epoch, first, bytes(fingerprints))
            for epoch, batch, first, fingerprints in cursor.fetchall()
        )
        cursor.execute("COMMIT")
    return Claim(owner_epoch, session_epoch, entries, frozenset((subscriptions or "").splitlines()))


_TAKE_OVER = """
INSERT INTO mqtt_bridge.owners AS o (client_id, owner_epoch, session_epoch) VALUES (%(client_id)s, 1, 1)
ON CONFLICT (client_id) DO UPDATE SET owner_epoch = o.owner_epoch + 1, last_seen = now()
RETURNING owner_epoch, session_epoch, subscriptions
"""
_FORGET_OLD_SESSIONS = """
DELETE FROM mqtt_bridge.ledger
WHERE client_id = %(client_id)s AND (session_epoch < %(session_epoch)s OR entries = '')
"""
_READ = """
SELECT owner_epoch, batch, first_position, entries FROM mqtt_bridge.ledger
WHERE client_id = %(client_id)s ORDER BY owner_epoch, batch
"""


def check_owner(connection: Connection, client_id: str, *, owner_epoch: int) -> None:
    """`Fenced` when the client id has a new owner."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT owner_epoch FROM mqtt_bridge.owners WHERE client_id = %s", (client_id,))
        if cursor.fetchone() != (owner_epoch,):
            raise Fenced(_FENCED)


def raise_session(connection: Connection, client_id: str, *, owner_epoch: int, session_epoch: int) -> None:
    """Write a raised session epoch, in a transaction of its own. `Fenced` when the client id has a new owner."""
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute(sql.SQL("SELECT pg_advisory_xact_lock({})").format(lock_key(client_id)))
        cursor.execute(_RAISE, {"client_id": client_id, "owner_epoch": owner_epoch, "session_epoch": session_epoch})
        raised = cursor.rowcount
        cursor.execute("COMMIT")
    if not raised:
        raise Fenced(_FENCED)


_RAISE = """
UPDATE mqtt_bridge.owners SET session_epoch = greatest(session_epoch, %(session_epoch)s), subscriptions = NULL
WHERE client_id = %(client_id)s AND owner_epoch = %(owner_epoch)s
"""
_FENCED = "another process has taken over this client id"


def note_subscriptions(connection: Connection, client_id: str, filters: Iterable[str], *, owner_epoch: int) -> None:
    """Remember which filters the session at the broker has, so that one that is dropped can be unsubscribed later."""
    with connection.cursor() as cursor:
        cursor.execute(_NOTE_SUBSCRIPTIONS, ("\n".join(sorted(filters)), client_id, owner_epoch))


_NOTE_SUBSCRIPTIONS = "UPDATE mqtt_bridge.owners SET subscriptions = %s WHERE client_id = %s AND owner_epoch = %s"


def statements(client_id: str, entry: Entry) -> sql.Composable:
    """What a batch's transaction runs before its rows: shared lock, fence, ledger row, pruning.

    The row's client_id is looked up among the owners of this very epoch: once another process has taken over it is
    NULL, and the NOT NULL constraint is the fence. A key that is there already violates the primary key: this batch
    was committed by an earlier try. `interpret` reads both.
    """
    me = sql.Literal(client_id)
    parts = [sql.SQL("SELECT pg_advisory_xact_lock_shared({});").format(lock_key(client_id))]
    if entry.raises_session:
        parts.append(_RAISE_ON_THE_WAY.format(session=sql.Literal(entry.session_epoch), client_id=me))
    parts.append(
        _WRITE.format(
            client_id=me,
            owner_epoch=sql.Literal(entry.key.owner_epoch),
            batch=sql.Literal(entry.key.batch),
            session_epoch=sql.Literal(entry.session_epoch),
            first_position=sql.Literal(entry.first_position),
            entries=sql.Literal(psycopg2.Binary(entry.fingerprints)),
        )
    )
    if entry.pruned:
        parts.append(_pruning(client_id, entry.pruned))
    return sql.SQL(" ").join(parts)


def _pruning(client_id: str, keys: Sequence[BatchKey]) -> sql.Composed:
    pairs = sql.SQL(", ").join(sql.SQL("({}, {})").format(sql.Literal(e), sql.Literal(b)) for e, b in keys)
    return _PRUNE.format(client_id=sql.Literal(client_id), keys=pairs)


def prune(connection: Connection, client_id: str, keys: Sequence[BatchKey]) -> None:
    """Delete these ledger rows, where no batch comes that could do so on its way."""
    with connection.cursor() as cursor:
        cursor.execute(_pruning(client_id, keys))


_RAISE_ON_THE_WAY = sql.SQL(
    "UPDATE mqtt_bridge.owners SET session_epoch = greatest(session_epoch, {session}), subscriptions = NULL"
    " WHERE client_id = {client_id};"
)
_WRITE = sql.SQL(
    "INSERT INTO mqtt_bridge.ledger (client_id, owner_epoch, batch, session_epoch, first_position, entries) VALUES ("
    "(SELECT client_id FROM mqtt_bridge.owners WHERE client_id = {client_id} AND owner_epoch = {owner_epoch}),"
    " {owner_epoch}, {batch}, {session_epoch}, {first_position}, {entries});"
)
_PRUNE = sql.SQL("DELETE FROM mqtt_bridge.ledger WHERE client_id = {client_id} AND (owner_epoch, batch) IN ({keys});")


def refuse_if(condition: sql.Composable, client_id: str) -> sql.Composable:
    """A statement that fails where `condition` holds: a ledger row without a key. `interpret` reads the failure."""
    return _REFUSE.format(client_id=sql.Literal(client_id), condition=condition)


_REFUSE = sql.SQL("INSERT INTO mqtt_bridge.ledger (client_id) SELECT {client_id} WHERE {condition};")


class AlreadyCommitted(Exception):
    """The key of this batch is in the ledger: an earlier try was committed although its answer was lost."""


def interpret(error: psycopg2.Error) -> None:
    """Raise what `error` means where it is the ledger's answer; return where it is not.

    `Fenced`, `AlreadyCommitted`, or `TableAltered` for what `refuse_if` has refused.
    """
    if error.diag is None or error.diag.schema_name != "mqtt_bridge" or error.diag.table_name != "ledger":
        return
    if error.pgcode == "23502" and error.diag.column_name == "client_id":
        raise Fenced(_FENCED) from error
    if error.pgcode == "23502" and error.diag.column_name == "owner_epoch":
        raise TableAltered from error
    if error.pgcode == "23505":
        raise AlreadyCommitted from error
