"""The pool against a real PostgreSQL: it waits, it replaces what has died, it leaves nothing behind."""

from __future__ import annotations

import threading
from contextlib import closing, suppress

import psycopg2
import pytest
from psycopg2 import extensions

from mqtt_bridge.connections import Connections
from mqtt_bridge.errors import SinkError
from tests.proxy import TcpProxy
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def database(postgres_server):
    yield postgres_server.create_database("test_connections")
    postgres_server.drop_database("test_connections")


@pytest.fixture
def observer(database):
    """A connection beside the pool."""
    with closing(psycopg2.connect(database)) as connection:
        connection.autocommit = True
        yield connection


@pytest.fixture
def pool_of(observer):
    """Makes pools, closes them, and sees to it that none of their connections is left."""
    pools = []

    def make(dsn, *, size=2, **kwargs):
        pools.append(Connections(dsn if callable(dsn) else lambda: dsn, size=size, **kwargs))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()
    wait_until(lambda: backends(observer) == 0, what="the server to see every connection closed")


def backends(observer):
    """How many connections the server has, beside the observer's."""
    statement = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    return len(ask(observer, statement))


def kill_all(observer):
    ask(
        observer,
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )


def ask(connection, statement):
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


def use(pool):
    """Run a statement; the backend that ran it."""
    with pool.connection() as connection:
        return ask(connection, "SELECT pg_backend_pid()")[0][0]


def test_making_a_pool_connects_to_nothing(pool_of, observer, database):
    pool = pool_of(database, size=3)
    assert backends(observer) == 0

    use(pool)

    assert (backends(observer), pool.size, pool.in_use) == (3, 3, 0)


def test_connections_are_in_autocommit_mode(pool_of, database):
    with pool_of(database).connection() as connection:
        ask(connection, "SELECT 1")

        assert connection.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE


def test_connections_are_used_again(pool_of, database):
    pool = pool_of(database, size=1)

    assert use(pool) == use(pool)


def test_who_finds_all_connections_lent_out_waits_for_one(pool_of, database):
    pool = pool_of(database, size=2)
    got = []
    with pool.connection(), pool.connection():
        assert pool.in_use == 2
        waiting = threading.Thread(target=lambda: got.append(use(pool)))
        waiting.start()
        assert not got

    waiting.join(10)
    assert got


def test_who_waits_for_too_long_is_told_which_setting_to_raise(pool_of, database):
    pool = pool_of(database, size=1, wait_s=0.01)

    with pool.connection():
        with pytest.raises(SinkError, match="DB_POOL_SIZE"), pool.connection():
            pass

    use(pool)


def test_many_threads_share_few_connections(pool_of, observer, database):
    pool = pool_of(database, size=3)
    errors, most = [], []

    def work():
        try:
            for _ in range(20):
                use(pool)
                most.append(pool.in_use)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert max(most) <= 3
    assert backends(observer) == 3
    assert pool.in_use == 0


def test_a_pool_made_while_the_database_is_down_works_when_it_comes(pool_of, own_postgres):
    postgres = own_postgres()
    postgres.stop()
    pool = pool_of(postgres.dsn())
    for _ in range(5):  # more often than there are slots
        with pytest.raises(psycopg2.OperationalError):
            use(pool)

    postgres.start()

    assert use(pool)


def test_a_broken_connection_is_replaced_and_so_are_its_idle_companions(pool_of, observer, database):
    pool = pool_of(database, size=3)
    use(pool)
    kill_all(observer)

    with pytest.raises(psycopg2.OperationalError):
        use(pool)

    for _ in range(4):
        use(pool)
    assert backends(observer) == 3
    assert pool.in_use == 0


def test_a_connection_that_breaks_in_a_transaction_gives_its_slot_back(pool_of, observer, database):
    pool = pool_of(database, size=1, wait_s=1)

    def break_in_a_transaction():
        with pool.connection() as connection:
            ask(connection, "BEGIN; SELECT 1")
            kill_all(observer)
            ask(connection, "COMMIT")

    for _ in range(3):
        with pytest.raises(psycopg2.OperationalError):
            break_in_a_transaction()

    assert use(pool)


def test_a_connection_that_was_lent_out_when_another_broke_is_closed_as_it_comes_back(pool_of, observer, database):
    pool = pool_of(database, size=2)

    def break_another():
        with pool.connection() as victim:
            ask(observer, f"SELECT pg_terminate_backend({victim.info.backend_pid}, 5000)")
            ask(victim, "SELECT 1")

    with pool.connection() as survivor:
        ask(survivor, "SELECT 1")
        with pytest.raises(psycopg2.OperationalError):
            break_another()
        ask(survivor, "SELECT 1")

    assert survivor.closed
    use(pool)
    assert backends(observer) == 2


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_of_the_server_costs_one_try(pool_of, own_postgres, mode):
    postgres = own_postgres()
    pool = pool_of(postgres.dsn(), size=3)
    use(pool)
    postgres.restart(mode)

    with pytest.raises(psycopg2.OperationalError):
        use(pool)

    for _ in range(4):
        use(pool)


@pytest.mark.parametrize("statement", ["CREATE TABLE t (n int)", "SELECT 1 / 0"])
def test_a_connection_left_in_a_transaction_comes_back_clean(pool_of, observer, database, statement):
    pool = pool_of(database, size=1)
    with pool.connection() as connection, suppress(psycopg2.DataError):
        pid = connection.info.backend_pid
        ask(connection, "BEGIN")
        ask(connection, statement)

    with pool.connection() as connection:
        assert connection.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE
        assert connection.info.backend_pid == pid
    assert ask(observer, "SELECT to_regclass('t')") == [(None,)]


def test_a_connection_left_in_the_middle_of_a_copy_does_no_harm(pool_of, observer, database):
    pool = pool_of(database, size=1)
    ask(observer, "CREATE TABLE IF NOT EXISTS copied (n int)")

    class Broken:
        def read(self, size):
            raise RuntimeError("no data")

    def copy():
        with pool.connection() as connection, connection.cursor() as cursor:
            cursor.copy_expert("BEGIN; COPY copied FROM STDIN", Broken())

    with pytest.raises((psycopg2.Error, RuntimeError)):
        copy()

    with pool.connection() as connection:
        assert connection.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE
        assert ask(connection, "SELECT * FROM copied") == []


def test_a_borrower_whose_server_falls_silent_can_be_cut_loose(pool_of, database):
    port = int(extensions.parse_dsn(database)["port"])
    with TcpProxy("127.0.0.1", port) as proxy:
        pool = pool_of(database.replace(f":{port}/", f":{proxy.port}/"), size=2)
        use(pool)
        errors = []

        def borrow():
            try:
                with pool.connection(limit_s=0.01) as connection:
                    ask(connection, "SELECT 1")
            except psycopg2.Error as error:
                errors.append(error)

        with pool.connection() as patient:
            proxy.stall()
            borrowing = threading.Thread(target=borrow)
            borrowing.start()
            wait_until(lambda: pool.in_use == 2, what="the borrower")

            wait_until(pool.cut_silent, what="the silence to be noticed")
            borrowing.join(10)
            proxy.resume()

            assert [type(error) for error in errors] == [psycopg2.OperationalError]
            assert ask(patient, "SELECT 1") == [(1,)], "whoever has time left is left alone"
        assert use(pool)
        pool.close()


def test_who_waits_for_longer_than_anybody_may_is_cut_loose_before_his_own_time(pool_of, database):
    pool = pool_of(database)

    with pool.connection(limit_s=60) as connection:
        assert pool.cut_silent(at_most_s=60) == 0
        assert pool.cut_silent(at_most_s=0.0) == 1
        with pytest.raises(psycopg2.OperationalError):
            ask(connection, "SELECT 1")


def test_silent_connections_can_be_cut_while_somebody_else_waits_for_a_new_pool(pool_of, database):
    asked, go_on = threading.Event(), threading.Event()

    def slow_dsn():
        if asked.is_set():
            go_on.wait(10)
        return database

    pool = pool_of(slow_dsn, size=2)
    with suppress(psycopg2.Error), pool.connection() as broken:
        with suppress(psycopg2.Error), pool.connection() as other:
            other.close()  # the pool is retired: the next one is made under the lock
        asked.set()
        connecting = threading.Thread(target=use, args=(pool,))
        connecting.start()
        wait_until(pool._lock.locked, what="somebody to connect")

        assert pool.cut_silent(at_most_s=0.0) == 1
        with pytest.raises(psycopg2.OperationalError):
            ask(broken, "SELECT 1")
        go_on.set()
    connecting.join(10)
    assert use(pool)


def test_a_thread_that_asks_for_connections_and_sends_statements_is_seen_to_get_on(pool_of, database):
    pool, me = pool_of(database), threading.get_ident()
    seen = [pool.steps(me)]

    with pool.connection() as connection:
        seen.append(pool.steps(me))
        ask(connection, "SELECT 1")
        seen.append(pool.steps(me))
        ask(connection, "SELECT 1")
        seen.append(pool.steps(me))

    assert seen == sorted(set(seen))
    assert pool.steps(me + 1) == 0


def test_a_thread_that_cannot_connect_is_seen_to_try(pool_of, observer):
    pool, me = pool_of("host=127.0.0.1 port=1 dbname=nowhere"), threading.get_ident()
    before = pool.steps(me)

    with pytest.raises(psycopg2.OperationalError):
        use(pool)

    assert pool.steps(me) > before


def test_nobody_is_cut_loose_while_statements_are_answered(pool_of, database):
    pool = pool_of(database)

    with pool.connection(limit_s=60) as connection:
        ask(connection, "SELECT 1")
        assert pool.cut_silent() == 0
        assert ask(connection, "SELECT 1") == [(1,)]


def test_an_error_of_the_borrower_costs_nothing(pool_of, observer, database):
    pool = pool_of(database, size=1)
    before = use(pool)

    with pytest.raises(KeyError), pool.connection():
        raise KeyError("x")

    assert use(pool) == before
    assert pool.in_use == 0


def test_a_connection_is_fresh_until_a_statement_has_succeeded(pool_of, database):
    pool = pool_of(database, size=1)

    with pool.connection() as connection:
        assert connection.fresh
        ask(connection, "SELECT 1")
    with pool.connection() as connection:
        assert not connection.fresh


def test_a_rotated_dsn_is_found_by_the_next_connections(pool_of, observer, database):
    names = iter(["before", "after"])
    pool = pool_of(lambda: f"{database}?application_name={next(names)}", size=1)
    with pool.connection() as connection:
        assert ask(connection, "SHOW application_name") == [("before",)]
    kill_all(observer)
    with pytest.raises(psycopg2.OperationalError):
        use(pool)

    with pool.connection() as connection:
        assert ask(connection, "SHOW application_name") == [("after",)]


def test_a_dsn_that_cannot_be_read_is_the_borrowers_error_and_is_asked_again(pool_of, database):
    answers = iter([SinkError("the secret is gone"), database])

    def dsn():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    pool = pool_of(dsn, size=1)
    with pytest.raises(SinkError, match="secret"):
        use(pool)

    assert use(pool)


def test_closing_waits_for_nobody_and_what_is_lent_out_stays_usable_until_it_comes_back(pool_of, observer, database):
    pool = pool_of(database, size=3)
    with pool.connection() as connection:
        pool.close()
        pool.close()

        assert ask(connection, "SELECT 1") == [(1,)]

    assert connection.closed
    wait_until(lambda: backends(observer) == 0, what="every connection to be closed")


def test_a_closed_pool_lends_nothing(pool_of, database):
    unused, used = pool_of(database), pool_of(database)
    use(used)

    for pool in (unused, used):
        pool.close()
        pool.close()
        with pytest.raises(SinkError, match="closed"):
            use(pool)
