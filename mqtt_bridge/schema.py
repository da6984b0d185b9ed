"""The objects in PostgreSQL: what the bridge needs, whether it is there, and how to make it.

Bookkeeping lives in the schema `mqtt_bridge`; readings in the table `readings`, wherever the role's search path puts
it. What exists is used as it is: only missing objects are made (also columns, in the bookkeeping of an older version),
and weekly partitions only for a `readings` table that the bridge made itself (its comment says so). Making is
serialised by an advisory lock, so any number of processes may start at once.

Every function takes an open connection in autocommit mode and runs its own transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import resources

import psycopg2
import structlog
from psycopg2 import sql
from psycopg2.extensions import connection as Connection

from mqtt_bridge.errors import SchemaError
from mqtt_bridge.model import READINGS_COLUMNS

log = structlog.get_logger(__name__)

READINGS = "readings"
WEEKS_AHEAD = 4
"""Partitions are made for last week, this week, and this many weeks ahead."""
OLDEST_SERVER = 14

_BOOKKEEPING_GRANTS = {
    "owners": "SELECT, INSERT, UPDATE, DELETE",
    "ledger": "SELECT, INSERT, DELETE",
    "dead_letters": "SELECT, INSERT, UPDATE, DELETE",
    "schema_version": "SELECT",
}
_GRANTS = {f"mqtt_bridge.{table}": privileges for table, privileges in _BOOKKEEPING_GRANTS.items()} | {
    READINGS: "SELECT, INSERT"
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of an existing table."""

    name: str
    type: str
    """The type's name in the catalogue: `timestamptz`, `text`, `float8` ...; of a domain, the type it is made of."""
    must_be_given: bool
    """NOT NULL, and nothing fills it by itself."""


def ddl(now: datetime | None = None) -> str:
    """Everything the bridge needs, as SQL that a person may read, change and apply.

    `now` decides which weekly partitions are made (default: the present).
    """
    partitions = "\n".join(_partition_ddl(week, "") for week in _weeks(now or datetime.now(UTC)))
    return "\n".join((_script("bookkeeping"), _script("readings"), partitions, "", _grants_comment()))


def _script(name: str) -> str:
    return resources.files("mqtt_bridge").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")


def _grants_comment() -> str:
    lines = ["-- When the bridge runs as another role than the owner of these tables (here: bridge):"]
    lines.append("-- GRANT USAGE ON SCHEMA mqtt_bridge TO bridge;")
    lines += [f"-- GRANT {privileges} ON {table} TO bridge;" for table, privileges in _GRANTS.items()]
    return "\n".join(lines) + "\n"


# -- is it there?


def ensure(connection: Connection, *, create: bool) -> None:
    """Make sure that every object is there. Raises `SchemaError` with what is missing and how to mend it."""
    if create:
        if missing(connection):
            apply(connection)
        make_partitions(connection, datetime.now(UTC))
    verify(connection)
    if problems := forbidden(connection):
        raise SchemaError("The database is not ready: " + "; ".join(problems) + ".")


def verify(connection: Connection) -> None:
    """`SchemaError` when objects are missing, or `readings` cannot take readings."""
    if absent := missing(connection):
        remedy = "Run `mqtt-bridge schema --apply`, set DB_AUTO_CREATE=true, or apply what `mqtt-bridge schema` prints."
        raise SchemaError(f"The database is not ready: {'; '.join(absent)}. {remedy}", sql=ddl())
    if problems := unfit(connection):
        remedy = "Alter the table (`mqtt-bridge schema` prints what is expected), or let DB_AUTO_CREATE make another."
        raise SchemaError(f"The database is not ready: {'; '.join(problems)}. {remedy}")


def missing(connection: Connection) -> list[str]:
    """Objects that do not exist, as `table readings is missing`; a column where the table is of an older version."""
    with connection.cursor() as cursor:
        cursor.execute(_TABLES)
        there = {name for (name,) in cursor.fetchall()}
        cursor.execute("SELECT to_regclass(%s) IS NOT NULL", (READINGS,))
        (readings,) = cursor.fetchone() or (False,)
        cursor.execute(_COLUMNS_SINCE_VERSION_2)
        columns = {name for (name,) in cursor.fetchall()}
    names = [f"mqtt_bridge.{name}" for name in _BOOKKEEPING_GRANTS if name not in there]
    absent = [f"table {name} is missing" for name in names + ([] if readings else [READINGS])]
    if "owners" in there and "member_of" not in columns:
        absent.append("column mqtt_bridge.owners.member_of is missing")
    return absent


_TABLES = """
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'mqtt_bridge'
"""
_COLUMNS_SINCE_VERSION_2 = """
SELECT a.attname FROM pg_attribute a
JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'mqtt_bridge' AND c.relname = 'owners' AND a.attname = 'member_of' AND NOT a.attisdropped
"""
"""By the catalogue: to look a name up, as to_regclass does, asks for a privilege that may be what is missing."""

READINGS_TYPES: Mapping[str, frozenset[str]] = {
    "time": frozenset({"timestamptz"}),
    "device": frozenset({"text", "varchar"}),
    "metric": frozenset({"text", "varchar"}),
    "value": frozenset({"float8"}),
    "value_text": frozenset({"text", "varchar"}),
}
"""Types that a `readings` table of your own may have. Binary COPY does not check them: eight bytes of a float are
eight bytes of a bigint, and would be stored as garbage."""


def unfit(connection: Connection) -> list[str]:
    """What keeps an existing `readings` from taking readings: missing columns, wrong types, columns to be filled."""
    columns = {column.name: column for column in columns_of(connection, READINGS)}
    problems = [f"table {READINGS} has no column {name}" for name in READINGS_COLUMNS if name not in columns]
    for name in READINGS_COLUMNS:
        if name in columns and columns[name].type not in READINGS_TYPES[name]:
            wanted = " or ".join(sorted(READINGS_TYPES[name]))
            problems.append(f"column {READINGS}.{name} is of type {columns[name].type}, not {wanted}")
    for name, column in columns.items():
        if column.must_be_given and name not in READINGS_COLUMNS:
            problems.append(f"column {READINGS}.{name} is NOT NULL and has no default: the bridge would not fill it")
    return problems


def columns_of(connection: Connection, table: str) -> tuple[Column, ...]:
    """The columns of `table` (looked up along the search path), in their order; none when there is no such table."""
    with connection.cursor() as cursor:
        cursor.execute(_COLUMNS, {"table": sql.Identifier(*table.split(".")).as_string(connection)})
        return tuple(Column(*row) for row in cursor.fetchall())


_COLUMNS = """
WITH RECURSIVE typed AS (
    SELECT attnum, atttypid AS type FROM pg_attribute
    WHERE attrelid = to_regclass(%(table)s) AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT typed.attnum, typbasetype FROM typed JOIN pg_type ON oid = type AND typtype = 'd'
)
SELECT a.attname, t.typname,
       a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND a.attgenerated = ''
FROM typed JOIN pg_type t ON t.oid = typed.type AND t.typtype <> 'd'
JOIN pg_attribute a ON a.attrelid = to_regclass(%(table)s) AND a.attnum = typed.attnum
ORDER BY a.attnum
"""
"""COPY takes a domain in the form of the type that it is made of, and checks it."""


def shape_of(connection: Connection, table: str) -> sql.Composable:
    """An expression: the columns of `table` and their types at this moment, as one text; NULL where it is missing."""
    return _SHAPE.format(table=sql.Literal(sql.Identifier(*table.split(".")).as_string(connection)))


_SHAPE = sql.SQL(
    "(SELECT string_agg(attname || ' ' || atttypid, ', ' ORDER BY attnum) FROM pg_attribute"
    " WHERE attrelid = to_regclass({table}) AND attnum > 0 AND NOT attisdropped)"
)


def forbidden(connection: Connection) -> list[str]:
    """Privileges that this role lacks, as the GRANT that gives them."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_user, has_schema_privilege('mqtt_bridge', 'USAGE')")
        role, usage = cursor.fetchone() or ("", False)
        if not usage:
            return [f"a grant is missing: {_grant('USAGE', 'SCHEMA mqtt_bridge', role, connection)}"]
        lacking = [
            _grant(privileges, table, role, connection)
            for table, privileges in _GRANTS.items()
            if not _may(cursor, table, privileges)
        ]
    return [f"a grant is missing: {grant}" for grant in lacking]


def _may(cursor: psycopg2.extensions.cursor, table: str, privileges: str) -> bool:
    cursor.execute(
        "SELECT bool_and(has_table_privilege(%s, privilege)) FROM unnest(%s) AS privilege",
        (table, privileges.split(", ")),
    )
    (allowed,) = cursor.fetchone() or (False,)
    return bool(allowed)


def _grant(privileges: str, what: str, role: str, connection: Connection) -> str:
    return f"GRANT {privileges} ON {what} TO {sql.Identifier(role).as_string(connection)}"


def server_version(connection: Connection) -> int:
    """Major version of the server, as 16."""
    return connection.info.server_version // 10_000


# -- make it


def apply(connection: Connection, *, now: datetime | None = None) -> None:
    """Create what is missing. Safe to run from any number of processes at once, and again."""
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended('mqtt_bridge schema', 0))")
        lacking = missing(connection)
        if any("mqtt_bridge." in item for item in lacking):
            cursor.execute(_script("bookkeeping"))
        if any(READINGS in item for item in lacking):
            cursor.execute(_script("readings"))
        cursor.execute("COMMIT")
    make_partitions(connection, now or datetime.now(UTC))


def make_partitions(connection: Connection, now: datetime) -> list[str]:
    """Make the weekly partitions of `readings` that are missing around `now`; returns the names of those made.

    Does nothing for a table that the bridge did not make. A week whose rows are already in the default partition
    stays there: PostgreSQL refuses the partition, and a warning says so.
    """
    with connection.cursor() as cursor:
        cursor.execute(_OWN_TABLE, (READINGS,))
        found = cursor.fetchone()
        if not found:
            return []
        namespace, present = found
    absent = [week for week in _weeks(now) if _partition_name(week) not in present]
    return [_partition_name(week) for week in absent if _make_partition(connection, namespace, week)]


_OWN_TABLE = """
SELECT n.nspname, ARRAY(SELECT p.relname::text FROM pg_inherits i JOIN pg_class p ON p.oid = i.inhrelid
                        WHERE i.inhparent = c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass(%s) AND c.relkind = 'p' AND obj_description(c.oid, 'pg_class') LIKE 'Made by mqtt-bridge%%'
"""


_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('mqtt_bridge schema', 0)); "


def _make_partition(connection: Connection, namespace: str, week: datetime) -> bool:
    prefix = sql.Identifier(namespace).as_string(connection) + "."
    with connection.cursor() as cursor:
        try:
            cursor.execute("BEGIN; SET LOCAL lock_timeout = '5s'; " + _LOCK + _partition_ddl(week, prefix) + " COMMIT")
        except psycopg2.errors.CheckViolation:
            cursor.execute("ROLLBACK")
            log.warning("rows of this week are in the default partition and stay there", week=f"{week:%Y-%m-%d}")
            return False
        except psycopg2.Error as error:
            if not connection.closed:
                cursor.execute("ROLLBACK")
            if error.pgcode not in ("42P07", "55P03", "42501"):
                raise
            # Another process made it first, the table is locked, or it is another role's: there is a default partition.
            log.info("partition not made", week=f"{week:%Y-%m-%d}", reason=str(error).strip())
            return False
    return True


def _weeks(now: datetime) -> Iterator[datetime]:
    """Mondays, midnight UTC, of the weeks that should have a partition."""
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    monday = today - timedelta(days=today.weekday())
    for offset in range(-1, WEEKS_AHEAD + 1):
        yield monday + timedelta(weeks=offset)


def _partition_name(week: datetime) -> str:
    return f"{READINGS}_{week:%Gw%V}"


def _partition_ddl(week: datetime, prefix: str) -> str:
    """Made apart and then attached: unlike CREATE ... PARTITION OF, that lets writers of other weeks go on."""
    name = prefix + _partition_name(week)
    return (
        f"CREATE TABLE {name} (LIKE {prefix}{READINGS} INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING GENERATED);"
        f" ALTER TABLE {prefix}{READINGS} ATTACH PARTITION {name}"
        f" FOR VALUES FROM ('{week:%Y-%m-%d} 00:00+00') TO ('{week + timedelta(weeks=1):%Y-%m-%d} 00:00+00');"
    )
