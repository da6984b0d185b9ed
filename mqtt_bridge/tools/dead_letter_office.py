"""Where undeliverable mail is opened: stores dead letters by today's routes, or deletes them, a chunk at a time.

Requeuing is exactly once. The rows of a letter and its `requeued_at` are written by one transaction, under the lock of
the letter's row, and only a letter whose `requeued_at` is still NULL is taken. So whatever ends a run (kill -9, Ctrl-C,
a crash of the server, a COMMIT whose answer is lost), a letter has either both or neither, and the next run finds out
by looking: what was committed is marked and left alone, what was not is there to be taken. Nothing has to be
remembered outside the database, and an error never has to be understood before it is safe to run again. Two runs at
the same time never have the same letter: what one has locked the other skips (SKIP LOCKED), and what one has
committed the other finds marked, since PostgreSQL looks at a row again once it is locked (READ COMMITTED).

A letter that fails again is left as it is. A row that the server refuses costs its letter only: chunks are stored by
`isolation`, under savepoints. Anything else that the server says (no such table, a lost
connection) ends the run with that error; the chunk in hand is rolled back, all before it stay.

Everything runs in the caller's thread, on one connection in autocommit mode.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psycopg2
from psycopg2 import sql

from mqtt_bridge import dead_letters
from mqtt_bridge.connections import BridgeConnection
from mqtt_bridge.dead_letters import Kept, Selection
from mqtt_bridge.errors import Failure, MessageError, Stage
from mqtt_bridge.model import Tally, Translated, Translation
from mqtt_bridge.routes import Router
from mqtt_bridge.transactions import Transactions, begin

REQUEUE_CHUNK = 200
"""Most letters that are locked, and stored, by one transaction."""
REQUEUE_CHUNK_BYTES = 1 << 20
"""Most bytes of their payloads, but for a single letter that is larger: each byte can become a hundred of rows."""
PURGE_CHUNK = 1_000


@dataclass(slots=True)
class Report:
    """What became of the letters so far. `seen` is the sum of all outcomes."""

    stored: int = 0
    rows: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    """By reason. Today's routes want nothing of these: they are marked as requeued, and no row is stored."""
    failing: Counter[tuple[Stage, str]] = field(default_factory=Counter)
    """Letters that fail again, by stage and kind of error; left as they are."""
    examples: dict[tuple[Stage, str], int] = field(default_factory=dict)
    """The id of one letter for each entry of `failing`."""
    elsewhere: int = 0
    """Letters that another run had in hand or had finished, or that were deleted meanwhile."""

    @property
    def seen(self) -> int:
        """Letters that have been looked at."""
        return self.stored + self.ignored.total() + self.failing.total() + self.elsewhere

    def fail(self, letter_id: int, stage: Stage, error: str) -> None:
        """One letter fails again."""
        reason = (stage, dead_letters.kind(error))
        self.failing[reason] += 1
        self.examples.setdefault(reason, letter_id)

    def finish(self, translation: Translation) -> None:
        """One letter is done with."""
        if translation.ignored is None:
            self.stored += 1
            self.rows += len(translation.rows)
        else:
            self.ignored[translation.ignored] += 1

    def add(self, other: Report) -> None:
        """Count what another report counted."""
        self.stored += other.stored
        self.rows += other.rows
        self.ignored += other.ignored
        self.failing += other.failing
        self.examples = other.examples | self.examples
        self.elsewhere += other.elsewhere


class DeadLetterOffice:
    """Sends the letters of a selection through `router` into the database."""

    def __init__(
        self, connection: BridgeConnection, router: Router, *, statement_timeout_s: float, dry_run: bool = False
    ) -> None:
        """With `dry_run` every transaction does its work, the server has its say, and then it is rolled back."""
        self._connection = connection
        self._router = router
        self._transactions = Transactions(client_id="", statement_timeout_s=statement_timeout_s)
        self._begin = begin(statement_timeout_s)
        self._end = "ROLLBACK" if dry_run else "COMMIT"

    def requeue(self, selection: Selection, *, limit: int = sys.maxsize) -> Iterator[Report]:
        """Store what can be stored; yields the report so far after each chunk, when no transaction is open.

        Whoever stops asking for the next chunk stops the work. Raises psycopg2.Error or BridgeError when the database
        cannot go on: the chunks before are committed, and it is safe to begin again.
        """
        report = Report()
        for ids in _chunks(self._connection, selection, size=REQUEUE_CHUNK, max_bytes=REQUEUE_CHUNK_BYTES, limit=limit):
            report.add(self._requeue(ids))
            yield report

    def _requeue(self, ids: Sequence[int]) -> Report:
        """One transaction."""
        with self._transaction():
            letters = dead_letters.lock(self._connection, ids)
            report = Report(elsewhere=len(ids) - len(letters))
            translated = {letter.id: item for letter in letters if (item := self._translate(letter, report))}
            dead_letters.mark_requeued(self._connection, self._store(translated, report))
        return report

    def _translate(self, letter: Kept, report: Report) -> Translated | None:
        """What today's routes make of a letter; None, and an entry in the report, when it fails again."""
        try:
            message = letter.message()
            return message, self._router.translate(message, Tally())
        except MessageError as error:
            report.fail(letter.id, error.stage, error.reason)
        except Exception as error:  # noqa: BLE001  a bug in a decoder costs this letter, not all those behind it
            report.fail(letter.id, "decode", f"unforeseen {type(error).__name__}: {error}")
        return None

    def _store(self, translated: dict[int, Translated], report: Report) -> list[int]:
        """Store the rows of these letters, by id; returns the ids of those that are done with."""
        refused = self._copy([item for item in translated.values() if item[1].ignored is None])
        done = []
        for letter_id, item in translated.items():
            if failure := refused.get(id(item)):
                report.fail(letter_id, "store", failure.sentence)
                continue
            done.append(letter_id)
            report.finish(item[1])
        return done

    def _copy(self, translated: Sequence[Translated]) -> dict[int, Failure]:
        """Why the server refused what it refused, by the identity of the item."""
        with self._connection.cursor() as cursor:
            refused = self._transactions.isolate(self._connection, cursor, translated)
        return {id(item): failure for item, failure in refused}

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._connection.cursor() as cursor:
            # Deferred constraints would fail at COMMIT, naming no row; other isolation levels would not look again.
            cursor.execute(
                self._begin + sql.SQL(" SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET CONSTRAINTS ALL IMMEDIATE")
            )
            try:
                yield
            except BaseException:
                with suppress(psycopg2.Error):  # the connection may be what failed
                    cursor.execute("ROLLBACK")
                raise
            cursor.execute(self._end)


def purge(connection: BridgeConnection, selection: Selection) -> Iterator[int]:
    """Delete the letters of a selection; yields how many so far after each chunk, which is a transaction."""
    deleted = 0
    for ids in _chunks(connection, selection, size=PURGE_CHUNK):
        deleted += dead_letters.delete(connection, selection, ids)
        yield deleted


def _chunks(
    connection: BridgeConnection,
    selection: Selection,
    *,
    size: int,
    max_bytes: int = sys.maxsize,
    limit: int = sys.maxsize,
) -> Iterator[list[int]]:
    """The ids of a selection, ascending. Each is met once, also when it stays in the selection."""
    after, left = 0, limit
    while ids := _fitting(dead_letters.sizes(connection, selection, after=after, limit=min(size, left)), max_bytes):
        after, left = ids[-1], left - len(ids)
        yield ids


def _fitting(sizes: Sequence[tuple[int, int]], max_bytes: int) -> list[int]:
    """The first ids, as long as they do not exceed `max_bytes` together; at least one."""
    ids: list[int] = []
    total_bytes = 0
    for letter_id, size_bytes in sizes:
        total_bytes += size_bytes
        if ids and total_bytes > max_bytes:
            break
        ids.append(letter_id)
    return ids
