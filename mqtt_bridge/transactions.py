"""One try to commit one batch: rows, dead letters and ledger row together, or not at all.

The first try is a COPY of everything, in one round trip with the ledger row. When a row is at fault the batch is
taken apart in a second transaction (`isolation`), and every message that the server refuses becomes a dead letter.
A row whose natural key is there already is not at fault: its batch goes again by way of `natural_keys`.

Invariants: one transaction a try; the ledger row comes first, so a batch that an earlier try has committed shows
itself before a row is written twice; a row at fault costs its message, never the batch.

Threads: the workers call `Transactions.run`, each with its own connection. The encoders are safe to share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import psycopg2
import structlog
from psycopg2 import extensions, sql
from psycopg2.extensions import cursor as Cursor

from mqtt_bridge import copying, dead_letters, isolation, natural_keys, ownership, schema
from mqtt_bridge.breaker import Breaker
from mqtt_bridge.connections import BridgeConnection
from mqtt_bridge.errors import ROW_BUILDING, Failure, SinkError, classify
from mqtt_bridge.isolation import AT_FAULT, by_table
from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.model import READINGS_COLUMNS, DeadLetter, Message, Table, Translated
from mqtt_bridge.ownership import AlreadyCommitted
from mqtt_bridge.readings import Readings

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one transaction stores. Never changes, however often it is tried."""

    entry: Entry
    translated: Sequence[Translated]
    dead_letters: Sequence[DeadLetter]
    messages: Sequence[Message] = ()
    """All of them as they were received, those that are ignored as well: what goes to the disk."""
    also: Sequence[Entry] = ()
    """Further keys: several batches that come from the disk are stored in one transaction."""

    @property
    def keys(self) -> tuple[BatchKey, ...]:
        """All of its keys."""
        return (self.entry.key, *(entry.key for entry in self.also))


@dataclass(frozen=True, slots=True)
class Stored:
    """What a committed batch left in the database."""

    rows: dict[str, int] = field(default_factory=dict)
    """Rows by table: those that are new, or were changed. Where another process may have committed the batch, all of
    them."""
    refused: tuple[DeadLetter, ...] = ()
    """Dead letters made here: messages whose rows the server refused."""


class Transactions:
    """Commits batches as the owner of `client_id`."""

    def __init__(self, *, client_id: str, statement_timeout_s: float) -> None:
        self._client_id = client_id
        self._begin = begin(statement_timeout_s)
        self.owner_epoch = 0
        """Of this process: only while it is the newest does a transaction commit."""
        self._dead_letters = copying.encoder(dead_letters.TYPES)
        self._breaker = Breaker()
        self._conflicts = natural_keys.Conflicts()
        # By the keys of a transaction whose COMMIT was sent and whose answer has not been seen: what it holds.
        self._in_doubt: dict[tuple[BatchKey, ...], Stored] = {}

    def run(self, connection: BridgeConnection, batch: Batch) -> Stored:
        """Commit `batch`. Any error but `Fenced` means: not committed, or not known to be; try again, same batch.

        `AlreadyCommitted` where one of several keys was committed before: only each alone can tell which.
        """
        try:
            stored = self._store(connection, batch, self._conflicts.expected(_tables(batch)))
        except AlreadyCommitted:
            # That one of several keys is known proves something for all only if they were committed together.
            if batch.also and batch.keys not in self._in_doubt:
                raise
            log.info("a batch whose commit was in doubt had been committed", batch=batch.entry.key.batch)
            stored = self._in_doubt.get(batch.keys, Stored(_count(batch.translated)))
        for keys in (batch.keys, *((key,) for key in batch.keys)):
            self._in_doubt.pop(keys, None)
        return stored

    def _store(self, connection: BridgeConnection, batch: Batch, merging: frozenset[Table]) -> Stored:
        """Store a batch whose rows go into the tables of `merging` by way of others (see `natural_keys`)."""
        try:
            return self._whole(connection, batch, merging)
        except (psycopg2.Error, *ROW_BUILDING) as caught:
            if classify(caught, connected=not connection.closed).verdict not in AT_FAULT:
                raise
            error = caught
        try:
            _rollback(connection)
            if conflicting := natural_keys.in_conflict(error, _tables(batch)) - merging:
                self._conflicts.met(conflicting)
                return self._store(connection, batch, merging | conflicting)
            return self._take_apart(connection, batch, error, merging)
        finally:
            # An error knows this frame, and the data of the batch; kept here it would be a cycle, and stay for long.
            del error

    def _commit(self, connection: BridgeConnection, cursor: Cursor, batch: Batch, stored: Stored) -> Stored:
        """The point of no return: if no answer comes, only the ledger knows whether this happened."""
        self._in_doubt[batch.keys] = stored
        # By now the rows hold locks that keep the tables from being altered. The checks cost no round trip.
        cursor.execute("".join(connection.checks[table] for table in stored.rows) + "COMMIT")
        return stored

    # -- all at once

    def _whole(self, connection: BridgeConnection, batch: Batch, merging: frozenset[Table]) -> Stored:
        present: Counter[str] = Counter()
        with connection.cursor() as cursor, _reading_the_ledger():
            # One string, one round trip: BEGIN, settings, ledger and the first COPY together.
            statement: sql.Composable = self._prologue(batch)
            copies = self._copies(connection, batch.translated, batch.dead_letters)
            for table, data in copies:
                if table in merging:
                    present[table.name] += self._merge(cursor, statement, table, data)
                else:
                    copying.send(cursor, statement + copying.statement(table), data)
                    self._conflicts.missed(table)
                statement = sql.SQL("")
            if not copies:  # nothing but the ledger row, see `Ledger.lags`
                cursor.execute(statement)
            stored = self._commit(connection, cursor, batch, Stored(_count(batch.translated, present)))
        if batch.translated:
            self._breaker.stored()
        return stored

    def _merge(self, cursor: Cursor, before: sql.Composable, table: Table, data: bytes) -> int:
        """Returns how many rows were there already."""
        present = natural_keys.send(cursor, before + natural_keys.create(table), table, data)
        if not present and table.on_conflict == "nothing":
            self._conflicts.missed(table)
        return present

    def _prologue(self, batch: Batch) -> sql.Composable:
        bookkeeping = [
            ownership.statements(self._client_id, entry, owner_epoch=self.owner_epoch)
            for entry in (batch.entry, *batch.also)
        ]
        return sql.SQL(" ").join([self._begin, *bookkeeping, sql.SQL("")])

    def _copies(
        self, connection: BridgeConnection, translated: Sequence[Translated], letters: Sequence[DeadLetter]
    ) -> list[tuple[Table, bytes]]:
        """COPY data for each table that is written to."""
        copies = [
            (table, self._encoder(connection, table)(rows))
            for table, rows in by_table(translation for _, translation in translated).items()
        ]
        if letters:
            data = self._dead_letters([[dead_letters.row(letter, self._client_id) for letter in letters]])
            copies.append((dead_letters.TABLE, data))
        return copies

    def _encoder(self, connection: BridgeConnection, table: Table) -> copying.Encoder:
        if table not in connection.encoders:
            # The check first: a change in between is then seen by it.
            connection.checks[table.name] = self._make_check(connection, table)
            if table.key:
                natural_keys.verify(connection, table)
            connection.encoders[table] = self._make_encoder(connection, table)
        return connection.encoders[table]

    def _make_check(self, connection: BridgeConnection, table: Table) -> str:
        """Binary COPY takes eight bytes for eight bytes: a type that is changed beneath the encoder makes garbage."""
        shape = schema.shape_of(connection, table.name)
        with connection.cursor() as cursor:
            cursor.execute(sql.SQL("SELECT {}").format(shape))
            (present,) = cursor.fetchone() or (None,)
        changed = sql.SQL("{} IS DISTINCT FROM {}").format(shape, sql.Literal(present))
        return ownership.refuse_if(changed, self._client_id).as_string(connection) + " "

    def _make_encoder(self, connection: BridgeConnection, table: Table) -> copying.Encoder:
        """Made from the catalogue: binary COPY would take eight bytes of anything for eight bytes of anything else."""
        if table.columns == READINGS_COLUMNS:
            schema.verify(connection)
            return copying.encode_readings
        types = {column.name: column.type for column in schema.columns_of(connection, table.name)}
        return copying.encoder([types[name] for name in table.columns])

    # -- taken apart

    def _take_apart(
        self, connection: BridgeConnection, batch: Batch, error: Exception, merging: frozenset[Table]
    ) -> Stored:
        """Store all that can be stored, and make dead letters of the messages that the server refuses."""
        with connection.cursor() as cursor, _reading_the_ledger():
            # Immediate, since a deferred constraint would fail at COMMIT, naming no row.
            cursor.execute(self._prologue(batch) + sql.SQL("SET CONSTRAINTS ALL IMMEDIATE"))
            present: Counter[str] = Counter()
            refused = self.isolate(connection, cursor, batch.translated, error=error, merging=merging, present=present)
            self._pause_if_the_database_is_at_fault(batch, refused)
            letters = [
                DeadLetter(message, translation.route, "store", failure.sentence, failure.sqlstate)
                for (message, translation), failure in refused
            ]
            for table, data in self._copies(connection, [], [*batch.dead_letters, *letters]):
                copying.send(cursor, copying.statement(table), data)
            lost = {id(translated) for translated, _ in refused}
            kept = [translated for translated in batch.translated if id(translated) not in lost]
            return self._commit(connection, cursor, batch, Stored(_count(kept, present), tuple(letters)))

    def isolate(
        self,
        connection: BridgeConnection,
        cursor: Cursor,
        translated: Sequence[Translated],
        *,
        error: Exception | None = None,
        merging: frozenset[Table] = frozenset(),
        present: Counter[str] | None = None,
    ) -> list[tuple[Translated, Failure]]:
        """Store what can be stored of `translated`; returns what cannot. See `isolation.isolate`."""
        return isolation.isolate(
            cursor,
            translated,
            lambda table, parts: self._encoder(connection, table)(parts),
            error=error,
            merging=merging,
            present=present,
        )

    def _pause_if_the_database_is_at_fault(self, batch: Batch, refused: Sequence[tuple[Translated, Failure]]) -> None:
        reason = _reason(refused) if len(refused) == len(batch.translated) else None
        if reason is None:
            self._breaker.stored()
            return
        rows = sum(len(translation.rows) for _, translation in batch.translated)
        if self._breaker.refused(reason, rows=rows, topics={message.topic for message, _ in batch.translated}):
            raise SinkError(f"every row of every topic is refused alike, as by a changed table: {refused[0][1]}")


def _reason(refused: Sequence[tuple[Translated, Failure]]) -> str | None:
    """The one reason for which all of these were refused; None where there are several."""
    reasons = {failure.sqlstate or failure.sentence for _, failure in refused}
    return reasons.pop() if len(reasons) == 1 else None


def begin(statement_timeout_s: float) -> sql.Composable:
    """BEGIN with the limits of a batch. SET LOCAL, since PgBouncer refuses or forgets settings of the session."""
    return sql.SQL(
        "BEGIN; SET LOCAL statement_timeout = {}; SET LOCAL lock_timeout = '10s';"
        " SET LOCAL idle_in_transaction_session_timeout = '30s'; SET LOCAL synchronous_commit = on;"
    ).format(sql.Literal(f"{int(statement_timeout_s * 1000)}ms"))


@contextmanager
def _reading_the_ledger() -> Iterator[None]:
    """Turns what the ledger's constraints refuse into `Fenced`, `AlreadyCommitted` and `TableAltered`."""
    try:
        yield
    except psycopg2.Error as error:
        ownership.interpret(error)
        raise


def _rollback(connection: BridgeConnection) -> None:
    if connection.info.transaction_status != extensions.TRANSACTION_STATUS_IDLE:
        with connection.cursor() as cursor:
            cursor.execute("ROLLBACK")


def _tables(batch: Batch) -> Iterator[Table]:
    return (translation.table for _, translation in batch.translated)


def _count(translated: Sequence[Translated], present: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
    """Rows by table, less those that were `present`; a table stays, though none of its rows was new."""
    counts: Counter[str] = Counter()
    for table, parts in by_table(translation for _, translation in translated).items():
        counts[table.name] += sum([part.size if type(part) is Readings else len(part) for part in parts])
    return {name: count - present.get(name, 0) for name, count in counts.items()}
