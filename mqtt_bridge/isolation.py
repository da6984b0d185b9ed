"""Finds the messages of a batch that the server refuses, and stores all others.

A row at fault makes its whole COPY fail. Most often the server says which one it was, by its line or its key: what
stands before it is good and is copied, the message itself is tried alone, and what stands behind it follows in chunks,
which grow while all goes well and shrink with each refusal. Where the server does not say (a trigger that fires after
the last row), or says something wrong, the run that failed is halved.

Invariants: what the server says is a hint and never a verdict, a message is refused only after it has failed alone;
rows arrive in the order of their messages; all happens in the transaction of the caller, which holds afterwards what
could be stored and nothing else.

Rows that a natural key excludes are not at fault: a run that meets one, and all runs after it, go the way of
`natural_keys`. On that way the server names no lines: it is halved.

Cost for each message refused: three or four short round trips, or about log2(chunk) of them without a hint, and the
rows of less than a chunk twice. A run that is stored costs a subtransaction.

Threads: none of its own; everything runs in the caller's, on its connection.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import psycopg2
from psycopg2.extensions import cursor as Cursor

from mqtt_bridge import copying, natural_keys
from mqtt_bridge.errors import ROW_BUILDING, Failure, Verdict, classify
from mqtt_bridge.model import Row, Table, Translated, Translation

AT_FAULT = frozenset({Verdict.ROW, Verdict.UNKNOWN})
"""Verdicts for which a batch is taken apart."""

CHUNK = 64
"""Messages that are tried together after a refusal. A chunk that fails costs its good rows again, one that is stored
costs a round trip: between 32 and 128 they balance (`benchmarks/poison.py`)."""

Encode = Callable[[Table, Sequence[Collection[Row]]], bytes]
"""COPY data for a table, from the rows of messages. Raises one of ROW_BUILDING for a row that cannot be encoded."""


def isolate(
    cursor: Cursor,
    translated: Sequence[Translated],
    encode: Encode,
    *,
    error: Exception | None = None,
    merging: frozenset[Table] = frozenset(),
    present: Counter[str] | None = None,
) -> list[tuple[Translated, Failure]]:
    """Store what can be stored of `translated` in the open transaction; returns what cannot, in order, and why.

    `error` is what came of trying all of them at once, if that was tried. `merging` are tables in which rows are
    known to be there already; `present` counts such rows, by table. An error that is not the fault of a row is
    raised, and leaves the transaction to be rolled back.
    """
    by_server = isinstance(error, psycopg2.Error)  # then all of them could be encoded
    failures = {} if by_server else _unfit(translated, encode)
    indexes = [index for index, (_, means) in enumerate(translated) if means.rows and index not in failures]
    runs = _Runs(cursor, [translated[index][1] for index in indexes], encode, merging)
    seen = runs.refusal(error, 0, len(indexes)) if isinstance(error, psycopg2.Error) else None
    for index, failure in search(len(indexes), runs.store, seen=seen).items():
        failures[indexes[index]] = failure
    runs.close()
    if present is not None:
        present.update(runs.present)
    return [(translated[index], failures[index]) for index in sorted(failures)]


def _unfit(translated: Sequence[Translated], encode: Encode) -> dict[int, Failure]:
    """The messages with a row that cannot be encoded: found one by one, without asking the server."""
    failures = {}
    for index, (_, translation) in enumerate(translated):
        try:
            encode(translation.table, [translation.rows])
        except ROW_BUILDING as error:
            failures[index] = classify(error, connected=True)
    return failures


def by_table(translations: Iterable[Translation]) -> dict[Table, list[Collection[Row]]]:
    """The rows of these messages, message by message, for each table in its first appearance's order."""
    tables: dict[Table, list[Collection[Row]]] = {}
    latest: Table | None = None
    for _, table, rows, _ in translations:
        if table is not latest:  # to hash it for each message would be dear
            latest, found = table, tables.setdefault(table, [])
        found.append(rows)
    return tables


# -- the search


class Refusal(NamedTuple):
    """The server refused to store the messages from `start` to before `stop` together."""

    start: int
    stop: int
    failure: Failure
    suspect: int | None = None
    """The message that is at fault, according to the server."""


Store = Callable[[int, int], Refusal | None]
"""Store the messages from the first index to before the second, all or none; None when they are stored."""


def search(count: int, store: Store, *, seen: Refusal | None = None) -> dict[int, Failure]:
    """Store all of `count` messages that can be stored; returns why the others cannot.

    `seen`: the refusal of all of them together, where that has been tried.
    """
    return _Search(store).run(count, seen)


class _Search:
    """Goes through the messages from the first to the last; all before where it stands are stored or refused."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._trusting = True  # until a suspect turns out to be innocent
        self._refused: dict[int, Failure] = {}

    def run(self, count: int, refusal: Refusal | None) -> dict[int, Failure]:
        start, size = 0, count
        while start < count:
            stop = min(start + size, count)
            refusal = refusal or self._store(start, stop)
            if refusal is None:
                start, size = stop, size * 2
            else:
                start, size = self._pass_one(start, refusal), max(1, min(size // 2, CHUNK))
            refusal = None
        return self._refused

    def _pass_one(self, start: int, refusal: Refusal) -> int:
        """Find, in a run from `start` that was refused, the first message at fault; returns where to go on."""
        afresh = True
        while refusal.stop - start > 1:
            cut = self._cut(start, refusal, afresh=afresh)
            afresh = False
            if cut > start and (earlier := self._store(start, cut)):
                refusal = earlier
                continue
            start = cut
            if cut == refusal.suspect and self._trusting:
                break
        self._judge(start, refusal)
        return start + 1

    def _cut(self, start: int, refusal: Refusal, *, afresh: bool) -> int:
        """Up to where to try next. Each failure but the first halves what is left at least, whatever the server says:
        there are errors that always name the last line."""
        middle, suspect = (start + refusal.stop) // 2, refusal.suspect
        if not self._trusting or suspect is None or not start <= suspect < refusal.stop:
            return middle
        return suspect if afresh or suspect <= middle else middle

    def _judge(self, index: int, refusal: Refusal) -> None:
        """Refuse the message at `index` if it fails alone; if it does not, it is stored."""
        alone: Refusal | None = refusal
        if (refusal.start, refusal.stop) != (index, index + 1):
            alone = self._store(index, index + 1)
        if alone:
            self._refused[index] = alone.failure
        else:
            self._trusting = False


# -- the server


class _Runs:
    """Copies any run of the messages, under a savepoint. What it takes to keep or undo one travels with the next."""

    def __init__(
        self, cursor: Cursor, translations: Sequence[Translation], encode: Encode, merging: frozenset[Table]
    ) -> None:
        self._cursor = cursor
        self._translations = translations
        self._encode = encode
        tables = {translation.table for translation in translations}
        # Made once: the search may make thousands of runs.
        self._statements = {table: copying.statement(table).as_string(cursor) for table in tables}
        self._merging: frozenset[Table] = frozenset()
        self._before = ""
        self._merge(merging & tables)
        self.present: Counter[str] = Counter()
        """Rows that were there already, by table."""

    def _merge(self, tables: frozenset[Table]) -> None:
        """From now on rows go into these tables by way of others, which are made here, outside of any savepoint."""
        making = "".join(natural_keys.create(table).as_string(self._cursor) for table in tables)
        if making:
            self._cursor.execute(self._before + making)
            self._before = ""
        self._merging |= tables
        self._before += _BEGIN

    def store(self, start: int, stop: int) -> Refusal | None:
        """A `Store`."""
        copies = self._copies(start, stop)
        present: Counter[str] = Counter()
        try:
            for table, data in copies:
                present[table.name] += self._send(table, data)
                self._before = ""
        except psycopg2.Error as error:
            refusal = self.refusal(error, start, stop)
            if refusal.failure.verdict not in AT_FAULT:
                raise
            self._before = _UNDO
            if found := natural_keys.in_conflict(error, self._statements) - self._merging:
                self._before += _KEEP
                self._merge(found)
                return self.store(start, stop)
            return refusal
        self._before = _KEEP + _BEGIN
        self.present += present
        return None

    def _send(self, table: Table, data: bytes) -> int:
        if table in self._merging:
            emptying = natural_keys.empty(table).as_string(self._cursor)
            return natural_keys.send(self._cursor, self._before + emptying, table, data)
        copying.send(self._cursor, self._before + self._statements[table], data)
        return 0

    def _copies(self, start: int, stop: int) -> list[tuple[Table, bytes]]:
        parts = by_table(self._translations[start:stop])
        return [(table, self._encode(table, rows)) for table, rows in parts.items()]

    def close(self) -> None:
        """Leave the transaction fit for more."""
        if self._before == _UNDO:
            self._cursor.execute(_UNDO)

    def refusal(self, error: psycopg2.Error, start: int, stop: int) -> Refusal:
        """What the server said about a run."""
        failure = classify(error, connected=not self._cursor.connection.closed)
        context = (error.diag and error.diag.context) or ""
        detail = (error.diag and error.diag.message_detail) or ""
        suspect = self._at_line(context, start, stop)
        return Refusal(start, stop, failure, self._with_key(detail, start, stop) if suspect is None else suspect)

    def _at_line(self, context: str, start: int, stop: int) -> int | None:
        """The message whose row was at the line that the server names, counted from 1 in each table."""
        lines = {table: line for table in self._statements if (line := line_of(context, self._name(table)))}
        for index in range(start, stop) if lines else ():
            _, table, rows, *_ = self._translations[index]
            if table in lines:
                lines[table] -= len(rows)
                if lines[table] <= 0:
                    return index
        return None

    def _name(self, table: Table) -> str:
        return natural_keys.staging(table) if table in self._merging else table.name

    def _with_key(self, detail: str, start: int, stop: int) -> int | None:
        """The first message with a row that has the key which the server names."""
        if not (key := key_of(detail)):
            return None
        columns, text = key
        places = {t: [t.columns.index(c) for c in columns] for t in self._statements if {*columns} <= {*t.columns}}
        for index in range(start, stop):
            _, table, rows, *_ = self._translations[index]
            if table in places and any(", ".join([str(row[i]) for i in places[table]]) == text for row in rows):
                return index
        return None


_BEGIN = "SAVEPOINT part; "
_KEEP = "RELEASE SAVEPOINT part; "
_UNDO = "ROLLBACK TO SAVEPOINT part; "


def line_of(context: str, table: str) -> int | None:
    """The line of COPY data that the context of an error names, None where it names none.

    The outermost statement comes last: `COPY readings, line 17, column value`. Translated, all of this may change but
    the name of the table (without its schema) and that the number of the line is the first one after it.
    """
    name = re.escape(table.rpartition(".")[2])
    found = re.search(rf"(?<!\w){name}(?!\w)\D*(\d+)", context.rpartition("\n")[2], re.ASCII)
    return int(found[1]) or None if found else None


def key_of(detail: str) -> tuple[tuple[str, ...], str] | None:
    """The columns, and their values in one text, of the key that the detail of an error names; None where it has none.

    `Key (device)=(d1) is not present in table "devices".`: foreign keys have no line, but this, in every language.
    """
    found = re.search(r"\((.+?)\)=\((.*)\)", detail, re.DOTALL)
    return (tuple(found[1].split(", ")), found[2]) if found else None
