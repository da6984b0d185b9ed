"""The objects in PostgreSQL: made once by any number of processes, and never altered when they are somebody else's."""

from __future__ import annotations

import threading
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta

import psycopg2
import pytest
from structlog.testing import capture_logs

from mqtt_bridge import schema
from mqtt_bridge.errors import SchemaError, Verdict, classify

NOW = datetime(2026, 9, 23, 12, tzinfo=UTC)  # a Wednesday; its Monday is the 21st, in ISO week 39
OWN_READINGS = "CREATE TABLE readings (time timestamptz, device text, metric text, value float8, value_text text)"


def connect(dsn):
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    return connection


def sql(connection, statement, *args):
    with connection.cursor() as cursor:
        cursor.execute(statement, args or None)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def connection(database):
    with closing(connect(database)) as connection:
        yield connection


@contextmanager
def role(connection, name, attributes=""):
    """A role for the time of a test; roles are shared by all databases of the server."""
    sql(connection, f"CREATE ROLE {name} LOGIN {attributes}")
    try:
        yield name
    finally:
        sql(connection, f"DROP OWNED BY {name}")
        sql(connection, f"DROP ROLE {name}")


def partitions(connection):
    return [
        name
        for (name,) in sql(
            connection,
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'readings'::regclass ORDER BY 1",
        )
    ]


WEEKS = [f"readings_2026w{week}" for week in range(38, 44)]


def test_the_printed_ddl_makes_everything(connection):
    sql(connection, schema.ddl(NOW))

    assert schema.missing(connection) == []
    assert schema.unfit(connection) == []
    assert schema.forbidden(connection) == []
    assert partitions(connection) == sorted([*WEEKS, "readings_default"])
    schema.ensure(connection, create=False)


def test_the_printed_ddl_makes_what_the_bridge_makes(connection, postgres_server):
    sql(connection, schema.ddl(NOW))
    other_dsn = postgres_server.create_database("test_schema_twin")
    try:
        with closing(connect(other_dsn)) as other:
            schema.apply(other, now=NOW)

            assert columns(other) == columns(connection)
            assert partitions(other) == partitions(connection)
    finally:
        postgres_server.drop_database("test_schema_twin")


def columns(connection):
    return sql(
        connection,
        "SELECT table_schema, table_name, column_name, data_type, is_nullable FROM information_schema.columns"
        " WHERE table_schema IN ('public', 'mqtt_bridge') AND table_name !~ 'w[0-9]+$' ORDER BY 1, 2, ordinal_position",
    )


def test_the_grants_that_are_printed_are_those_that_are_needed(connection, database):
    sql(connection, schema.ddl(NOW))
    grants = [line.removeprefix("-- ") for line in schema.ddl(NOW).splitlines() if line.startswith("-- GRANT")]

    with role(connection, "bridge"):
        for grant in grants:
            sql(connection, grant)

        with closing(connect(database.replace("postgres@", "bridge@"))) as bridge:
            schema.ensure(bridge, create=False)
            schema.ensure(bridge, create=True)


def test_making_everything_again_changes_nothing(connection):
    schema.apply(connection, now=NOW)
    before = columns(connection), partitions(connection)

    schema.apply(connection, now=NOW)
    schema.ensure(connection, create=True)

    assert columns(connection) == before[0]
    assert set(before[1]) <= set(partitions(connection))


def test_what_is_missing_is_made_and_what_is_there_is_kept(connection):
    schema.apply(connection, now=NOW)
    sql(connection, "INSERT INTO readings VALUES (%s, 'd', 'm', 1, NULL)", NOW)
    sql(connection, "DROP TABLE mqtt_bridge.ledger")

    schema.apply(connection, now=NOW)

    assert schema.missing(connection) == []
    assert sql(connection, "SELECT count(*) FROM readings") == [(1,)]


def test_any_number_of_processes_may_start_at_once(database):
    errors = []
    start = threading.Barrier(8)

    def begin():
        try:
            with closing(connect(database)) as connection:
                start.wait()
                schema.ensure(connection, create=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    with closing(connect(database)) as connection:
        assert schema.missing(connection) == []
        assert len(partitions(connection)) == 7


# -- what is not there


def test_the_bookkeeping_of_version_1_is_brought_up_to_date_and_keeps_its_rows(connection):
    sql(connection, schema.ddl(NOW))
    sql(connection, "ALTER TABLE mqtt_bridge.owners DROP COLUMN member_of")
    sql(connection, "DELETE FROM mqtt_bridge.schema_version WHERE version > 1")
    sql(connection, "INSERT INTO mqtt_bridge.owners (client_id, owner_epoch, session_epoch) VALUES ('hall', 7, 2)")
    assert schema.missing(connection) == ["column mqtt_bridge.owners.member_of is missing"]

    schema.ensure(connection, create=True)

    assert schema.missing(connection) == []
    assert sql(connection, "SELECT client_id, owner_epoch, member_of FROM mqtt_bridge.owners") == [("hall", 7, None)]
    assert sql(connection, "SELECT version FROM mqtt_bridge.schema_version ORDER BY 1") == [(1,), (2,)]


def test_missing_objects_are_named_with_the_remedy(connection):
    with pytest.raises(SchemaError) as caught:
        schema.ensure(connection, create=False)

    for name in ("mqtt_bridge.owners", "mqtt_bridge.ledger", "mqtt_bridge.dead_letters", "readings"):
        assert f"table {name} is missing" in str(caught.value)
    assert "mqtt-bridge schema --apply" in str(caught.value)
    assert classify(caught.value, connected=True).verdict is Verdict.CONFIGURATION


def test_missing_grants_are_named_as_the_statements_that_give_them(connection, database):
    schema.apply(connection, now=NOW)
    with role(connection, '"my-role"'), closing(connect(database.replace("postgres@", "my-role@"))) as poor:
        assert schema.forbidden(poor) == ['a grant is missing: GRANT USAGE ON SCHEMA mqtt_bridge TO "my-role"']

        sql(connection, 'GRANT USAGE ON SCHEMA mqtt_bridge TO "my-role"')
        problems = schema.forbidden(poor)
        assert len(problems) == 5
        for problem in problems:
            sql(connection, problem.removeprefix("a grant is missing: "))

        schema.ensure(poor, create=False)


def test_a_role_that_may_not_create_is_told_which_grant_it_lacks(connection, database):
    with role(connection, "visitor"), closing(connect(database.replace("postgres@", "visitor@"))) as visitor:
        with pytest.raises(psycopg2.Error) as caught:
            schema.ensure(visitor, create=True)

    failure = classify(caught.value, connected=True)
    assert failure.verdict is Verdict.CONFIGURATION
    assert failure.sqlstate == "42501"
    assert "GRANT" in failure.remedy.upper()


def test_a_role_that_may_not_create_in_public_is_told_so(connection, database):
    with role(connection, "visitor"), closing(connect(database.replace("postgres@", "visitor@"))) as visitor:
        (name,) = sql(connection, "SELECT current_database()")[0]
        sql(connection, f"GRANT CREATE ON DATABASE {name} TO visitor")

        with pytest.raises(psycopg2.Error) as caught:
            schema.ensure(visitor, create=True)

    failure = classify(caught.value, connected=True)
    assert failure.verdict is Verdict.CONFIGURATION
    assert "schema public" in failure.sentence
    assert "PostgreSQL 15" in failure.remedy


def test_a_failed_making_leaves_nothing_half_made(connection, database):
    with role(connection, "visitor"):
        (name,) = sql(connection, "SELECT current_database()")[0]
        sql(connection, f"GRANT CREATE ON DATABASE {name} TO visitor")
        with closing(connect(database.replace("postgres@", "visitor@"))) as visitor:
            with pytest.raises(psycopg2.Error):
                schema.apply(visitor, now=NOW)

        assert sql(connection, "SELECT to_regnamespace('mqtt_bridge')") == [(None,)]


# -- a table of the user's own


def test_a_table_of_the_users_own_is_used_and_never_altered(connection):
    sql(
        connection,
        "CREATE TABLE readings (site text NOT NULL DEFAULT 'hall', value_text varchar(40), value float8,"
        " metric varchar(80), device text NOT NULL, time timestamptz, seen timestamptz DEFAULT now(),"
        " id bigint GENERATED ALWAYS AS IDENTITY, twice float8 GENERATED ALWAYS AS (value * 2) STORED)",
    )
    before = [row for row in columns(connection) if row[0] == "public"]

    schema.ensure(connection, create=True)

    assert [row for row in columns(connection) if row[0] == "public"] == before
    assert partitions(connection) == []
    assert schema.make_partitions(connection, NOW) == []


def test_a_partitioned_table_of_the_users_own_is_given_no_partitions(connection):
    sql(connection, OWN_READINGS + " PARTITION BY RANGE (time)")
    sql(connection, "CREATE TABLE all_of_it PARTITION OF readings DEFAULT")

    schema.ensure(connection, create=True)

    assert partitions(connection) == ["all_of_it"]


def test_a_table_on_the_search_path_is_found_wherever_it_is(connection):
    sql(connection, "CREATE SCHEMA plant")
    sql(connection, "SET search_path = plant, public")
    sql(connection, OWN_READINGS)

    schema.ensure(connection, create=True)

    assert sql(connection, "SELECT to_regclass('public.readings')") == [(None,)]


def test_partitions_are_made_beside_their_table_wherever_it_is(connection):
    sql(connection, "CREATE SCHEMA plant")
    sql(connection, "SET search_path = plant, public")
    schema.apply(connection, now=NOW)
    sql(connection, "SET search_path = public, plant")

    schema.make_partitions(connection, NOW + timedelta(weeks=1))

    assert "plant.readings_2026w44" in sql(
        connection, "SELECT array_agg(inhrelid::regclass::text) FROM pg_inherits WHERE inhparent = 'readings'::regclass"
    )[0][0] or "readings_2026w44" in partitions(connection)
    assert sql(connection, "SELECT to_regclass('public.readings_2026w44')") == [(None,)]


def test_an_unfit_table_is_described_column_by_column(connection):
    schema.apply(connection, now=NOW)
    sql(connection, "DROP TABLE readings")
    sql(connection, "CREATE TABLE readings (time timestamp, device uuid, value numeric, value_text text)")

    problems = schema.unfit(connection)

    assert problems == [
        "table readings has no column metric",
        "column readings.time is of type timestamp, not timestamptz",
        "column readings.device is of type uuid, not text or varchar",
        "column readings.value is of type numeric, not float8",
    ]
    with pytest.raises(SchemaError) as caught:
        schema.ensure(connection, create=True)
    for problem in problems:
        assert problem in str(caught.value)


def test_a_domain_fits_if_the_type_that_it_is_made_of_does(connection):
    sql(connection, "CREATE DOMAIN short AS varchar(20); CREATE DOMAIN named AS short CHECK (VALUE <> '')")
    sql(connection, "CREATE DOMAIN whole AS bigint CHECK (VALUE > 0)")
    sql(
        connection, "CREATE TABLE readings (time timestamptz, device named, metric short, value whole, value_text text)"
    )

    problems = schema.unfit(connection)

    assert problems == ["column readings.value is of type int8, not float8"]
    assert [column.name for column in schema.columns_of(connection, "readings")] == list(schema.READINGS_TYPES)


def test_a_column_that_nobody_would_fill_makes_a_table_unfit(connection):
    sql(connection, OWN_READINGS.replace(")", ", site text NOT NULL)"))

    problems = schema.unfit(connection)

    assert len(problems) == 1
    assert "readings.site" in problems[0]


def test_a_dropped_column_is_no_column(connection):
    sql(connection, OWN_READINGS)
    sql(connection, "ALTER TABLE readings DROP COLUMN value_text")

    assert schema.unfit(connection) == ["table readings has no column value_text"]


# -- partitions


def test_partitions_are_made_for_the_weeks_around_now(connection):
    schema.apply(connection, now=NOW)

    made = schema.make_partitions(connection, NOW + timedelta(weeks=2))

    assert made == ["readings_2026w44", "readings_2026w45"]
    assert schema.make_partitions(connection, NOW + timedelta(weeks=2)) == []
    bounds = sql(
        connection,
        "SET timezone = 'UTC'; SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname = 'readings_2026w44'",
    )
    assert bounds == [("FOR VALUES FROM ('2026-10-26 00:00:00+00') TO ('2026-11-02 00:00:00+00')",)]


def test_weeks_are_named_by_their_iso_year(connection):
    schema.apply(connection, now=datetime(2026, 12, 30, tzinfo=UTC))

    assert {"readings_2026w53", "readings_2027w01"} <= set(partitions(connection))


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "America/Los_Angeles"])
def test_weeks_begin_at_the_same_moment_in_every_time_zone(connection, zone):
    sql(connection, f"SET timezone = '{zone}'")

    schema.apply(connection, now=NOW)

    sql(connection, "INSERT INTO readings VALUES ('2026-09-21 00:00+00', 'd', 'm', 1, NULL)")
    sql(connection, "INSERT INTO readings VALUES ('2026-09-20 23:59:59.999999+00', 'd', 'm', 1, NULL)")
    assert sql(connection, "SELECT tableoid::regclass::text FROM readings ORDER BY time") == [
        ("readings_2026w38",),
        ("readings_2026w39",),
    ]


def test_a_new_partition_has_the_index(connection):
    schema.apply(connection, now=NOW)

    schema.make_partitions(connection, NOW + timedelta(weeks=1))

    ((definition,),) = sql(connection, "SELECT indexdef FROM pg_indexes WHERE tablename = 'readings_2026w44'")
    assert '(device, metric, "time" DESC)' in definition


def test_a_week_whose_rows_are_in_the_default_partition_stays_there(connection):
    schema.apply(connection, now=NOW)
    later = NOW + timedelta(weeks=6)
    sql(connection, "INSERT INTO readings VALUES (%s, 'd', 'm', 1, NULL)", later)

    with capture_logs() as logs:
        made = schema.make_partitions(connection, later)

    assert "readings_2026w45" not in made
    assert "readings_2026w46" in made
    assert [log["week"] for log in logs if log["log_level"] == "warning"] == ["2026-11-02"]
    assert sql(connection, "SELECT tableoid::regclass::text FROM readings") == [("readings_default",)]


def test_a_partition_that_another_process_made_first_is_taken_for_granted(connection, database):
    schema.apply(connection, now=NOW)
    later = NOW + timedelta(weeks=3)
    made, errors = [], []
    start = threading.Barrier(4)

    def make():
        try:
            with closing(connect(database)) as mine:
                start.wait()
                made.extend(schema.make_partitions(mine, later))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert sorted(made) == ["readings_2026w44", "readings_2026w45", "readings_2026w46"]


def test_a_detached_partition_is_left_alone(connection):
    schema.apply(connection, now=NOW)
    sql(connection, "ALTER TABLE readings DETACH PARTITION readings_2026w39")

    assert schema.make_partitions(connection, NOW) == []

    assert sql(connection, "SELECT to_regclass('readings_2026w39') IS NOT NULL") == [(True,)]


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE readings ADD CONSTRAINT plausible CHECK (value < 1e9)",
        "ALTER TABLE readings ADD COLUMN site text NOT NULL DEFAULT 'hall'",
        "ALTER TABLE readings ALTER COLUMN value SET NOT NULL",
        "ALTER TABLE readings ADD PRIMARY KEY (time, device, metric)",
        "ALTER TABLE readings ADD COLUMN twice float8 GENERATED ALWAYS AS (value * 2) STORED",
        "CREATE UNIQUE INDEX ON readings (device, metric, time)",
    ],
)
def test_partitions_are_made_for_a_table_that_its_user_has_refined(connection, change):
    schema.apply(connection, now=NOW)
    sql(connection, change)

    made = schema.make_partitions(connection, NOW + timedelta(weeks=1))

    assert made == ["readings_2026w44"]
    schema.ensure(connection, create=True)


def test_a_locked_table_costs_a_partition_and_no_error(connection, database, monkeypatch):
    schema.apply(connection, now=NOW)
    ddl = schema._partition_ddl
    monkeypatch.setattr(schema, "_partition_ddl", lambda *args: "SET LOCAL lock_timeout = '10ms'; " + ddl(*args))
    with closing(psycopg2.connect(database)) as other:
        sql(other, "LOCK TABLE readings IN ACCESS EXCLUSIVE MODE")

        # The first look at the table itself needs no lock that the other one holds.
        assert schema.make_partitions(connection, NOW + timedelta(weeks=1)) == []

    assert schema.make_partitions(connection, NOW + timedelta(weeks=1)) == ["readings_2026w44"]


def test_a_role_that_does_not_own_the_table_makes_no_partitions_and_is_not_stopped(connection, database):
    schema.apply(connection, now=NOW)
    with role(connection, "writer"):
        sql(connection, "GRANT USAGE ON SCHEMA mqtt_bridge TO writer")
        sql(connection, "GRANT ALL ON ALL TABLES IN SCHEMA mqtt_bridge TO writer")
        sql(connection, "GRANT SELECT, INSERT ON readings TO writer")
        with closing(connect(database.replace("postgres@", "writer@"))) as writer:
            assert schema.make_partitions(writer, NOW + timedelta(weeks=1)) == []
            schema.ensure(writer, create=True)


def test_a_connection_is_left_outside_any_transaction(connection):
    schema.apply(connection, now=NOW)
    sql(connection, "INSERT INTO readings VALUES (%s, 'd', 'm', 1, NULL)", NOW + timedelta(weeks=6))

    with capture_logs():
        schema.make_partitions(connection, NOW + timedelta(weeks=6))

    assert connection.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_IDLE


def test_the_server_tells_its_version(connection):
    assert schema.server_version(connection) >= schema.OLDEST_SERVER
