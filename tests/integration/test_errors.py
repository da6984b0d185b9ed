"""Errors of a real PostgreSQL: the verdict is right, and the remedy names the setting."""

from __future__ import annotations

import io
import threading
from contextlib import closing

import psycopg2
import pytest

from mqtt_bridge.errors import Verdict, classify
from mqtt_bridge.tools.embedded import free_port
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def database(postgres_server):
    yield postgres_server.create_database("test_errors")
    postgres_server.drop_database("test_errors")


@pytest.fixture
def connection(database):
    with closing(connect(database)) as connection:
        execute(connection, "DROP TABLE IF EXISTS t, p CASCADE; DROP FUNCTION IF EXISTS f CASCADE")
        yield connection


def connect(dsn, **options):
    connection = psycopg2.connect(dsn, **options)
    connection.autocommit = True
    return connection


def execute(connection, statement):
    with connection.cursor() as cursor:
        cursor.execute(statement)


def failure_of(connection, *statements):
    """What the last statement's error means; the others succeed."""
    for statement in statements[:-1]:
        execute(connection, statement)
    with pytest.raises(psycopg2.Error) as caught:
        execute(connection, statements[-1])
    return classify(caught.value, connected=not connection.closed)


def failure_to_connect(dsn, **options):
    with pytest.raises(psycopg2.Error) as caught:
        psycopg2.connect(dsn, **options).close()
    return classify(caught.value, connected=False)


EXCLUDING = "CREATE TABLE t (n int4range, EXCLUDE USING gist (n WITH &&))"
TRIGGER = (
    "CREATE TABLE t (n int)",
    "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} RETURN NEW; END $$",
    "CREATE TRIGGER f BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f()",
    "INSERT INTO t VALUES (1)",
)


def trigger(body):
    return tuple(statement.format(body) if "{}" in statement else statement for statement in TRIGGER)


@pytest.mark.parametrize(
    ("sqlstate", "statements"),
    [
        ("23505", ("CREATE TABLE t (n int UNIQUE)", "INSERT INTO t VALUES (1), (1)")),
        ("23502", ("CREATE TABLE t (n int NOT NULL)", "INSERT INTO t VALUES (NULL)")),
        ("23514", ("CREATE TABLE t (n int CHECK (n > 0))", "INSERT INTO t VALUES (0)")),
        ("23503", ("CREATE TABLE t (n int PRIMARY KEY, m int REFERENCES t)", "INSERT INTO t VALUES (1, 2)")),
        ("23P01", (EXCLUDING, "INSERT INTO t VALUES ('[1,3]'), ('[2,4]')")),
        ("22001", ("CREATE TABLE t (n varchar(3))", "INSERT INTO t VALUES ('abcd')")),
        ("22003", ("SELECT 32768::int2",)),
        ("22021", (r"SELECT E'\xff'",)),
        ("22P05", (r"""SELECT '{"a": "\u0000"}'::jsonb ->> 'a'""",)),
        ("22012", trigger("NEW.n := 1 / 0;")),
        ("P0001", trigger("RAISE EXCEPTION 'no';")),
    ],
)  # fmt: skip
def test_a_row_at_fault_is_told_from_everything_else(connection, sqlstate, statements):
    failure = failure_of(connection, *statements)

    assert (failure.verdict, failure.sqlstate) == (Verdict.ROW, sqlstate)
    assert failure.sentence.startswith("PostgreSQL says: ")
    assert failure.remedy == ""


@pytest.mark.parametrize(
    ("sqlstate", "remedy", "statements"),
    [
        ("42P01", "DB_AUTO_CREATE", ("INSERT INTO missing VALUES (1)",)),
        ("42703", "mqtt-bridge schema", ("CREATE TABLE t (n int)", "INSERT INTO t (m) VALUES (1)")),
        ("3F000", "DB_AUTO_CREATE", ("CREATE TABLE nowhere.t (n int)",)),
        ("23514", "default partition", ("CREATE TABLE p (n int) PARTITION BY RANGE (n)", "INSERT INTO p VALUES (1)")),
        ("42501", "DATABASE_URL", ("CREATE TABLE t (n int)", "SET ROLE pg_monitor", "INSERT INTO t VALUES (1)")),
        ("0A000", "", ("SELECT DISTINCT 1 FOR UPDATE",)),
    ],
)
def test_what_a_person_must_mend_is_configuration_with_a_remedy(connection, sqlstate, remedy, statements):
    failure = failure_of(connection, *statements)

    assert (failure.verdict, failure.sqlstate) == (Verdict.CONFIGURATION, sqlstate)
    assert remedy in failure.remedy


def test_another_type_in_a_binary_copy_is_configuration_or_the_rows_fault(connection):
    execute(connection, "CREATE TABLE t (n int4)")
    data = b"PGCOPY\n\xff\r\n\0" + bytes(8) + b"\x00\x01" + b"\x00\x00\x00\x02ab" + b"\xff\xff"

    with connection.cursor() as cursor, pytest.raises(psycopg2.Error) as caught:
        cursor.copy_expert("COPY t FROM STDIN (FORMAT binary)", io.BytesIO(data))

    assert classify(caught.value, connected=not connection.closed).verdict in (Verdict.CONFIGURATION, Verdict.ROW)


def test_a_lock_that_is_held_by_another_is_waited_for(connection, database):
    execute(connection, "CREATE TABLE t (n int)")
    with closing(psycopg2.connect(database)) as other:
        execute(other, "LOCK TABLE t")

        timed_out = failure_of(connection, "SET lock_timeout = '10ms'", "INSERT INTO t VALUES (1)")
        not_waited = failure_of(connection, "BEGIN; SELECT 1", "LOCK TABLE t NOWAIT")

    assert (timed_out.verdict, timed_out.sqlstate) == (Verdict.BUSY, "55P03")
    assert (not_waited.verdict, not_waited.sqlstate) == (Verdict.BUSY, "55P03")


def test_a_statement_that_takes_too_long_is_tried_again(connection):
    failure = failure_of(connection, "SET statement_timeout = '10ms'", "SELECT pg_sleep(60)")

    assert (failure.verdict, failure.sqlstate) == (Verdict.BUSY, "57014")


def test_a_deadlock_is_a_conflict(connection, database):
    execute(connection, "CREATE TABLE t (n int PRIMARY KEY, m int)")
    execute(connection, "INSERT INTO t VALUES (1, 0), (2, 0)")
    failures = []
    with closing(connect(database)) as one, closing(connect(database)) as two:
        for number, session in ((1, one), (2, two)):
            execute(session, f"SET deadlock_timeout = '20ms'; BEGIN; UPDATE t SET m = 1 WHERE n = {number}")

        def update(session, number):
            try:
                execute(session, f"UPDATE t SET m = 1 WHERE n = {number}")
            except psycopg2.Error as error:
                failures.append(classify(error, connected=not session.closed))
                execute(session, "ROLLBACK")

        crossing = threading.Thread(target=update, args=(one, 2))
        crossing.start()
        update(two, 1)
        crossing.join()

    assert [(failure.verdict, failure.sqlstate) for failure in failures] == [(Verdict.CONFLICT, "40P01")]


def test_a_serialization_failure_is_a_conflict(connection, database):
    execute(connection, "CREATE TABLE t (n int)")
    execute(connection, "INSERT INTO t VALUES (1)")
    with closing(connect(database)) as other:
        execute(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT * FROM t")
        execute(other, "UPDATE t SET n = 2")

        failure = failure_of(connection, "UPDATE t SET n = 3")
        execute(connection, "ROLLBACK")

    assert (failure.verdict, failure.sqlstate) == (Verdict.CONFLICT, "40001")


def test_a_read_only_server_is_left_for_another(connection):
    failure = failure_of(connection, "SET default_transaction_read_only = on", "CREATE TABLE t (n int)")

    assert (failure.verdict, failure.sqlstate) == (Verdict.RECONNECT, "25006")
    assert "DATABASE_URL" in failure.remedy


def test_a_killed_backend_is_a_lost_connection(connection, database):
    with closing(connect(database)) as victim:
        execute(connection, f"SELECT pg_terminate_backend({victim.info.backend_pid}, 5000)")

        assert failure_of(victim, "SELECT 1").verdict is Verdict.RECONNECT
        assert failure_of(victim, "SELECT 1").verdict is Verdict.RECONNECT, "and stays one"


def test_a_backend_killed_in_a_transaction_is_a_lost_connection(connection, database):
    with closing(connect(database)) as victim:
        execute(victim, "BEGIN; SELECT 1")
        execute(connection, f"SELECT pg_terminate_backend({victim.info.backend_pid}, 5000)")

        assert failure_of(victim, "COMMIT").verdict is Verdict.RECONNECT


def test_a_transaction_that_idled_for_too_long_is_a_lost_connection(connection, database):
    with closing(connect(database)) as idler:
        pid = idler.info.backend_pid
        execute(idler, "SET idle_in_transaction_session_timeout = '10ms'; BEGIN")
        with connection.cursor() as cursor:

            def gone():
                cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", (pid,))
                return cursor.fetchone() == (0,)

            wait_until(gone, what="the server to end the session")

        assert failure_of(idler, "SELECT 1").verdict is Verdict.RECONNECT


# -- connecting


def test_an_unknown_database_is_named_with_its_remedy(postgres_server):
    failure = failure_to_connect(postgres_server.dsn("nowhere"))

    assert failure.verdict is Verdict.RECONNECT
    assert 'database "nowhere" does not exist' in failure.sentence
    assert "DATABASE_URL" in failure.remedy
    assert "Create the database" in failure.remedy


def test_an_unknown_role_is_named_with_its_remedy(postgres_server):
    failure = failure_to_connect(postgres_server.dsn("postgres", user="nobody"))

    assert failure.verdict is Verdict.RECONNECT
    assert "Create the role" in failure.remedy


def test_a_role_without_login_is_named_with_its_remedy(connection, postgres_server):
    failure = failure_to_connect(postgres_server.dsn("postgres", user="pg_monitor"))

    assert "LOGIN" in failure.remedy


def test_a_port_where_nobody_listens_is_told_from_a_host_that_is_not_known():
    refused = failure_to_connect(f"postgresql://u@127.0.0.1:{free_port()}/d")
    unknown = failure_to_connect("postgresql://u@no-such-host.invalid/d")

    assert (refused.verdict, unknown.verdict) == (Verdict.RECONNECT, Verdict.RECONNECT)
    assert "PGPORT" in refused.remedy
    assert "Correct the host" in unknown.remedy


def test_ssl_where_there_is_none_is_named_with_its_remedy(database):
    assert "PGSSLMODE" in failure_to_connect(database, sslmode="require").remedy


def test_passwords_and_connection_slots_and_pg_hba_are_named_with_their_remedies(own_postgres):
    postgres = own_postgres(settings={"max_connections": "4", "superuser_reserved_connections": "0"})
    with closing(connect(postgres.dsn())) as admin:
        execute(admin, "CREATE ROLE keeper LOGIN PASSWORD 'right'")
        (postgres.directory / "data" / "pg_hba.conf").write_text(
            "host all postgres 127.0.0.1/32 trust\nhost postgres keeper 127.0.0.1/32 scram-sha-256\n"
        )
        execute(admin, "SELECT pg_reload_conf()")
        dsn = postgres.dsn(user="keeper")

        missing = wait_until(lambda: connects(dsn) or failure_to_connect(dsn), what="the new pg_hba.conf")
        wrong = failure_to_connect(dsn, password="wrong")
        elsewhere = failure_to_connect(postgres.dsn("template1", user="keeper"), password="right")
        with closing(connect(dsn, password="right")), closing(connect(dsn, password="right")):
            with closing(connect(dsn, password="right")):
                crowded = failure_to_connect(dsn, password="right")

    assert "PGPASSFILE" in missing.remedy
    assert "Correct the user and password in DATABASE_URL" in wrong.remedy
    assert "wrong" not in str(wrong)
    assert "pg_hba.conf" in elsewhere.remedy
    assert "DB_POOL_SIZE" in crowded.remedy
    assert {missing.verdict, wrong.verdict, elsewhere.verdict, crowded.verdict} == {Verdict.RECONNECT}


def connects(dsn):
    """None when the server lets this dsn in as it is, so that a wait goes on."""
    try:
        psycopg2.connect(dsn).close()
    except psycopg2.OperationalError:
        return False
    return None
