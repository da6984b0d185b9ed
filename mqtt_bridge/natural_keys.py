"""Tables with a natural key: a row whose key is there already is no error.

At the optimistic price: rows are copied straight into the table, as into any other. Only when its unique index refuses
them does the batch go again, into a temporary table and from there with INSERT ... ON CONFLICT: what is there is left
alone (`nothing`), or replaced (`update`). After that a table is expected to have more such rows for a while.

What counts: `rows` are those that are new or were changed; a message all of whose rows were there counts as `stored`,
for that is what it is. Of rows with one key in one batch, `nothing` keeps the first and `update` the last. Across
batches `update` keeps what is committed last: two workers, or a redelivery, may bring an older row after a newer one.
A row without a value in a column of its key equals no other row.

Invariants: the unique index decides what a conflict is, nothing here does; rows reach the table in the transaction of
the caller; the temporary table is gone with it, so that a pooler between may give the session to somebody else.

Threads: `Conflicts` is shared by the workers; the rest makes SQL, or uses the connection of the caller.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import connection as Connection
from psycopg2.extensions import cursor as Cursor

from mqtt_bridge import copying
from mqtt_bridge.errors import SchemaError
from mqtt_bridge.model import Table

UNIQUE_VIOLATION = "23505"


class Conflicts:
    """Which tables have conflicts in one batch after another: the next ones save themselves the COPY that fails.

    That pays where nearly every batch has one, as in a stream that is delivered again; where one in five has, it would
    cost more than it saves (`benchmarks/natural_keys.py`). Without a lock: it is a guess. Wrong, it costs a detour,
    never a row.
    """

    IN_A_ROW = 2
    """So many batches with a conflict, none without between them, and more are expected ..."""
    BATCHES = 20
    """... for so many batches: then COPY is tried again, since what `update` replaces looks like what is new."""

    def __init__(self) -> None:
        self._in_a_row: dict[Table, int] = {}
        self._left: dict[Table, int] = {}

    def met(self, tables: Iterable[Table]) -> None:
        """COPY has just failed for one of these."""
        for table in tables:
            self._in_a_row[table] = self._in_a_row.get(table, 0) + 1
            if self._in_a_row[table] >= self.IN_A_ROW:
                self._left[table] = self.BATCHES

    def missed(self, table: Table) -> None:
        """All rows of a batch were new."""
        if self._in_a_row:
            self._in_a_row.pop(table, None)
            self._left.pop(table, None)

    def expected(self, tables: Iterable[Table]) -> frozenset[Table]:
        """Those of `tables` that are likely to have conflicts; asked once a batch."""
        if not self._left:
            return frozenset()
        found = frozenset(table for table in tables if table in self._left)
        for table in found:
            left = self._left.pop(table, 0) - 1
            if left > 0:
                self._left[table] = left
        return found


def in_conflict(error: Exception, tables: Iterable[Table]) -> frozenset[Table]:
    """The tables, of these, that may have refused a row for its key. Which one it was, partitions do not tell."""
    if not isinstance(error, psycopg2.Error) or error.pgcode != UNIQUE_VIOLATION:
        return frozenset()
    return frozenset(table for table in tables if table.key)


# -- the statements


def staging(table: Table) -> str:
    """The name of the temporary table for rows of `table`; the same for the same table."""
    return f"mqtt_bridge_rows_{blake2b(repr(table).encode(), digest_size=8).hexdigest()}"


def create(table: Table) -> sql.Composed:
    """Makes the temporary table: the columns that rows fill, with the types that they have at this moment."""
    return _CREATE.format(
        staging=sql.Identifier(staging(table)), columns=_identifiers(table.columns), table=_identifier(table)
    )


def copy(table: Table) -> sql.Composed:
    """The statement that takes COPY data for the temporary table."""
    return copying.statement(Table(f"pg_temp.{staging(table)}", table.columns))


def empty(table: Table) -> sql.Composed:
    """Empties the temporary table, for the next rows."""
    return sql.SQL("TRUNCATE pg_temp.{}; ").format(sql.Identifier(staging(table)))


def insert(table: Table) -> sql.Composed:
    """Brings the rows of the temporary table into `table`; affects those that are new, or were changed."""
    source = _LAST_OF_EACH if table.on_conflict == "update" else _IN_ORDER
    return _INSERT.format(
        table=_identifier(table),
        columns=_identifiers(table.columns),
        source=source.format(
            columns=_identifiers(table.columns),
            staging=sql.Identifier(staging(table)),
            key=_identifiers(table.key),
            # NULL equals nothing: rows with one are all kept, each under its own place.
            incomplete=sql.SQL(" OR ").join(sql.SQL("{} IS NULL").format(sql.Identifier(name)) for name in table.key),
        ),
        key=_identifiers(table.key),
        action=_action(table),
    )


# Its rows stand in the order in which they were copied, which is also that of `ctid`: nothing but COPY writes to it.
_CREATE = sql.SQL("CREATE TEMP TABLE {staging} ON COMMIT DROP AS SELECT {columns} FROM {table} WITH NO DATA; ")
_INSERT = sql.SQL("INSERT INTO {table} AS present ({columns}) {source} ON CONFLICT ({key}) {action}")
_IN_ORDER = sql.SQL("SELECT {columns} FROM pg_temp.{staging}")
# ON CONFLICT DO UPDATE refuses to replace a row of its own statement.
_LAST_OF_EACH = sql.SQL(
    "SELECT DISTINCT ON ({key}, CASE WHEN {incomplete} THEN ctid END) {columns} FROM pg_temp.{staging}"
    " ORDER BY {key}, CASE WHEN {incomplete} THEN ctid END, ctid DESC"
)


def _action(table: Table) -> sql.Composable:
    values = [name for name in table.columns if name not in table.key]
    if table.on_conflict == "nothing" or not values:
        return sql.SQL("DO NOTHING")
    # What is redelivered says what is there already: nothing is written then.
    return sql.SQL("DO UPDATE SET {assignments} WHERE ({present}) IS DISTINCT FROM ({excluded})").format(
        assignments=sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name)) for name in values),
        present=sql.SQL(", ").join(sql.Identifier("present", name) for name in values),
        excluded=sql.SQL(", ").join(sql.Identifier("excluded", name) for name in values),
    )


def _identifier(table: Table) -> sql.Identifier:
    return sql.Identifier(*table.name.split("."))


def _identifiers(names: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def send(cursor: Cursor, before: sql.Composable | str, table: Table, data: bytes) -> int:
    """Run `before`, which has made the temporary table or emptied it, and bring COPY data into `table` through it.

    Two round trips. Returns how many rows were there already.
    """
    before = sql.SQL(before) if isinstance(before, str) else before
    copying.send(cursor, before + copy(table), data)
    copied = cursor.rowcount
    cursor.execute(insert(table))
    return copied - cursor.rowcount


# -- is the key there?


def verify(connection: Connection, table: Table) -> None:
    """`SchemaError` where no unique index is on exactly the key of `table`: every duplicate would be stored.

    Neither a partial index nor a deferrable constraint serves ON CONFLICT. Likewise where a privilege is missing that
    only a conflict needs: better now than in the night in which the first one comes.
    """
    name = _identifier(table).as_string(connection)
    with connection.cursor() as cursor:
        cursor.execute(_INDEXED, {"table": name, "key": sorted(table.key)})
        (indexed,) = cursor.fetchone() or (False,)
        cursor.execute(_MAY, {"table": name, "update": table.on_conflict == "update"})
        role, database, temporary, update = cursor.fetchone() or ("", "", False, False)
    if not indexed:
        columns = _identifiers(table.key).as_string(connection)
        ddl = f"CREATE UNIQUE INDEX ON {name} ({columns});"
        reason = f"Table {table.name} has no unique index on ({columns}), the key of its route"
        raise SchemaError(f"{reason}: what is redelivered would be stored again. Apply: {ddl}", sql=ddl)
    grants = [] if temporary else [f"GRANT TEMPORARY ON DATABASE {_quoted(connection, database)}"]
    grants += [] if update else [f"GRANT UPDATE ON {name}"]
    if grants:
        ddl = " ".join(f"{grant} TO {_quoted(connection, role)};" for grant in grants)
        raise SchemaError(f"The key of table {table.name} needs a privilege that is missing. Apply: {ddl}", sql=ddl)


def _quoted(connection: Connection, name: str) -> str:
    return sql.Identifier(name).as_string(connection)


_INDEXED = """
SELECT EXISTS (
    SELECT FROM pg_index i
    WHERE i.indrelid = to_regclass(%(table)s) AND i.indisunique AND i.indisvalid AND i.indimmediate
      AND i.indpred IS NULL AND i.indexprs IS NULL
      AND ARRAY(SELECT a.attname::text FROM pg_attribute a
                WHERE a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
                ORDER BY a.attname::text COLLATE "C") = %(key)s::text[]
)
"""
_MAY = """
SELECT current_user, current_database(), has_database_privilege(current_database(), 'TEMPORARY'),
  NOT %(update)s OR has_table_privilege(to_regclass(%(table)s), 'UPDATE')
"""
