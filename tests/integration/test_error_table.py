"""Every line of the error table, raised by a real PostgreSQL and met on the way that every batch takes.

What the table promises is seen from outside: tried again and stored once; or paused, with a reason that `/readyz`
shows, and resumed without help; or one dead letter with the SQLSTATE, and all others stored. RAISE stands in only for
what no statement of a test can bring a sound server to: 58, XX, and 28 on a connection that is open already.

A test that proves a code says so with `proves`; the last test holds that against the table in `errors`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import psycopg2
import pytest
import trustme
from psycopg2 import sql
from psycopg2.extensions import make_dsn

from mqtt_bridge import errors, isolation
from mqtt_bridge import sink as sink_module
from mqtt_bridge.errors import PAUSING, Failure, Verdict
from mqtt_bridge.model import Translated
from mqtt_bridge.tools.embedded import Postgres, free_port
from tests.bench import Bench, reading
from tests.tiny_disk import TinyDisk
from tests.waiting import wait_until
from tests.wire import CommitTrap, Wiretap

PROVEN: dict[str, set[Verdict]] = {}
"""By SQLSTATE: the verdicts that a test here has asserted."""

Test = TypeVar("Test", bound=Callable[..., None])


def proves(verdict: Verdict, *sqlstates: str) -> Callable[[Test], Test]:
    """Marks a test in which the server raises these codes, and the sink acts by this verdict."""
    for sqlstate in sqlstates:
        PROVEN.setdefault(sqlstate, set()).add(verdict)
    return lambda test: test


# -- the server, and a bench at it


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server of this module's own: its logins are asked for passwords, its connections are few."""
    settings = {"max_connections": "20", "max_locks_per_transaction": "10"}
    with Postgres(settings=settings) as server:
        with superuser(server) as execute:
            execute("CREATE ROLE bridge LOGIN PASSWORD 'right'")
            execute("CREATE ROLE ghost")
            execute("CREATE DATABASE bench OWNER bridge")
            (server.directory / "data" / "pg_hba.conf").write_text(RULES)
            execute("SELECT pg_reload_conf()")
        wait_until(lambda: not lets_in(server, "wrong"), what="the passwords to be asked for")
        yield server


RULES = """
host all postgres 127.0.0.1/32 trust
host all bridge 127.0.0.1/32 scram-sha-256
host all nobody 127.0.0.1/32 trust
"""


def lets_in(server: Postgres, password: str) -> bool:
    try:
        psycopg2.connect(server.dsn("bench", user="bridge"), password=password).close()
    except psycopg2.OperationalError:
        return False
    return True


@contextmanager
def superuser(server: Postgres, database: str = "postgres") -> Iterator[Callable[[str], None]]:
    """Executes statements, each on its own."""
    with closing(psycopg2.connect(server.dsn(database))) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        yield cursor.execute


MakeBench = Callable[..., Bench]


@pytest.fixture
def bench_of(tmp_path: Path) -> Iterator[MakeBench]:
    """Makes an opened Bench of a dsn and the observer's dsn."""
    with ExitStack() as stack:
        yield lambda dsn, observed_by, **settings: stack.enter_context(
            Bench(tmp_path, dsn, observed_by=observed_by, **settings)
        ).open()


@pytest.fixture
def dsn(postgres: Postgres) -> str:
    """The emptied database of a role without any privilege beyond it, with its password."""
    with superuser(postgres) as execute:  # what a test may have left behind
        execute("ALTER ROLE bridge RESET ALL")
        execute("ALTER ROLE bridge LOGIN CONNECTION LIMIT -1 PASSWORD 'right'")
        execute("ALTER DATABASE bench WITH ALLOW_CONNECTIONS true CONNECTION LIMIT -1")
    with superuser(postgres, "bench") as execute:
        for statement in EMPTY:
            execute(statement)
    return postgres.dsn("bench", user="bridge").replace("bridge@", "bridge:right@")


EMPTY = (
    "ALTER DATABASE bench RESET ALL",
    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    "DROP SCHEMA IF EXISTS mqtt_bridge CASCADE",
    "DROP SCHEMA public CASCADE",
    "CREATE SCHEMA public AUTHORIZATION bridge",
    "GRANT CONNECT ON DATABASE bench TO public, bridge",
)


@pytest.fixture
def bench(bench_of: MakeBench, postgres: Postgres, dsn: str) -> Bench:
    return bench_of(dsn, postgres.dsn("bench"))


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses a tenth as long as in life."""
    for verdict, (first_s, longest_s) in sink_module._DELAYS_S.items():
        monkeypatch.setitem(sink_module._DELAYS_S, verdict, (first_s / 10, longest_s / 100))


def hurry(bench: Bench, **limits: str) -> None:
    """Other limits than those of `transactions.begin`, since nobody wants to wait for ten seconds."""
    parts = [sql.SQL("BEGIN;")]
    parts += [sql.SQL("SET LOCAL {} = {};").format(sql.Identifier(k), sql.Literal(v)) for k, v in limits.items()]
    bench.sink._transactions._begin = sql.SQL(" ").join(parts)


@pytest.fixture
def wire(postgres: Postgres) -> Iterator[Wiretap]:
    with Wiretap(postgres.port) as link:
        yield link


@pytest.fixture
def tapped(bench_of: MakeBench, postgres: Postgres, dsn: str, wire: Wiretap) -> Bench:
    """A bench whose link to the server is overheard."""
    return bench_of(dsn.replace(f":{postgres.port}/", f":{wire.port}/"), postgres.dsn("bench"))


# -- connect errors: no code reaches the client, so the texts are known


class Connecting(NamedTuple):
    """What keeps the sink from connecting. SQL is the superuser's, in the database postgres."""

    cause: str
    sqlstate: str | None
    """What the server calls it; None where the client finds out alone."""
    sentence: str
    remedy: str
    breaks: tuple[str, ...] = ()
    mends: tuple[str, ...] = ()
    parameters: Mapping[str, str] = MappingProxyType({})
    """Of the connection string, wrong until it is corrected."""


CONNECTING = (
    Connecting(
        "a wrong password", "28P01", "password authentication failed", "Correct the user and password in DATABASE_URL",
        ("ALTER ROLE bridge PASSWORD 'changed'",), ("ALTER ROLE bridge PASSWORD 'right'",),
    ),
    Connecting(
        "no password", None, "no password supplied", "Put the password into DATABASE_URL", parameters={"password": ""}
    ),
    Connecting(
        "no database", "3D000", 'database "bench" does not exist', "Create the database",
        ("ALTER DATABASE bench RENAME TO elsewhere",), ("ALTER DATABASE elsewhere RENAME TO bench",),
    ),
    Connecting(
        "no role", "28000", 'role "nobody" does not exist', "Create the role",
        parameters={"user": "nobody"},
    ),
    Connecting(
        "no login", "28000", 'role "bridge" is not permitted to log in', "Give the role LOGIN",
        ("ALTER ROLE bridge NOLOGIN",), ("ALTER ROLE bridge LOGIN",),
    ),
    Connecting(
        "no pg_hba entry", "28000", "no pg_hba.conf entry", "in the server's pg_hba.conf",
        parameters={"user": "ghost"},
    ),
    Connecting(
        "no privilege", "42501", 'permission denied for database "bench"', "GRANT CONNECT ON DATABASE",
        ("REVOKE CONNECT ON DATABASE bench FROM public, bridge",), ("GRANT CONNECT ON DATABASE bench TO bridge",),
    ),
    Connecting(
        "a closed database", "55000", "is not currently accepting connections", "ALLOW_CONNECTIONS",
        ("ALTER DATABASE bench ALLOW_CONNECTIONS false",), ("ALTER DATABASE bench ALLOW_CONNECTIONS true",),
    ),
    Connecting(
        "too many of the role", "53300", 'too many connections for role "bridge"', "CONNECTION LIMIT",
        ("ALTER ROLE bridge CONNECTION LIMIT 0",), ("ALTER ROLE bridge CONNECTION LIMIT -1",),
    ),
    Connecting(
        "too many in the database", "53300", 'too many connections for database "bench"', "CONNECTION LIMIT",
        ("ALTER DATABASE bench CONNECTION LIMIT 0",), ("ALTER DATABASE bench CONNECTION LIMIT -1",),
    ),
    Connecting(
        "SSL where there is none", None, "server does not support SSL", "Enable SSL on the server",
        parameters={"sslmode": "require"},
    ),
    Connecting(
        "an unknown host", None, "could not translate host name", "Correct the host in DATABASE_URL",
        parameters={"host": "no-such-host.invalid"},
    ),
    Connecting(
        "a port where nobody listens", None, "refused", "Start PostgreSQL, or correct host and port",
        parameters={"port": str(free_port())},
    ),
    Connecting(
        "a word for a number", None, "invalid integer value", "Correct DATABASE_URL",
        parameters={"keepalives_idle": "long"},
    ),
)  # fmt: skip


@proves(Verdict.RECONNECT, *(case.sqlstate for case in CONNECTING if case.sqlstate))
@pytest.mark.parametrize("case", CONNECTING, ids=[case.cause for case in CONNECTING])
def test_who_cannot_connect_says_why_and_what_to_do_and_stores_when_it_is_mended(tapped, wire, postgres, case):
    good = tapped.dsn
    tapped.dsn = make_dsn(good, **case.parameters)
    with superuser(postgres) as execute:
        execute(END_ALL_SESSIONS)
        for statement in case.breaks:
            execute(statement)
    outcome = tapped.store([1, 2])

    failure = tapped.failed(saying=case.sentence)
    wait_until(lambda: tapped.sink.trouble, what="the trouble to be shown")
    assert failure.verdict is Verdict.RECONNECT
    assert case.remedy in tapped.reasons
    assert case.sentence in tapped.reasons
    assert tapped.state != "paused"
    assert "right" not in tapped.reasons
    if case.sqlstate:
        wire.wait_for(case.sqlstate)
    assert not outcome
    tapped.dsn = good
    with superuser(postgres) as execute:
        for statement in case.mends:
            execute(statement)

    tapped.observe_again()
    tapped.assert_stored_once(outcome, [1, 2])


END_ALL_SESSIONS = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = 'bench'"


@proves(Verdict.RECONNECT, "53300")
def test_who_finds_every_connection_of_the_server_taken_stores_when_one_is_free(tapped, wire, postgres):
    with superuser(postgres) as execute, ExitStack() as crowd:
        execute(END_ALL_SESSIONS)
        with contextlib.suppress(psycopg2.OperationalError):
            while True:
                crowd.enter_context(closing(psycopg2.connect(postgres.dsn())))
        outcome = tapped.store([1, 2])

        failure = tapped.failed(saying="sorry, too many clients already")
        wait_until(lambda: "lower DB_POOL_SIZE" in tapped.reasons, what="the remedy")
        assert failure.verdict is Verdict.RECONNECT
        wire.wait_for("53300")
        assert not outcome

    tapped.observe_again()
    tapped.assert_stored_once(outcome, [1, 2])


def test_a_server_that_does_not_answer_a_connect_is_tried_until_it_does(tapped, wire):
    tapped.end_sessions()
    wire.stall()
    tapped.dsn = make_dsn(tapped.dsn, connect_timeout="2")

    outcome = tapped.store([1, 2])

    assert tapped.failed(saying="timeout expired").verdict is Verdict.RECONNECT
    wait_until(lambda: "firewall" in tapped.reasons, what="the remedy")
    wire.resume()
    tapped.assert_stored_once(outcome, [1, 2])


def test_a_server_whose_certificate_is_not_trusted_is_not_spoken_to(bench, tmp_path):
    authority, stranger, good = trustme.CA(), trustme.CA(), bench.dsn
    stranger.cert_pem.write_to_path(tmp_path / "ca.pem")
    with tls_front(authority) as port:
        bench.end_sessions()
        bench.dsn = make_dsn(good, port=str(port), sslmode="verify-full", sslrootcert=str(tmp_path / "ca.pem"))

        outcome = bench.store([1, 2])

        assert bench.failed(saying="certificate verify failed").verdict is Verdict.RECONNECT
        wait_until(lambda: "sslrootcert" in bench.reasons, what="the remedy")
        bench.dsn = good
        bench.assert_stored_once(outcome, [1, 2])


@contextmanager
def tls_front(authority: trustme.CA) -> Iterator[int]:
    """The port of something that speaks TLS as PostgreSQL does, and gets no further than the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    if connection.recv(8)[4:] != SSL_REQUEST:
                        return  # the test is over
                    connection.sendall(b"S")
                    context.wrap_socket(connection, server_side=True).close()

        front = threading.Thread(target=answer, name="tls-front")
        front.start()
        yield listener.getsockname()[1]
        with socket.create_connection(listener.getsockname()) as last:
            last.sendall(b"the end!")
            front.join()


SSL_REQUEST = struct.pack("!HH", 1234, 5679)
"""PostgreSQL manual, Message Formats: SSLRequest."""


# -- the connection ends


def block(bench: Bench) -> Callable[[], None]:
    """Keep a batch from being stored until the function that is returned is called."""
    bench.sql("BEGIN")
    bench.sql("LOCK TABLE readings")
    return lambda: bench.sql("COMMIT") and None


@proves(Verdict.RECONNECT, "57P01")
def test_a_batch_whose_backend_is_terminated_is_stored_by_another(tapped, wire):
    release = block(tapped)
    outcome = tapped.store([1, 2])
    tapped.wait_until_blocked()

    tapped.end_sessions()

    assert tapped.failed(saying="closed the connection").verdict is Verdict.RECONNECT
    wire.wait_for("57P01")
    release()
    tapped.assert_stored_once(outcome, [1, 2])


@proves(Verdict.RECONNECT, "57P02")
def test_a_batch_whose_server_crashes_is_stored_when_it_has_recovered(tapped, wire, postgres):
    block(tapped)
    outcome = tapped.store([1, 2])
    tapped.wait_until_blocked()

    with closing(psycopg2.connect(postgres.dsn())) as victim:
        os.kill(victim.info.backend_pid, signal.SIGKILL)
        assert tapped.failed(saying="closed the connection").verdict is Verdict.RECONNECT

    wire.wait_for("57P02")
    wait_until(lambda: outcome, timeout_s=40, what="the server to recover")
    tapped.observe_again()
    tapped.assert_stored_once(outcome, [1, 2])


@proves(Verdict.RECONNECT, "57P03")
def test_a_batch_that_meets_a_server_on_its_way_down_is_stored_when_it_is_back(tapped, wire, postgres):
    tapped.end_sessions()
    os.kill(postgres._guarded.pid, signal.SIGTERM)  # the smart shutdown: it waits for the observer to leave

    def on_its_way_down() -> bool:
        return not lets_in(postgres, "right")

    wait_until(on_its_way_down, what="the server to refuse")
    outcome = tapped.store([1, 2])

    failure = tapped.failed(saying="shutting down")
    assert failure.verdict is Verdict.RECONNECT
    wait_until(lambda: "The server will be there in a moment" in tapped.reasons, what="the remedy")
    wire.wait_for("57P03")
    tapped._observer.close()
    postgres._guarded.wait()
    assert not outcome
    postgres.start()
    tapped.observe_again()
    tapped.assert_stored_once(outcome, [1, 2])


@proves(Verdict.RECONNECT, "57P05")
def test_connections_that_the_server_ended_because_they_were_idle_cost_no_message(tapped, wire):
    tapped.sql("ALTER ROLE bridge SET idle_session_timeout = '100ms'")
    tapped.end_sessions()
    tapped.assert_stored_once(tapped.store([1, 2]), [1, 2])
    wire.wait_for("57P05")
    wait_until(lambda: not tapped.backends(), what="the idle sessions to be ended")
    tapped.failures.clear()

    outcome = tapped.store([3, 4])

    wait_until(lambda: outcome, what="the batch")
    assert tapped.values() == [1, 2, 3, 4]
    assert [failure.verdict for failure in tapped.failures] == [Verdict.RECONNECT]
    assert not tapped.letters()


@proves(Verdict.RECONNECT, "25P03")
def test_a_transaction_that_the_server_ended_because_its_client_stood_still_is_tried_again(bench_of, postgres, dsn):
    with CommitTrap(postgres.port, holds="request") as link:
        bench = bench_of(dsn.replace(f":{postgres.port}/", f":{link.port}/"), postgres.dsn("bench"))
        hurry(bench, idle_in_transaction_session_timeout="100ms")
        link.arm()
        outcome = bench.store([1, 2])
        link.wait()

        link.wait_for("25P03")
        assert bench.failed(saying="closed the connection").verdict is Verdict.RECONNECT
        bench.assert_stored_once(outcome, [1, 2])


@proves(Verdict.RECONNECT, "08001")
def test_a_trigger_that_cannot_reach_another_server_is_tried_again_until_it_can(bench, postgres):
    port = free_port()
    with superuser(postgres, "bench") as execute:
        execute("CREATE EXTENSION postgres_fdw")
        execute(f"CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '127.0.0.1', port '{port}')")
        execute("CREATE USER MAPPING FOR bridge SERVER far OPTIONS (user 'postgres', password_required 'false')")
        execute("CREATE FOREIGN TABLE copies (value float8) SERVER far OPTIONS (table_name 'pg_database')")
        execute("GRANT SELECT ON copies TO bridge")
    watch(bench, "PERFORM 1 FROM copies;")
    outcome = bench.store([1, 2])

    failure = bench.failed("08001")
    assert failure.verdict is Verdict.RECONNECT
    assert "could not connect to server" in failure.sentence
    assert not outcome
    bench.sql("DROP TRIGGER watch ON readings")
    bench.assert_stored_once(outcome, [1, 2])
    bench.sql("DROP EXTENSION postgres_fdw CASCADE")


def watch(bench: Bench, body: str, *, when: str = "AFTER INSERT ON readings FOR EACH STATEMENT") -> None:
    """A trigger with this PL/pgSQL body, run as the bridge's role."""
    bench.sql(
        f"CREATE OR REPLACE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$"
    )
    constraint = "CONSTRAINT " if "DEFERRABLE" in when else ""
    bench.sql(f"CREATE {constraint}TRIGGER watch {when} EXECUTE FUNCTION watch()")


# -- a server that only reads


@proves(Verdict.RECONNECT, "25006")
def test_a_batch_that_meets_a_standby_is_stored_when_that_is_promoted(bench_of, postgres, own_postgres, tmp_path):
    primary = own_postgres(settings={"wal_level": "replica", "max_wal_senders": "4"})
    with Standby(primary) as standby:
        bench = bench_of(primary.dsn(), primary.dsn())
        caught_up = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
        ((written,),) = bench.sql("SELECT pg_current_wal_lsn()")
        with superuser(standby) as execute:
            wait_until(lambda: one(standby, caught_up, written), timeout_s=30, what="the standby to catch up")

            # A fail-over: the primary is gone, its address leads to what is not yet the new primary.
            bench.dsn = standby.dsn()
            bench._observer.close()
            primary.kill()
            outcome = bench.store([1, 2])
            failure = bench.failed("25006")
            wait_until(lambda: "finds the primary" in bench.reasons, what="the remedy")
            assert failure.verdict is Verdict.RECONNECT
            assert not outcome
            execute("SELECT pg_promote()")

        bench.observe_again(standby.dsn())
        bench.assert_stored_once(outcome, [1, 2])


class Standby(Postgres):
    """A streaming standby of another server."""

    def __init__(self, primary: Postgres) -> None:
        super().__init__()
        self._primary = primary

    def _initialise(self) -> None:
        self._guarded.launch(
            self._program("pg_basebackup"), "-D", self._data, "-d", self._primary.dsn(), "--write-recovery-conf",
            "--checkpoint=fast", "--wal-method=stream", "--no-sync",
        )  # fmt: skip
        assert self._guarded.wait(60) == 0, self._guarded.log_tail()


def one(server: Postgres, statement: str, *arguments: object) -> Any:
    with closing(psycopg2.connect(server.dsn())) as connection, connection.cursor() as cursor:
        cursor.execute(statement, arguments)
        return (cursor.fetchone() or (None,))[0]


@proves(Verdict.RECONNECT, "25006")
def test_a_batch_that_meets_a_database_that_is_set_to_read_only_is_stored_when_it_is_set_back(bench):
    bench.sql("ALTER DATABASE bench SET default_transaction_read_only = on")
    bench.end_sessions()
    outcome = bench.store([1, 2])

    assert bench.failed("25006").verdict is Verdict.RECONNECT
    wait_until(lambda: "read-only" in bench.reasons, what="the reason")
    assert not outcome
    bench.sql("SET default_transaction_read_only = off")
    bench.sql("ALTER DATABASE bench RESET default_transaction_read_only")
    bench.assert_stored_once(outcome, [1, 2])


# -- others are in the way


@proves(Verdict.CONFLICT, "40001")
def test_a_batch_that_another_transaction_has_overtaken_is_tried_again_at_once(bench):
    bench.sql("ALTER DATABASE bench SET default_transaction_isolation = 'repeatable read'")
    bench.sql("CREATE TABLE counts (n int); INSERT INTO counts VALUES (0); GRANT ALL ON counts TO bridge")
    watch(bench, "UPDATE counts SET n = n + 1;")
    bench.end_sessions()
    bench.sql("BEGIN; UPDATE counts SET n = n + 1")
    outcome = bench.store([1, 2])
    bench.wait_until_blocked()

    bench.sql("COMMIT")

    assert bench.failed("40001").verdict is Verdict.CONFLICT
    bench.assert_stored_once(outcome, [1, 2])
    assert bench.sql("SELECT n FROM counts") == [(2,)]


@proves(Verdict.CONFLICT, "40P01")
def test_a_batch_that_lost_a_deadlock_is_tried_again_at_once(bench, postgres):
    bench.sql("CREATE TABLE counts (id int, n int); INSERT INTO counts VALUES (1, 0), (2, 0)")
    bench.sql("GRANT ALL ON counts TO bridge")
    watch(bench, "UPDATE counts SET n = 1 WHERE id = 1; PERFORM pg_advisory_xact_lock(7);"
                 "UPDATE counts SET n = 1 WHERE id = 2;")  # fmt: skip
    with superuser(postgres, "bench") as other:
        other("ALTER ROLE bridge SET deadlock_timeout = '10ms'")
        bench.end_sessions()
    with superuser(postgres, "bench") as other:
        bench.sql("SELECT pg_advisory_lock(7)")
        other("SET deadlock_timeout = '100s'; BEGIN; UPDATE counts SET n = 2 WHERE id = 2")
        outcome = bench.store([1, 2])
        bench.wait_until_blocked()
        crossing = threading.Thread(target=other, args=("UPDATE counts SET n = 2 WHERE id = 1",))
        crossing.start()
        wait_until(lambda: bench.sql("SELECT 1 FROM pg_locks WHERE NOT granted OFFSET 1"), what="the other to wait")

        bench.sql("SELECT pg_advisory_unlock(7)")

        assert bench.failed("40P01").verdict is Verdict.CONFLICT
        crossing.join()
        other("COMMIT")
    bench.assert_stored_once(outcome, [1, 2])


@proves(Verdict.BUSY, "55P03")
def test_a_lock_that_is_not_had_in_time_is_waited_for_again(bench):
    hurry(bench, lock_timeout="50ms")
    release = block(bench)
    outcome = bench.store([1, 2])

    assert bench.failed("55P03").verdict is Verdict.BUSY
    wait_until(lambda: "lock timeout" in bench.reasons, what="the reason")
    assert bench.state != "paused"
    release()
    bench.assert_stored_once(outcome, [1, 2])


@proves(Verdict.BUSY, "57014")
@pytest.mark.parametrize("ended_by", ["the time-out", "a person"])
def test_a_statement_that_was_cancelled_is_tried_again(bench, ended_by):
    hurry(bench, statement_timeout="50ms" if ended_by == "the time-out" else "0")
    release = block(bench)
    outcome = bench.store([1, 2])
    bench.wait_until_blocked()
    for pid in bench.backends() if ended_by == "a person" else []:
        bench.sql("SELECT pg_cancel_backend(%s)", pid)

    failure = bench.failed("57014")
    assert failure.verdict is Verdict.BUSY
    assert "DB_STATEMENT_TIMEOUT_S" in failure.remedy
    release()
    bench.assert_stored_once(outcome, [1, 2])


@proves(Verdict.BUSY, "55006")
def test_an_object_in_use_is_waited_for(bench):
    watch(bench, "ALTER TABLE readings SET (fillfactor = 90);", when="AFTER INSERT ON readings_default FOR EACH ROW")
    watch_nothing = "CREATE OR REPLACE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$"
    outcome = bench.store([1, 2])

    assert bench.failed("55006").verdict is Verdict.BUSY
    wait_until(lambda: "in use" in bench.reasons or "used by" in bench.reasons, what="the reason")
    bench.sql(watch_nothing)
    bench.assert_stored_once(outcome, [1, 2])


# -- resources


@proves(Verdict.RESOURCES, "53100")
def test_a_full_disk_pauses_until_there_is_room_and_makes_no_dead_letter(bench_of):
    with TinyDisk(size="8m") as server:
        bench = bench_of(server.dsn(), server.dsn())
        bench.sql(f"CREATE TABLESPACE tiny LOCATION '{server.disk}'")
        bench.sql("ALTER TABLE readings_default SET TABLESPACE tiny")
        bench.sql("CREATE TABLE ballast (bytes bytea STORAGE external) TABLESPACE tiny")
        fill = "INSERT INTO ballast SELECT decode(repeat('00', 8000), 'hex') FROM generate_series(1, 8)"
        with contextlib.suppress(psycopg2.errors.DiskFull):
            while True:
                bench.sql(fill)
        numbers = range(1, 2001)  # more than fit into what the last page of a table has left

        outcome = bench.store(numbers)

        failure = bench.failed("53100")
        assert failure.verdict is Verdict.RESOURCES
        assert_paused(bench, "Free disk space on the database server.")
        assert not outcome
        bench.sql("DROP TABLE ballast")
        bench.assert_stored_once(outcome, list(numbers))


@proves(Verdict.RESOURCES, "53200")
def test_a_server_without_memory_for_locks_pauses_until_there_is_some_and_makes_no_dead_letter(bench):
    with pytest.raises(psycopg2.errors.OutOfMemory):
        bench.sql("SELECT pg_advisory_lock(n) FROM generate_series(1, 1000000) AS n")  # kept although it fails

    outcome = bench.store([1, 2])

    assert bench.failed("53200").verdict is Verdict.RESOURCES
    assert_paused(bench, "Give the database server more memory.")
    assert not outcome
    bench.sql("SELECT pg_advisory_unlock_all()")
    bench.assert_stored_once(outcome, [1, 2])


def assert_paused(bench: Bench, remedy: str) -> None:
    wait_until(lambda: bench.state == "paused", what="the pause")
    assert bench.sink.trouble is not None
    assert bench.sink.trouble.verdict in PAUSING
    assert remedy in bench.reasons


# -- a person must change something, or the server is ill


class Pause(NamedTuple):
    """What stops everything until somebody mends it."""

    sqlstate: str
    verdict: Verdict
    breaks: str
    """SQL of the superuser; `{}` in front: the body of a trigger on `readings`."""
    mends: str = ""
    remedy: str = ""
    """A part of what `/readyz` says."""


PAUSES = (
    Pause(
        "42P01", Verdict.CONFIGURATION, "ALTER TABLE readings RENAME TO elsewhere",
        "ALTER TABLE elsewhere RENAME TO readings", "mqtt-bridge schema --apply",
    ),
    Pause(
        "42703", Verdict.CONFIGURATION, "ALTER TABLE readings RENAME COLUMN value_text TO words",
        "ALTER TABLE readings RENAME COLUMN words TO value_text", "mqtt-bridge schema",
    ),
    Pause(
        "42501", Verdict.CONFIGURATION, "REVOKE INSERT ON readings FROM bridge", "GRANT INSERT ON readings TO bridge",
        "Grant what is missing",
    ),
    Pause(
        "42501", Verdict.CONFIGURATION,
        "ALTER SCHEMA mqtt_bridge OWNER TO postgres; REVOKE ALL ON SCHEMA mqtt_bridge FROM bridge",
        "ALTER SCHEMA mqtt_bridge OWNER TO bridge", "Grant what is missing",
    ),
    Pause(
        "42809", Verdict.CONFIGURATION,
        "ALTER TABLE readings RENAME TO elsewhere; CREATE VIEW readings AS SELECT * FROM elsewhere;"
        " GRANT ALL ON readings TO bridge",
        "DROP VIEW readings; ALTER TABLE elsewhere RENAME TO readings", "cannot copy to view",
    ),
    Pause("3D000", Verdict.CONFIGURATION, "{}PERFORM pg_database_size('elsewhere');", "", "Create the database"),
    Pause("3F000", Verdict.CONFIGURATION, "{}PERFORM audit.note();", "", "Create the schema"),
    Pause(
        "0A000", Verdict.CONFIGURATION,
        "ALTER TABLE readings ENABLE ROW LEVEL SECURITY; ALTER TABLE readings FORCE ROW LEVEL SECURITY",
        "ALTER TABLE readings DISABLE ROW LEVEL SECURITY", "row-level security",
    ),
    Pause(
        "08P01", Verdict.CONFIGURATION, "ALTER TABLE readings ALTER COLUMN metric TYPE bigint USING 0",
        "ALTER TABLE readings ALTER COLUMN metric TYPE text", "column readings.metric is of type int8",
    ),
    Pause(
        "22P03", Verdict.CONFIGURATION, "ALTER TABLE readings ALTER COLUMN value TYPE int",
        "ALTER TABLE readings ALTER COLUMN value TYPE float8", "column readings.value is of type int4",
    ),
    Pause(
        "23514", Verdict.CONFIGURATION, "ALTER TABLE readings DETACH PARTITION readings_default",
        "ALTER TABLE readings ATTACH PARTITION readings_default DEFAULT", "or a default partition",
    ),
    Pause("28000", Verdict.CONFIGURATION, "{}RAISE 'no' USING ERRCODE = '28000';", "", "no"),
    Pause("58030", Verdict.BROKEN, "{}RAISE 'could not read block 0' USING ERRCODE = '58030';", "", "block 0"),
    Pause("58P01", Verdict.BROKEN, "{}RAISE 'could not open file' USING ERRCODE = '58P01';", "", "open file"),
    Pause("XX000", Verdict.BROKEN, "{}RAISE 'cache lookup failed' USING ERRCODE = 'XX000';", "", "cache lookup"),
    Pause("XX001", Verdict.BROKEN, "{}RAISE 'invalid page' USING ERRCODE = 'XX001';", "", "invalid page"),
)  # fmt: skip


@pytest.mark.parametrize("case", PAUSES, ids=[f"{case.sqlstate} {case.breaks[:40]}" for case in PAUSES])
def test_what_somebody_must_mend_pauses_the_stream_and_loses_nothing(bench, case):
    if case.breaks.startswith("{}"):
        watch(bench, case.breaks.removeprefix("{}"))
    else:
        bench.sql(case.breaks)
    outcome = bench.store([1, 2])

    assert bench.failed(case.sqlstate).verdict is case.verdict
    wait_until(lambda: case.remedy in bench.reasons, what=f"{case.remedy!r} in {bench.reasons!r}")
    assert_paused(bench, case.remedy)
    assert not outcome
    bench.sql(case.mends or "DROP TRIGGER watch ON readings")
    bench.assert_stored_once(outcome, [1, 2])


WIDE_AS_BEFORE = {
    "value": ("bigint", "float8"),
    "time": ("timestamp", "timestamptz"),
}


@pytest.mark.parametrize("when", ["before the batch", "while the batch waits"])
@pytest.mark.parametrize("column", WIDE_AS_BEFORE)
def test_a_column_whose_type_is_changed_to_another_of_the_same_width_is_not_filled_with_garbage(bench, column, when):
    """The server takes eight bytes for eight bytes, and says nothing."""
    type_, right = WIDE_AS_BEFORE[column]
    bench.sql("DROP TABLE readings")
    bench.sql("CREATE TABLE readings (time timestamptz, device text, metric text, value float8, value_text text)")
    bench.sql("ALTER TABLE readings OWNER TO bridge")
    bench.assert_stored_once(bench.store([1]), [1])
    bench.sql("DELETE FROM mqtt_bridge.ledger; DELETE FROM readings")

    bench.sql("BEGIN")
    bench.sql(f"ALTER TABLE readings ALTER COLUMN {column} TYPE {type_}")
    if when == "before the batch":
        bench.sql("COMMIT")
        outcome = bench.store([2, 3])
    else:
        outcome = bench.store([2, 3])
        bench.wait_until_blocked()
        bench.sql("COMMIT")

    wait_until(lambda: outcome or f"column readings.{column} is of type" in bench.reasons, what="the refusal")
    assert not outcome
    assert_paused(bench, "Alter the table")
    assert bench.sql("SELECT count(*) FROM readings") == [(0,)]
    bench.sql(f"ALTER TABLE readings ALTER COLUMN {column} TYPE {right}")
    bench.assert_stored_once(outcome, [2, 3])


def test_a_column_that_is_added_to_a_table_delays_a_batch_and_no_more(bench):
    bench.sql("ALTER TABLE readings ADD COLUMN note text")

    bench.assert_stored_once(bench.store([1, 2]), [1, 2])

    assert bench.failed(saying="altered").verdict is Verdict.CONFLICT


for _case in PAUSES:
    proves(_case.verdict, _case.sqlstate)


# -- a row is at fault


class Refusal(NamedTuple):
    """Why the server refuses the third of four rows."""

    sqlstate: str
    body: str = ""
    """Of a trigger, for rows below zero."""
    sql: str = ""
    """The superuser's, before."""
    bad: Translated = reading(3, value=-1.0)
    when: str = "BEFORE INSERT ON readings_default FOR EACH ROW"
    verdict: Verdict = Verdict.ROW


AT_COMMIT = "AFTER INSERT ON readings_default DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
DEVICES = (
    "CREATE TABLE devices (name text PRIMARY KEY); INSERT INTO devices VALUES ('d'); GRANT ALL ON devices TO bridge;"
)
FOREIGN_KEY = f"{DEVICES} ALTER TABLE readings ADD FOREIGN KEY (device) REFERENCES devices"
DEEPER = "CREATE FUNCTION deeper(int) RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN deeper($1 + 1); END'"
POSITIVE = (
    "CREATE TABLE copies (value float8); GRANT ALL ON copies TO bridge;"
    "CREATE VIEW positive AS SELECT * FROM copies WHERE value >= 0 WITH CHECK OPTION; GRANT ALL ON positive TO bridge"
)
APART = "EXCLUDE USING gist (box(point(value, 0), point(value, 0)) WITH &&)"
LONG_AND_RANDOM = os.urandom(6000).hex()
"""Too long for an index, and not to be compressed."""

REFUSALS = (
    Refusal("22001", sql="ALTER TABLE readings ALTER COLUMN device TYPE varchar(5)", bad=reading(3, device="too long")),
    Refusal("22003", "NEW.value := 70000::int2;"),
    Refusal("22008", "PERFORM '2026-02-30'::date;"),
    Refusal("22012", "NEW.value := 1 / 0;"),
    Refusal("22021", r"PERFORM convert_from('\xff', 'UTF8');"),
    Refusal("22P02", "NEW.value := NEW.device::float8;"),
    Refusal("22P05", r"""NEW.value_text := '{"a": "\u0000"}'::jsonb ->> 'a';"""),
    Refusal("21000", "NEW.value := (SELECT generate_series(1, 2));"),
    Refusal("23502", sql="ALTER TABLE readings ALTER COLUMN value SET NOT NULL", bad=reading(3, text="no number")),
    Refusal("23503", sql=FOREIGN_KEY, bad=reading(3, device="stranger")),
    Refusal("23503", sql=f"{FOREIGN_KEY} DEFERRABLE INITIALLY DEFERRED", bad=reading(3, device="stranger")),
    Refusal("23505", sql="CREATE UNIQUE INDEX ON readings (time, value)", bad=reading(3, value=2.0)),
    Refusal(
        "23505",
        sql="ALTER TABLE readings_default ADD UNIQUE (value) DEFERRABLE INITIALLY DEFERRED",
        bad=reading(3, value=2.0),
    ),
    Refusal("23514", sql="ALTER TABLE readings ADD CHECK (value >= 0)"),
    Refusal("23P01", sql=f"ALTER TABLE readings_default ADD {APART}", bad=reading(3, value=2.0)),
    Refusal(
        "23P01",
        sql=f"ALTER TABLE readings_default ADD {APART} DEFERRABLE INITIALLY DEFERRED",
        bad=reading(3, value=2.0),
    ),
    Refusal("44000", "INSERT INTO positive VALUES (NEW.value);", sql=POSITIVE),
    Refusal("54000", sql="CREATE INDEX ON readings (value_text)", bad=reading(3, text=LONG_AND_RANDOM)),
    Refusal("54001", "PERFORM deeper(1);", sql=DEEPER),
    Refusal("P0001", "RAISE EXCEPTION 'no';"),
    Refusal("P0001", "RAISE EXCEPTION 'no';", when=AT_COMMIT),
    # What the table does not know is taken for the row's fault as well:
    Refusal("P0002", "SELECT n INTO STRICT NEW.value FROM generate_series(1, 0) AS n;", verdict=Verdict.UNKNOWN),
    Refusal("ZZ999", "RAISE EXCEPTION 'no' USING ERRCODE = 'ZZ999';", verdict=Verdict.UNKNOWN),
    Refusal("ZZ999", "RAISE EXCEPTION 'no' USING ERRCODE = 'ZZ999';", when=AT_COMMIT, verdict=Verdict.UNKNOWN),
)


@pytest.mark.parametrize("case", REFUSALS, ids=[f"{case.sqlstate} {(case.body or case.sql)[:40]}" for case in REFUSALS])
def test_a_refused_row_becomes_one_dead_letter_with_its_code_and_all_others_are_stored(bench, case):
    if case.sql:
        bench.sql(case.sql)
    if case.body:
        watch(bench, f"IF NEW.value < 0 THEN {case.body} END IF;", when=case.when)

    outcome = bench.store([1, 2, 4], case.bad)

    wait_until(lambda: outcome or unforeseen(bench), timeout_s=30, what="the batch")
    assert not unforeseen(bench)
    assert outcome[0].rows == {"readings": 3}
    assert [letter.message for letter in outcome[0].refused] == [case.bad[0]]
    assert bench.values() == [1, 2, 4]
    assert bench.letters() == [("3", "store", case.sqlstate)]
    assert bench.sql("SELECT count(*) FROM mqtt_bridge.ledger") == [(1,)]
    ((error,),) = bench.sql("SELECT error FROM mqtt_bridge.dead_letters")
    assert error.startswith("PostgreSQL says: ")


def unforeseen(bench: Bench) -> list[Failure]:
    """What failed otherwise than because the table had been altered since the last batch."""
    return [failure for failure in bench.failures if "altered" not in failure.sentence]


for _refusal in REFUSALS:
    proves(_refusal.verdict, _refusal.sqlstate)


@pytest.mark.parametrize(
    ("bad", "sqlstate", "reason"),
    [
        (reading(3, text="nul \0"), "22021", "invalid byte sequence"),
        (reading(3, text="half a character \ud800"), None, "UnicodeEncodeError"),
        (reading(3, value=10**400), None, "error: required argument is not a float"),
        (reading(3, value="no number"), None, "error: required argument is not a float"),
    ],
    ids=["NUL", "surrogate", "beyond a double", "no float"],
)
def test_a_row_that_cannot_be_written_becomes_one_dead_letter_and_all_others_are_stored(bench, bad, sqlstate, reason):
    outcome = bench.store([1, 2, 4], bad)

    wait_until(lambda: outcome or bench.failures, timeout_s=30, what="the batch")
    assert not bench.failures
    assert bench.values() == [1, 2, 4]
    assert bench.letters() == [("3", "store", sqlstate)]
    assert reason in bench.sql("SELECT error FROM mqtt_bridge.dead_letters")[0][0]


def test_a_value_that_the_driver_cannot_adapt_takes_the_batch_apart(postgres):
    with closing(psycopg2.connect(postgres.dsn())) as connection, connection.cursor() as cursor:
        with pytest.raises(psycopg2.ProgrammingError, match="can't adapt") as caught:
            cursor.execute("SELECT %s", (object(),))

        assert errors.classify(caught.value, connected=not connection.closed).verdict in isolation.AT_FAULT


# -- nothing is left out


def test_every_code_of_the_table_is_raised_here_by_a_real_server():
    unproven = {
        entry: verdict.value
        for entry, verdict in errors._BY_SQLSTATE.items()
        if not any(verdict in verdicts and decided_by(code) == entry for code, verdicts in PROVEN.items())
    }

    assert unproven == {}


def decided_by(sqlstate: str) -> str | None:
    """The entry of the table that this code is judged by: the longest prefix."""
    return next((sqlstate[:n] for n in (5, 3, 2) if sqlstate[:n] in errors._BY_SQLSTATE), None)


def test_every_text_with_a_remedy_for_connecting_is_met_here():
    met = {case.sentence for case in CONNECTING} | MET_ELSEWHERE

    unmet = [
        pattern
        for pattern, remedy in errors._CONNECT_REMEDIES
        if not any(errors._connect_remedy(sentence) == remedy for sentence in met)
    ]
    assert unmet == []


MET_ELSEWHERE = {
    "sorry, too many clients already",
    "timeout expired",
    "certificate verify failed",
    "the database system is shutting down",
    "no more connections allowed (max_client_conn)",
    "unsupported startup parameter: options",
}
"""Sentences that tests with a story of their own wait for."""
