"""Ledger and ownership in PostgreSQL: the statements that keep what `ledger` knows, and that fence older processes.

A client id has one owner, the process that claimed it last. Every batch is committed under a shared advisory lock and
only while its process is the owner; claiming takes the lock exclusively, and so waits until every older transaction
has ended before it reads the ledger.

Threads: none of its own. Every function is given a connection, or makes SQL for a transaction of the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import connection as Connection

from mqtt_bridge.errors import BridgeError, Fenced, SpoolElsewhere, TableAltered
from mqtt_bridge.ledger import BatchKey, Claim, Entry
from mqtt_bridge.retained import Remembered


def lock_key(client_id: str) -> sql.Composable:
    """The advisory lock of a client id: exclusive to take it over, shared to commit under it."""
    return sql.SQL("hashtextextended('mqtt_bridge owner ' || {}, 0)").format(sql.Literal(client_id))


@dataclass(frozen=True, slots=True)
class SpoolAtHand:
    """What a process that claims a client id knows of the disk that it has brought along."""

    id: str | None = None
    """None where it has none, or an empty one that it does not want to use."""
    accepts: frozenset[str] = frozenset()
    """Further ids that may stand in `owners.spool_id`: of an empty spool, or of one that is given up on purpose."""
    keys: Container[BatchKey] = frozenset()
    """Batches that wait on it."""
    owner_epoch: int = 0
    """The newest process that they are from: no later one may ever make the same keys, though the database may have
    forgotten it, as after a restore from a backup."""
    session_epoch: int = 1
    """The newest session that they know of: the database may not have heard of it yet."""


NO_SPOOL = SpoolAtHand()


def claim(
    connection: Connection, client_id: str, spool: SpoolAtHand = NO_SPOOL, *, member_of: str | None = None
) -> Claim:
    """Take over `client_id`: from now on every older process is fenced. Runs in its own transaction.

    `member_of` is the MQTT_CLIENT_ID of the bridge that has a process for this client id; None leaves what is noted.

    The exclusive lock waits until every transaction of older processes has ended; the ledger is read in a later
    statement, with a new snapshot, and so sees all that they committed. `SpoolElsewhere` when acknowledged messages
    may lie on a disk that is not at hand: then nothing is taken over.
    """
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute(sql.SQL("SELECT pg_advisory_xact_lock({})").format(lock_key(client_id)))
        cursor.execute("SELECT spool_id FROM mqtt_bridge.owners WHERE client_id = %s", (client_id,))
        _check_disk((cursor.fetchone() or (None,))[0], spool)
        values = {"client_id": client_id, "spool_id": spool.id, "member_of": member_of}
        epochs = {"spooled_epoch": spool.owner_epoch, "session_epoch": spool.session_epoch}
        cursor.execute(_TAKE_OVER, values | epochs)
        owner_epoch, session_epoch, subscriptions, retained = cursor.fetchone() or (0, 0, None, None)
        cursor.execute(_READ, {"client_id": client_id})
        entries = [
            Entry(BatchKey(epoch, batch), session, first, bytes(fingerprints))
            for epoch, batch, session, first, fingerprints in cursor.fetchall()
        ]
        # A row of a batch that is in the spool stays, though its entries match nothing: the batch will be tried again.
        rest = [entry for entry in entries if entry.key not in spool.keys]
        known = [entry for entry in rest if entry.session_epoch == session_epoch and entry.fingerprints]
        if needless := {entry.key for entry in rest}.difference(entry.key for entry in known):
            cursor.execute(_pruning(client_id, needless))
        cursor.execute("COMMIT")
    filters = frozenset(filter(None, (subscriptions or "").split("\n")))
    return Claim(owner_epoch, session_epoch, tuple(known), filters, Remembered.parse(retained))


def _check_disk(spool_id: str | None, spool: SpoolAtHand) -> None:
    if spool_id is not None and spool_id != spool.id and spool_id not in spool.accepts:
        raise SpoolElsewhere(spool_id)


# Epochs are milliseconds of the server's clock, and rise by one at least. None comes twice: not after a retirement, not
# when the database is restored from a backup, not in another cluster that a process meets under the same address.
_TAKE_OVER = """
INSERT INTO mqtt_bridge.owners AS o (client_id, owner_epoch, session_epoch, spool_id, member_of)
VALUES (%(client_id)s, greatest((extract(epoch FROM clock_timestamp()) * 1000)::bigint, %(spooled_epoch)s + 1),
  %(session_epoch)s, %(spool_id)s, %(member_of)s)
ON CONFLICT (client_id) DO UPDATE SET owner_epoch = greatest(o.owner_epoch + 1, excluded.owner_epoch),
  last_seen = now(), spool_id = %(spool_id)s, member_of = coalesce(%(member_of)s, o.member_of),
  session_epoch = greatest(o.session_epoch, %(session_epoch)s),
  subscriptions = CASE WHEN o.session_epoch >= %(session_epoch)s THEN o.subscriptions END
RETURNING owner_epoch, session_epoch, subscriptions, retained_seen
"""
_READ = """
SELECT owner_epoch, batch, session_epoch, first_position, entries FROM mqtt_bridge.ledger
WHERE client_id = %(client_id)s ORDER BY owner_epoch, batch
"""


def release_spool(connection: Connection, client_id: str, *, owner_epoch: int) -> None:
    """The spool is empty, and nothing will be put into it any more: a successor does not need its disk."""
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE mqtt_bridge.owners SET spool_id = NULL WHERE client_id = %s AND owner_epoch = %s",
            (client_id, owner_epoch),
        )


def check_owner(connection: Connection, client_id: str, *, owner_epoch: int) -> None:
    """`Fenced` when the client id has a new owner."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT owner_epoch FROM mqtt_bridge.owners WHERE client_id = %s", (client_id,))
        if cursor.fetchone() != (owner_epoch,):
            raise Fenced(_FENCED)


@dataclass(frozen=True, slots=True)
class Known:
    """What the database knows of a client id."""

    subscriptions: frozenset[str]
    spool_id: str | None
    """The disk that may hold messages which were acknowledged under this client id, and are not stored yet."""
    claimed_at: datetime


def look_up(connection: Connection, client_id: str) -> Known | None:
    """What is known of `client_id`, claiming nothing; None where it is unknown, or the tables are not there yet."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass('mqtt_bridge.owners') IS NOT NULL")
        if cursor.fetchone() != (True,):
            return None
        cursor.execute(_LOOK_UP, (client_id,))
        row = cursor.fetchone()
    return None if row is None else Known(frozenset((row[0] or "").splitlines()), row[1], row[2])


_LOOK_UP = "SELECT subscriptions, spool_id, last_seen FROM mqtt_bridge.owners WHERE client_id = %s"


def former_members(connection: Connection, member_of: str, present: Sequence[str]) -> list[str]:
    """Client ids that the bridge `member_of` once had a process for, and are not among those it has now.

    What is noted decides, never the look of a name: `X-1` may well be somebody else's.
    """
    with connection.cursor() as cursor:
        cursor.execute(_FORMER_MEMBERS, (member_of, list(present)))
        return [client_id for (client_id,) in cursor.fetchall()]


_FORMER_MEMBERS = """
SELECT client_id FROM mqtt_bridge.owners
WHERE coalesce(member_of, client_id) = %s AND client_id <> ALL (%s) ORDER BY client_id
"""


def retire(connection: Connection, client_id: str, *, owner_epoch: int, end_session: Callable[[], object]) -> int:
    """Have the session ended, and forget the client id; returns how many ledger rows it had left.

    Under the exclusive lock from the question who owns the client id to the COMMIT: a bridge that starts under it
    meanwhile waits, and finds neither session nor ledger. `Fenced` when it came before. Without a row an earlier try
    was committed: the session may already be another's, and is left alone. `SpoolLeft` when the owner before has begun
    to spool just before it was fenced.
    """
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute(sql.SQL("SELECT pg_advisory_xact_lock({})").format(lock_key(client_id)))
        cursor.execute(_OWNER, (client_id,))
        owner = cursor.fetchone()
        if owner is not None:
            if owner[0] != owner_epoch:
                raise Fenced(_FENCED)
            if owner[1]:
                raise SpoolLeft(client_id, owner[1])
            end_session()
        # Now nothing can be redelivered, and no older process can commit: nobody needs the ledger any more.
        cursor.execute("DELETE FROM mqtt_bridge.ledger WHERE client_id = %s", (client_id,))
        forgotten = cursor.rowcount
        cursor.execute("DELETE FROM mqtt_bridge.owners WHERE client_id = %s", (client_id,))
        cursor.execute("COMMIT")
    return forgotten


class SpoolLeft(BridgeError):
    """A disk may hold messages that were acknowledged under this client id, and are not in the database."""

    def __init__(self, client_id: str, spool_id: str) -> None:
        super().__init__(
            f"{client_id!r} may still have messages in a disk buffer ({spool_id}), which were acknowledged and are not"
            " in the database yet. Stop its bridge, set BRIDGE_SPOOL_DIR to that buffer, and retire it again."
        )


_OWNER = "SELECT owner_epoch, spool_id FROM mqtt_bridge.owners WHERE client_id = %s FOR UPDATE"


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


def note_retained(connection: Connection, client_id: str, retained: Remembered, *, owner_epoch: int) -> None:
    """Remember whose retained messages were stored; unlike subscriptions this outlives the session."""
    with connection.cursor() as cursor:
        cursor.execute(_NOTE_RETAINED, (str(retained), client_id, owner_epoch))


_NOTE_RETAINED = "UPDATE mqtt_bridge.owners SET retained_seen = %s WHERE client_id = %s AND owner_epoch = %s"


def statements(client_id: str, entry: Entry, *, owner_epoch: int) -> sql.Composable:
    """What a batch's transaction runs before its rows: shared lock, fence, ledger row, pruning.

    The row's client_id is looked up among the owners of `owner_epoch`: once another process has taken over it is NULL,
    and the NOT NULL constraint is the fence. The row itself carries the batch's own epoch, which is an older one where
    the batch comes from the spool. A key that is there already violates the primary key: this batch was committed by
    an earlier try. `interpret` reads both.
    """
    me = sql.Literal(client_id)
    parts = [sql.SQL("SELECT pg_advisory_xact_lock_shared({});").format(lock_key(client_id))]
    if entry.raises_session:
        parts.append(_RAISE_ON_THE_WAY.format(session=sql.Literal(entry.session_epoch), client_id=me))
    parts.append(
        _WRITE.format(
            client_id=me,
            current_epoch=sql.Literal(owner_epoch),
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


def _pruning(client_id: str, keys: Iterable[BatchKey]) -> sql.Composed:
    spans = [
        _SPAN.format(sql.Literal(owner_epoch), sql.Literal(first), sql.Literal(last))
        for owner_epoch, first, last in _spans(keys)
    ]
    return _PRUNE.format(client_id=sql.Literal(client_id), spans=sql.SQL(" OR ").join(spans))


def _spans(keys: Iterable[BatchKey]) -> Iterator[tuple[int, int, int]]:
    """The keys as owner epoch, first and last batch without a gap: nearly always a single one."""
    # Keys that follow each other are as far from their index as their neighbours.
    for (owner_epoch, _), group in groupby(enumerate(sorted(keys)), lambda item: (item[1][0], item[1][1] - item[0])):
        batches = [key.batch for _, key in group]
        yield owner_epoch, batches[0], batches[-1]


def prune(connection: Connection, client_id: str, keys: Sequence[BatchKey]) -> None:
    """Delete these ledger rows, where no batch comes that could do so on its way."""
    with connection.cursor() as cursor:
        cursor.execute(_pruning(client_id, keys))


_RAISE_ON_THE_WAY = sql.SQL(
    "UPDATE mqtt_bridge.owners SET session_epoch = greatest(session_epoch, {session}), subscriptions = NULL"
    " WHERE client_id = {client_id} AND session_epoch < {session};"
)
_WRITE = sql.SQL(
    "INSERT INTO mqtt_bridge.ledger (client_id, owner_epoch, batch, session_epoch, first_position, entries) VALUES ("
    "(SELECT client_id FROM mqtt_bridge.owners WHERE client_id = {client_id} AND owner_epoch = {current_epoch}),"
    " {owner_epoch}, {batch}, {session_epoch}, {first_position}, {entries});"
)
_PRUNE = sql.SQL("DELETE FROM mqtt_bridge.ledger WHERE client_id = {client_id} AND ({spans});")
_SPAN = sql.SQL("(owner_epoch = {} AND batch BETWEEN {} AND {})")


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
