"""Batches into a real PostgreSQL that fails at every point where it can: stored once, whatever happens."""

from __future__ import annotations

import itertools
import threading
from contextlib import closing

import psycopg2
import pytest
from psycopg2 import extensions

from mqtt_bridge import connections as connections_module
from mqtt_bridge import ledger, schema
from mqtt_bridge import sink as sink_module
from mqtt_bridge.breaker import Breaker
from mqtt_bridge.connections import BridgeConnection, Connections
from mqtt_bridge.copying import EPOCH_US
from mqtt_bridge.errors import Fenced, Verdict
from mqtt_bridge.ledger import BatchKey, Entry, Ledger, fingerprint
from mqtt_bridge.model import READINGS_COLUMNS, DeadLetter, Message, Table, Translation
from mqtt_bridge.retained import Remembered
from mqtt_bridge.sink import Sink, Stopped
from mqtt_bridge.tools.embedded import free_port
from mqtt_bridge.transactions import Batch, Stored
from tests.proxy import TcpProxy
from tests.waiting import wait_until

NOW_US = 1_790_000_000_000_000
READINGS = Table("readings", READINGS_COLUMNS)


class House:
    """A sink on a database, and an observer beside it."""

    def __init__(self, dsn, *, observed_by=None, client_id="hall", open=True, size=3, **options):
        self.observer = psycopg2.connect(observed_by or dsn, application_name="observer")
        self.observer.autocommit = True
        self.connections = Connections(lambda: dsn, size=size)
        self.sink = Sink(self.connections, client_id=client_id, **options)
        self.threads = []
        self.batches = itertools.count(1)
        self.claim = self.sink.open(create=True) if open else None

    def close(self):
        self.sink.stop()
        for thread in self.threads:
            thread.join(timeout=10)
        self.connections.close()
        self.observer.close()

    def sql(self, statement, *args):
        with self.observer.cursor() as cursor:
            cursor.execute(statement, args or None)
            return cursor.fetchall() if cursor.description else []

    def batch(self, translated=(), dead_letters=()):
        positions = [message.position for message, _ in translated if message.qos]
        marks = b"".join(message.fingerprint for message, _ in translated if message.qos)
        key = BatchKey(self.claim.owner_epoch, next(self.batches))
        entry = Entry(key, self.claim.session_epoch, min(positions, default=0), marks)
        return Batch(entry, list(translated), list(dead_letters))

    def store_beside(self, batch):
        """Store in a thread of its own; the list will hold what came of it."""
        outcome = []

        def store():
            try:
                outcome.append(self.sink.store(batch))
            except (Stopped, Fenced) as error:
                outcome.append(error)

        thread = threading.Thread(target=store, name="test-store")
        self.threads.append(thread)
        thread.start()
        return outcome

    def kill_connections(self):
        """All but the observer's."""
        self.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    def values(self):
        return [value for (value,) in self.sql("SELECT value FROM readings ORDER BY value")]

    def letters(self):
        return self.sql(
            "SELECT convert_from(payload, 'UTF8'), stage, sqlstate FROM mqtt_bridge.dead_letters ORDER BY id"
        )

    def ledger_keys(self):
        return self.sql("SELECT owner_epoch, batch FROM mqtt_bridge.ledger ORDER BY 1, 2")


@pytest.fixture(scope="module")
def lasting_database(postgres_server):
    yield postgres_server.create_database("test_sink")
    postgres_server.drop_database("test_sink")


@pytest.fixture
def database(lasting_database):
    """One database for all tests here, emptied before each: that takes a tenth of the time of a new one."""
    with closing(psycopg2.connect(lasting_database)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for statement in EMPTY:
                cursor.execute(statement)
    return lasting_database


EMPTY = (
    "ALTER DATABASE test_sink RESET ALL",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    "DROP SCHEMA IF EXISTS mqtt_bridge CASCADE",
    "DROP SCHEMA public CASCADE",
    "CREATE SCHEMA public",
    "GRANT USAGE ON SCHEMA public TO public",
)


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Pauses a tenth as long as in life."""
    for verdict, (first_s, longest_s) in sink_module._DELAYS_S.items():
        monkeypatch.setitem(sink_module._DELAYS_S, verdict, (first_s / 10, longest_s / 10))


@pytest.fixture
def house_of():
    """Makes a House of a dsn, as often as called."""
    houses = []

    def make(*args, **kwargs):
        houses.append(House(*args, **kwargs))
        return houses[-1]

    yield make
    for house in houses:
        house.close()


@pytest.fixture
def house(house_of, database):
    return house_of(database)


def reading(number, *, topic=b"devices/d", device="d", value=None, text=None, rows=1, qos=1):
    """A message whose payload is its number, and one row (or several alike) with the number as value."""
    value = float(number) if value is None and text is None else value
    message = Message(topic, str(number).encode(), qos, False, NOW_US)
    if qos:
        mark = fingerprint(message.topic, message.payload, retain=False)
        message = message._replace(position=number, fingerprint=mark)
    row = (NOW_US, device, "m", value, text)
    return message, Translation("default", READINGS, [row] * rows)


def readings(numbers):
    return [reading(number) for number in numbers]


def refuse_negative_values(house, kind):
    """Make the server refuse rows with a negative value, each in its own way; returns the SQLSTATE."""
    function = (
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.value < 0 THEN {} END IF; RETURN NEW; END $$"
    )
    statements, sqlstate = {
        "check": (["ALTER TABLE readings ADD CONSTRAINT positive CHECK (value >= 0)"], "23514"),
        "trigger": (
            [
                function.format("RAISE EXCEPTION 'negative';"),
                "CREATE TRIGGER refuse BEFORE INSERT ON readings FOR EACH ROW EXECUTE FUNCTION refuse()",
            ],
            "P0001",
        ),
        "division by zero": (
            [
                function.format("NEW.value := 1 / 0;"),
                "CREATE TRIGGER refuse BEFORE INSERT ON readings FOR EACH ROW EXECUTE FUNCTION refuse()",
            ],
            "22012",
        ),
        "a code nobody knows": (
            [
                function.format("RAISE EXCEPTION 'negative' USING ERRCODE = 'ZZ999';"),
                "CREATE TRIGGER refuse BEFORE INSERT ON readings FOR EACH ROW EXECUTE FUNCTION refuse()",
            ],
            "ZZ999",
        ),
        "deferred": (
            [
                function.format("RAISE EXCEPTION 'negative';"),
                "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON readings DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION refuse()",
            ],
            "P0001",
        ),
        "unique": (
            [
                "DROP TABLE readings",
                "CREATE TABLE readings (time timestamptz, device text, metric text, value float8, value_text text)",
                "CREATE UNIQUE INDEX ON readings (value) WHERE value < 0",
                "INSERT INTO readings VALUES (now(), 'd', 'm', -1, 'was here'), (now(), 'd', 'm', -2, 'was here')",
            ],
            "23505",
        ),
    }[kind]
    for statement in statements:
        house.sql(statement)
    return sqlstate


# -- one batch, one transaction


def test_a_batch_is_stored_with_its_dead_letters_and_its_ledger_row(house):
    broken = Message(b"devices/x", b"{", 1, False, NOW_US)
    batch = house.batch([reading(7), reading(8, rows=3)], [DeadLetter(broken, "default", "decode", "no JSON")])

    stored = house.sink.store(batch)

    assert stored == Stored({"readings": 4})
    assert house.values() == [7, 8, 8, 8]
    assert house.letters() == [("{", "decode", None)]
    ((key_epoch, key, session, first, entries),) = house.sql(
        "SELECT owner_epoch, batch, session_epoch, first_position, entries FROM mqtt_bridge.ledger"
    )
    assert (key_epoch, key, session, first) == (*batch.entry.key, 1, 7)
    assert bytes(entries) == batch.entry.fingerprints


def test_a_batch_of_dead_letters_alone_is_stored(house):
    letters = [DeadLetter(Message(b"t", b"p", 0, False, NOW_US), None, "route", "No route matches the topic.")]

    assert house.sink.store(house.batch(dead_letters=letters)) == Stored()

    assert house.letters() == [("p", "route", None)]


def test_a_batch_without_rows_leaves_its_ledger_row(house):
    batch = house.batch()
    marked = Batch(batch.entry._replace(first_position=5, fingerprints=b"12345678"), [], [])

    assert house.sink.store(marked) == Stored()

    assert house.ledger_keys() == [batch.entry.key]


def test_the_ledger_rows_that_a_batch_names_are_pruned_with_it(house):
    first, second = house.batch(readings([1])), house.batch(readings([2]))
    house.sink.store(first)
    house.sink.store(second)
    third = house.batch(readings([3]))
    third = Batch(third.entry._replace(pruned=(first.entry.key,)), third.translated, [])

    house.sink.store(third)

    assert house.ledger_keys() == [second.entry.key, third.entry.key]
    house.sink.prune([second.entry.key, third.entry.key])
    assert house.ledger_keys() == []


def test_a_batch_is_not_stored_a_second_time(house):
    batch = house.batch(readings([1, 2]))
    house.sink.store(batch)

    assert house.sink.store(batch) == Stored({"readings": 2})

    assert house.values() == [1, 2]


def test_workers_store_side_by_side(house):
    batches = [house.batch(readings(range(start, start + 50))) for start in range(0, 500, 50)]

    outcomes = [house.store_beside(batch) for batch in batches]

    wait_until(lambda: all(outcomes), what="all batches")
    assert house.values() == list(range(500))
    assert len(house.ledger_keys()) == 10


# -- the connection dies


class Saboteur:
    """Kills the backend of the sink at a chosen point, once or more; knows which points were reached."""

    def __init__(self, point, dsn, *, times=1):
        self.point = point
        self.dsn = dsn
        self.times = times
        self.struck = 0

    def strikes(self, point, connection):
        """Kill the backend if this is the point."""
        if point != self.point or self.struck >= self.times:
            return False
        self.struck += 1
        pid = connection.info.backend_pid
        with_one = psycopg2.connect(self.dsn)
        try:
            with with_one.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(%s, 10000)", (pid,))
        finally:
            with_one.close()
        return True


def fragile_connection(saboteur):
    class Data:
        """COPY data in two parts; the connection may die between them."""

        def __init__(self, file, connection):
            self.file, self.connection, self.parts = file, connection, 0

        def read(self, size=-1):
            self.parts += 1
            if self.parts == 2:
                saboteur.strikes("during COPY", self.connection)
            return self.file.read(32)

    class Cursor(extensions.cursor):
        def copy_expert(self, sql, file, size=8192):
            saboteur.strikes("before BEGIN", self.connection)
            super().copy_expert(sql, Data(file, self.connection), 32)

        def execute(self, query, vars=None):
            if not str(query).endswith("COMMIT"):
                super().execute(query, vars)
                return
            saboteur.strikes("before COMMIT", self.connection)
            super().execute(query, vars)
            if saboteur.strikes("after COMMIT", self.connection):
                self.connection.close()
                raise psycopg2.OperationalError("server closed the connection unexpectedly")

    class FragileConnection(BridgeConnection):
        def cursor(self, *args, **kwargs):
            return super().cursor(*args, cursor_factory=Cursor, **kwargs)

    return FragileConnection


POINTS = ("before BEGIN", "during COPY", "before COMMIT", "after COMMIT")


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("point", POINTS)
def test_a_batch_is_stored_once_although_its_connection_dies(house, database, monkeypatch, point, times):
    saboteur = Saboteur(point, database, times=times if point != "after COMMIT" else 1)
    monkeypatch.setattr(connections_module, "BridgeConnection", fragile_connection(saboteur))
    house.connections._pool = None
    batch = house.batch(readings(range(20)), [DeadLetter(Message(b"t", b"p", 1, False, NOW_US), None, "route", "none")])

    stored = house.sink.store(batch)

    assert saboteur.struck == saboteur.times
    assert stored == Stored({"readings": 20})
    assert house.values() == list(range(20))
    assert house.letters() == [("p", "route", None)]
    assert house.ledger_keys() == [batch.entry.key]
    assert house.sink.trouble is None


@pytest.mark.parametrize("point", POINTS)
def test_a_batch_with_a_bad_row_is_stored_once_although_its_connection_dies(house, database, monkeypatch, point):
    refuse_negative_values(house, "trigger")
    saboteur = Saboteur(point, database)
    monkeypatch.setattr(connections_module, "BridgeConnection", fragile_connection(saboteur))
    house.connections._pool = None
    batch = house.batch([*readings(range(10)), reading(11, value=-1.0)])

    stored = house.sink.store(batch)

    assert saboteur.struck == 1
    assert stored.rows == {"readings": 10}
    assert [letter.message.payload for letter in stored.refused] == [b"11"]
    assert house.values() == list(range(10))
    assert house.letters() == [("11", "store", "P0001")]
    assert house.ledger_keys() == [batch.entry.key]


def test_batches_are_stored_once_through_cuts_at_any_moment(house_of, database):
    host, port = "127.0.0.1", int(psycopg2.extensions.parse_dsn(database)["port"])
    with TcpProxy(host, port) as proxy:
        dsn = database.replace(f":{port}/", f":{proxy.port}/")
        house = house_of(dsn, observed_by=database)
        batches = [house.batch(readings(range(start, start + 100))) for start in range(0, 4000, 100)]
        outcomes = []
        storing = threading.Thread(target=lambda: outcomes.extend(map(house.sink.store, batches)))
        storing.start()

        cuts = 0
        while storing.is_alive() and cuts < 12:
            before = len(outcomes)
            proxy.cut()
            cuts += 1
            wait_until(lambda at=before: len(outcomes) > at or not storing.is_alive(), what="progress after a cut")
        storing.join(timeout=60)

        assert outcomes == [Stored({"readings": 100})] * len(batches)
        assert house.values() == list(range(4000))
        assert len(house.ledger_keys()) == len(batches)
        house.close()


def test_a_database_that_falls_silent_is_waited_for_and_the_batch_is_stored_once(house_of, database):
    port = int(psycopg2.extensions.parse_dsn(database)["port"])
    with TcpProxy("127.0.0.1", port) as proxy:
        house = house_of(database.replace(f":{port}/", f":{proxy.port}/"), observed_by=database)
        proxy.stall()
        outcome = house.store_beside(house.batch(readings([1, 2])))
        wait_until(lambda: house.connections.in_use, what="the batch to be under way")
        assert not outcome

        proxy.resume()

        wait_until(lambda: outcome, what="the batch")
        assert house.values() == [1, 2]
        house.close()


def test_a_worker_that_a_silent_database_holds_can_be_cut_loose_and_stores_its_batch_once(
    house_of, database, monkeypatch
):
    monkeypatch.setattr(sink_module, "SILENCE_S", 0.0)
    port = int(psycopg2.extensions.parse_dsn(database)["port"])
    with TcpProxy("127.0.0.1", port) as proxy:
        dsn = database.replace(f":{port}/", f":{proxy.port}/")
        house = house_of(dsn, observed_by=database, statement_timeout_s=0.2)
        proxy.stall()
        outcome = house.store_beside(house.batch(readings([1, 2])))
        wait_until(house.connections.cut_silent, what="the watchdog to find the silent connection")

        # The first try now arrives at the server, long after its worker has given it up.
        proxy.resume()

        wait_until(lambda: outcome, what="the batch")
        assert house.values() == [1, 2]
        assert len(house.ledger_keys()) == 1
        house.close()


def test_releasing_the_spool_is_given_up_as_soon_as_a_probe_while_the_statement_timeout_is_long(
    house_of, database, monkeypatch
):
    monkeypatch.setattr(sink_module, "PROBE_LIMIT_S", 0.2)
    port = int(psycopg2.extensions.parse_dsn(database)["port"])
    with TcpProxy("127.0.0.1", port) as proxy:
        house = house_of(database.replace(f":{port}/", f":{proxy.port}/"), observed_by=database)
        proxy.stall()
        errors = []

        def release():
            try:
                house.sink.release_spool()
            except psycopg2.Error as error:
                errors.append(error)

        threading.Thread(target=release, daemon=True).start()
        wait_until(house.connections.cut_silent, what="the watchdog to find the silent connection")

        wait_until(lambda: errors, what="the release to be given up")
        proxy.resume()
        house.close()


def test_connections_that_died_while_they_lay_idle_are_replaced_without_a_word(house):
    house.sink.store(house.batch(readings([1])))
    house.kill_connections()

    troubles = []
    house.sink._note = troubles.append
    house.sink.store(house.batch(readings([2])))

    assert house.values() == [1, 2]
    assert troubles == []


def test_a_batch_waits_for_a_server_that_is_restarted(house_of, own_postgres):
    postgres = own_postgres()
    house = house_of(postgres.create_database("away"))
    house.sink.store(house.batch(readings([1])))
    house.observer.close()

    postgres.kill()
    assert not house.sink.probe()
    assert not house.sink.reachable
    assert house.sink.trouble.verdict is Verdict.RECONNECT
    outcome = house.store_beside(house.batch(readings([2])))
    wait_until(lambda: house.sink.retries >= 2, what="two tries")
    assert not outcome
    postgres.start()
    assert house.sink.probe()

    wait_until(lambda: outcome, what="the batch", timeout_s=40)
    house.observer = psycopg2.connect(postgres.dsn("away"))
    assert house.values() == [1, 2]
    assert house.sink.reachable
    assert house.sink.trouble is None


def test_a_server_that_had_become_read_only_is_asked_anew_by_new_connections(house):
    (name,) = house.sql("SELECT current_database()")[0]
    house.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    house.kill_connections()
    outcome = house.store_beside(house.batch(readings([1])))
    wait_until(lambda: house.sink.trouble and house.sink.trouble.sqlstate == "25006", what="the refusal")

    # As after a fail-over: whoever connects now reaches a server that takes writes; open connections do not.
    house.sql("SET default_transaction_read_only = off")
    house.sql(f"ALTER DATABASE {name} RESET default_transaction_read_only")

    wait_until(lambda: outcome, what="the batch")
    assert house.values() == [1]


# -- locks and limits


def test_a_database_is_heard_of_by_its_refusals_and_not_by_its_absence(house_of, own_postgres):
    postgres = own_postgres()
    house = house_of(postgres.create_database("heard"))

    before = house.sink.heard_s
    house.sql("ALTER TABLE mqtt_bridge.owners RENAME TO elsewhere")
    assert not house.sink.probe()
    assert house.sink.trouble.verdict is Verdict.CONFIGURATION
    refused = house.sink.heard_s
    house.sql("ALTER TABLE mqtt_bridge.elsewhere RENAME TO owners")
    assert house.sink.probe()
    answered = house.sink.heard_s
    house.observer.close()
    postgres.kill()
    assert not house.sink.probe()

    assert before < refused < answered == house.sink.answered_s == house.sink.heard_s
    house.connections.close()


def test_a_time_out_is_tried_again_until_the_lock_is_gone(house_of, database):
    house = house_of(database, statement_timeout_s=0.1)
    house.sql("BEGIN")
    house.sql("LOCK TABLE readings")

    outcome = house.store_beside(house.batch(readings([1, 2])))
    wait_until(lambda: house.sink.retries >= 2, what="two time-outs")
    assert house.sink.trouble.verdict is Verdict.BUSY
    house.sql("ROLLBACK")

    wait_until(lambda: outcome, what="the batch")
    assert house.values() == [1, 2]


def test_a_twin_that_is_still_alive_is_waited_for_and_then_believed(house_of, database):
    # The first try of this batch lost its connection, but its backend has not noticed yet and commits later.
    house = house_of(database, statement_timeout_s=0.1)
    batch = house.batch(readings([1]))
    house.sql("BEGIN")
    house.sql("INSERT INTO readings VALUES (now(), 'd', 'm', 1, NULL)")
    house.sql("INSERT INTO mqtt_bridge.ledger VALUES ('hall', %s, %s, 1, 1, '')", *batch.entry.key)

    outcome = house.store_beside(batch)
    wait_until(lambda: house.sink.retries >= 2, what="two time-outs on the ledger")
    house.sql("COMMIT")

    wait_until(lambda: outcome, what="the batch")
    assert outcome == [Stored({"readings": 1})]
    assert house.values() == [1]


# -- rows at fault


KINDS = ("check", "trigger", "division by zero", "a code nobody knows", "deferred", "unique")


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_the_server_refuses_costs_its_message_and_no_other(house, kind):
    sqlstate = refuse_negative_values(house, kind)
    was_there = [value for value in house.values() if value < 0]
    good, bad = readings(range(100)), [reading(201, value=-1.0), reading(202, value=-2.0)]

    stored = house.sink.store(house.batch([*good[:30], bad[0], *good[30:77], bad[1], *good[77:]]))

    assert stored.rows == {"readings": 100}
    assert [(letter.message.payload, letter.sqlstate) for letter in stored.refused] == [
        (b"201", sqlstate),
        (b"202", sqlstate),
    ]
    assert house.values() == was_there + list(range(100))
    assert house.letters() == [("201", "store", sqlstate), ("202", "store", sqlstate)]


def test_a_text_that_is_too_long_for_its_column_costs_its_message_and_no_other(house):
    house.sql("DROP TABLE readings")
    house.sql(
        "CREATE TABLE readings (time timestamptz, device varchar(5), metric text, value float8, value_text varchar(5))"
    )

    house.sink.store(house.batch([reading(1), reading(2, device="abcdef"), reading(3, text="abcdef"), reading(4)]))

    assert house.values() == [1, 4]
    assert house.letters() == [("2", "store", "22001"), ("3", "store", "22001")]


@pytest.mark.parametrize(
    "row",
    [
        (NOW_US, "d", "nul\0", 1.0, None),
        (NOW_US, "d", "m", None, "\ud800"),
        (NOW_US, "d", "m", 10**400, None),
        (NOW_US, "d", "m", "no number", None),
        (2**63 + 2_000_000_000_000_000, "d", "m", 1.0, None),
        (EPOCH_US + 2**63 - 2, "d", "m", 1.0, None),
    ],
    ids=["NUL", "lone surrogate", "beyond a double", "text for a number", "beyond 64 bits", "beyond all times"],
)
def test_a_row_that_cannot_be_encoded_costs_its_message_and_no_other(house, row):
    message, _ = reading(2)
    batch = house.batch([reading(1), (message, Translation("default", READINGS, [row])), reading(3)])

    outcome = house.store_beside(batch)

    wait_until(lambda: outcome or house.sink.retries, what="the batch, or a retry")
    assert house.sink.retries == 0, f"tried for ever: {house.sink.trouble}"
    assert house.values() == [1, 3]
    assert [(payload, stage) for payload, stage, _ in house.letters()] == [("2", "store")]


def test_no_row_of_a_refused_message_is_stored(house):
    refuse_negative_values(house, "check")
    message, translation = reading(2, rows=3)
    translation = translation._replace(rows=[*translation.rows, (NOW_US, "d", "m", -1.0, None)])

    stored = house.sink.store(house.batch([reading(1), (message, translation), reading(3)]))

    assert stored.rows == {"readings": 2}
    assert house.values() == [1, 3]


@pytest.mark.parametrize("kind", ["check", "deferred", "a code nobody knows"])
def test_when_every_message_is_refused_all_become_dead_letters(house, kind):
    refuse_negative_values(house, kind)
    bad = [reading(number, value=-1.0) for number in range(64)]

    stored = house.sink.store(house.batch(bad))

    assert len(stored.refused) == 64
    assert house.values() == []
    assert [payload for payload, *_ in house.letters()] == [str(number) for number in range(64)]
    assert len(house.ledger_keys()) == 1


def test_when_everything_from_many_topics_is_refused_alike_for_long_the_sink_pauses(house):
    refuse_negative_values(house, "check")
    clock = Clock()
    house.sink._transactions._breaker = Breaker(clock)
    first = [reading(number, value=-1.0, topic=f"devices/{number % 3}".encode()) for number in range(100)]
    assert len(house.sink.store(house.batch(first)).refused) == 100

    clock.now_s = 9.0
    assert len(house.sink.store(house.batch([reading(100, value=-1.0)])).refused) == 1
    clock.now_s = 10.0
    outcome = house.store_beside(house.batch([reading(101, value=-1.0), reading(102, value=-2.0)]))

    wait_until(lambda: house.sink.trouble, what="the pause")
    assert house.sink.trouble.verdict is Verdict.CONFIGURATION
    assert "positive" in str(house.sink.trouble)
    house.sql("ALTER TABLE readings DROP CONSTRAINT positive")
    wait_until(lambda: outcome, what="the batch")
    assert house.values() == [-2.0, -1.0]
    assert len(house.letters()) == 101


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_dead_letters_of_earlier_stages_are_stored_with_those_that_the_server_makes(house):
    refuse_negative_values(house, "check")
    undecoded = DeadLetter(Message(b"t", b"{", 1, False, NOW_US), "default", "decode", "no JSON")

    stored = house.sink.store(house.batch([reading(1, value=-1.0), reading(2)], [undecoded]))

    assert [letter.message.payload for letter in stored.refused] == [b"1"]
    assert house.letters() == [("{", "decode", None), ("1", "store", "23514")]


def test_a_constraint_that_fails_at_commit_leaves_nothing_of_the_first_try(house):
    refuse_negative_values(house, "deferred")
    batch = house.batch(
        [reading(1), reading(2, value=-1.0)], [DeadLetter(Message(b"t", b"{", 1, False, NOW_US), None, "decode", "x")]
    )

    stored = house.sink.store(batch)

    assert stored.rows == {"readings": 1}
    assert house.values() == [1]
    assert house.letters() == [("{", "decode", None), ("2", "store", "P0001")]


# -- what a dead letter keeps


def test_a_dead_letter_keeps_what_the_device_sent(house):
    message = Message(
        b"devices/\xff\x00/x",
        bytes(range(256)),
        1,
        True,
        NOW_US,
        properties={"UserProperty": [["unit", "°C"]], "ContentType": "text/plain"},
    )
    house.sink.store(house.batch(dead_letters=[DeadLetter(message, "default", "decode", "bad \x00 byte \ud800", None)]))

    ((topic, payload, qos, retain, properties, route, error, client_id, received_at, requeued),) = house.sql(
        "SELECT topic, payload, qos, retain, properties, route, error, client_id,"
        " extract(epoch FROM received_at) * 1000000, requeued_at FROM mqtt_bridge.dead_letters"
    )

    assert topic == "devices/\\xff\\x00/x"
    assert bytes(payload) == bytes(range(256))
    assert (qos, retain, route, client_id) == (1, True, "default", "hall")
    assert properties == {"UserProperty": [["unit", "°C"]], "ContentType": "text/plain"}
    assert error == "bad \\x00 byte \\ud800"
    assert int(received_at) == NOW_US
    assert requeued is None


def test_a_reason_of_any_length_is_cut_and_stored(house):
    letter = DeadLetter(Message(b"t", b"", 0, False, NOW_US), None, "decode", "é" * 100_000)

    house.sink.store(house.batch(dead_letters=[letter]))

    ((error,),) = house.sql("SELECT error FROM mqtt_bridge.dead_letters")
    assert error == "é" * 2000


@pytest.mark.parametrize("text", ["nul \x00", "surrogate \ud800"])
def test_no_property_keeps_a_dead_letter_from_being_stored(house, text):
    message = Message(b"t", b"p", 1, False, NOW_US, properties={"UserProperty": [["a", text]]})
    outcome = house.store_beside(house.batch(dead_letters=[DeadLetter(message, None, "decode", "x")]))

    wait_until(lambda: outcome or house.sink.retries, what="the batch, or a retry")
    assert house.sink.retries == 0, "tried for ever"
    assert house.letters() == [("p", "decode", None)]


# -- configuration


def test_a_missing_table_pauses_the_sink_until_it_is_there(house):
    house.sql("ALTER TABLE readings RENAME TO elsewhere")
    outcome = house.store_beside(house.batch(readings([1])))

    wait_until(lambda: house.sink.trouble, what="the pause")
    assert house.sink.trouble.verdict is Verdict.CONFIGURATION
    assert "readings" in str(house.sink.trouble)
    assert "mqtt-bridge schema" in str(house.sink.trouble)
    assert house.sink.probe()
    assert house.sink.trouble, "that the server answers does not mend the table"
    assert not outcome
    house.sql("ALTER TABLE elsewhere RENAME TO readings")

    wait_until(lambda: outcome, what="the batch")
    assert house.values() == [1]
    assert house.letters() == []
    assert house.sink.trouble is None


def test_the_first_failure_for_want_of_configuration_is_shown_at_once(house):
    house.sink.store(house.batch(readings([1])))
    house.sql("ALTER TABLE readings RENAME TO elsewhere")
    house.store_beside(house.batch(readings([2])))

    wait_until(lambda: house.sink.retries == 1, what="the first failure")

    assert house.sink.trouble is not None


def test_a_missing_grant_pauses_the_sink_and_names_the_grant(house_of, house, database):
    house.sql("DROP ROLE IF EXISTS newcomer")
    house.sql("CREATE ROLE newcomer LOGIN")
    try:
        poor = house_of(database.replace("postgres@", "newcomer@"), observed_by=database, open=False)
        opened = []
        opening = threading.Thread(target=lambda: opened.append(poor.sink.open(create=True)))
        poor.threads.append(opening)
        opening.start()

        wait_until(lambda: poor.sink.trouble, what="the pause")
        assert poor.sink.trouble.verdict is Verdict.CONFIGURATION
        assert 'GRANT USAGE ON SCHEMA mqtt_bridge TO "newcomer"' in str(poor.sink.trouble)
        house.sql("GRANT USAGE ON SCHEMA mqtt_bridge TO newcomer")
        house.sql("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA mqtt_bridge TO newcomer")
        house.sql("GRANT SELECT, INSERT ON readings TO newcomer")

        wait_until(lambda: opened, what="the claim")
    finally:
        house.sql("DROP OWNED BY newcomer")
        house.sql("DROP ROLE newcomer")


@pytest.mark.parametrize("type_", ["int8", "timestamptz"])
def test_a_table_that_comes_back_with_other_types_is_refused_and_not_filled_with_garbage(house, type_):
    house.sink.store(house.batch(readings([1])))
    house.sql("ALTER TABLE readings RENAME TO elsewhere")
    outcome = house.store_beside(house.batch(readings([2])))
    wait_until(lambda: house.sink.retries, what="the pause")

    house.sql(f"CREATE TABLE readings (time timestamptz, device text, metric text, value {type_}, value_text text)")

    wait_until(lambda: outcome or (house.sink.trouble and type_ in str(house.sink.trouble)), what="the refusal")
    assert house.sql("SELECT value IS NULL FROM readings") == []
    assert not outcome


def test_a_row_without_a_partition_pauses_the_sink(house):
    house.sql("DROP TABLE readings_default")
    message, translation = reading(1)
    long_ago = translation._replace(rows=[(0, "d", "m", 1.0, None)])
    outcome = house.store_beside(house.batch([(message, long_ago)]))

    wait_until(lambda: house.sink.trouble, what="the pause")
    assert house.sink.trouble.verdict is Verdict.CONFIGURATION
    assert "default partition" in str(house.sink.trouble)
    house.sql("CREATE TABLE readings_default PARTITION OF readings DEFAULT")

    wait_until(lambda: outcome, what="the batch")
    assert house.letters() == []


# -- owners


def test_the_second_owner_of_a_client_id_fences_the_first(house_of, database):
    first, second = house_of(database), house_of(database)
    second.sink.store(second.batch(readings([1])))

    with pytest.raises(Fenced):
        first.sink.store(first.batch(readings([2])))

    assert second.values() == [1]
    assert second.claim.owner_epoch > first.claim.owner_epoch


def test_a_fenced_owner_that_has_nothing_to_store_learns_of_it_by_probing(house_of, database):
    first = house_of(database)
    assert first.sink.probe()
    second = house_of(database)

    with pytest.raises(Fenced):
        first.sink.probe()

    assert second.sink.probe()


def test_a_fenced_owner_cannot_raise_the_session(house_of, database):
    first, second = house_of(database), house_of(database)

    with pytest.raises(Fenced):
        first.sink.raise_session(7)

    assert second.sql("SELECT session_epoch FROM mqtt_bridge.owners") == [(1,)]


def test_a_fenced_owner_that_takes_a_batch_apart_stores_nothing(house_of, database):
    first, second = house_of(database), house_of(database)

    with pytest.raises(Fenced):
        first.sink.store(first.batch([reading(1), reading(2, text="\ud800")]))

    assert second.values() == []
    assert second.letters() == []


def test_owners_of_other_client_ids_are_left_alone(house_of, database):
    hall, yard = house_of(database), house_of(database, client_id="o'yard")

    hall.sink.store(hall.batch(readings([1])))
    yard.sink.store(yard.batch(readings([2])))

    assert hall.values() == [1, 2]


def test_a_new_owner_reads_what_its_predecessor_committed(house_of, database):
    first = house_of(database)
    batches = [first.batch(readings([1, 2])), first.batch(readings([3]))]
    for batch in batches:
        first.sink.store(batch)

    second = house_of(database)

    assert second.claim.entries == tuple(batch.entry for batch in batches)


def test_whose_retained_messages_were_stored_outlives_the_owner_and_the_session(house_of, database):
    first = house_of(database)
    assert first.claim.retained == Remembered()
    retained = Remembered(frozenset({"a/+", "b/#"}), frozenset({"c"}))

    first.sink.note_retained(retained)
    assert first.sink.raise_session(2)

    assert house_of(database).claim.retained == retained
    assert house_of(database, client_id="other").claim.retained == Remembered()


def test_a_fenced_owner_cannot_say_whose_retained_messages_were_stored(house_of, database):
    first, second = house_of(database), house_of(database)
    second.sink.note_retained(Remembered(frozenset({"a/+"})))

    first.sink.note_retained(Remembered(frozenset({"b/#"})))

    assert house_of(database).claim.retained == Remembered(frozenset({"a/+"}))


def test_subscriptions_may_hold_what_python_takes_for_the_end_of_a_line(house_of, database):
    first = house_of(database)

    first.sink.note_subscriptions(["a\u2028b/+", "c"])

    assert house_of(database).claim.subscriptions == {"a\u2028b/+", "c"}


def test_a_new_owner_waits_for_the_transactions_of_its_predecessor(house_of, database):
    first = house_of(database)
    batch = first.batch(readings([1]))
    first.sql("BEGIN")
    first.sql("SELECT pg_advisory_xact_lock_shared(hashtextextended('mqtt_bridge owner hall', 0))")
    first.sql("INSERT INTO mqtt_bridge.ledger VALUES ('hall', %s, %s, 1, 1, '\\x01')", *batch.entry.key)
    second = house_of(database, open=False)
    claims = []
    claiming = threading.Thread(target=lambda: claims.append(second.sink.open(create=True)))
    second.threads.append(claiming)
    claiming.start()
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    wait_until(lambda: second.sql(waiting) == [(1,)], what="the new owner to wait")
    assert not claims

    first.sql("COMMIT")

    wait_until(lambda: claims, what="the claim")
    assert [entry.key for entry in claims[0].entries] == [batch.entry.key]


def test_a_raised_session_makes_older_ledger_rows_unknown_to_the_next_owner(house_of, database):
    first = house_of(database)
    first.sink.store(first.batch(readings([1])))

    assert first.sink.raise_session(2)

    second = house_of(database)
    assert (second.claim.session_epoch, second.claim.entries) == (2, ())
    assert second.ledger_keys() == []


def test_a_batch_carries_the_raised_session_with_it(house_of, database):
    first = house_of(database)
    memory = Ledger()
    memory.load(first.claim)
    memory.connected(session_present=False)
    batch = Batch(memory.entry([]), readings([1]), [])

    first.sink.store(batch)

    assert house_of(database).claim.session_epoch == 2


def test_an_earlier_session_is_never_written_over_a_later_one(house):
    house.sink.raise_session(5)
    house.sink.raise_session(4)
    batch = house.batch(readings([1]))
    house.sink.store(Batch(batch.entry._replace(session_epoch=3, raises_session=True), batch.translated, []))

    assert house.sql("SELECT session_epoch FROM mqtt_bridge.owners") == [(5,)]


# -- start and stop


def test_opening_waits_for_a_database_that_comes_later(house_of, own_postgres):
    postgres = own_postgres()
    dsn = postgres.create_database("late")
    postgres.stop()
    connections = Connections(lambda: dsn, size=1)
    sink = Sink(connections, client_id="hall")
    claims = []
    opening = threading.Thread(target=lambda: claims.append(sink.open(create=True)))
    opening.start()
    wait_until(lambda: sink.trouble, what="the trouble")
    assert not claims

    postgres.start()

    wait_until(lambda: claims, what="the claim", timeout_s=30)
    opening.join()
    connections.close()


def unreachable():
    return Sink(Connections(lambda: f"postgresql://nobody@127.0.0.1:{free_port()}/none", size=1), client_id="hall")


def test_stopping_frees_a_worker_that_waits_for_the_database():
    sink = unreachable()
    outcome = []

    def store():
        try:
            sink.store(Batch(Entry(BatchKey(1, 1), 1, 0, b""), readings([1]), []))
        except Stopped as error:
            outcome.append(error)

    storing = threading.Thread(target=store)
    storing.start()
    wait_until(lambda: sink.retries >= 3, what="some tries")
    sink.stop()
    sink.stop()

    storing.join(timeout=10)
    assert outcome


def test_stopping_frees_who_opens():
    sink = unreachable()
    sink.stop()

    with pytest.raises(Stopped):
        sink.open(create=True)


def test_stopping_frees_a_worker_that_is_paused(house):
    house.sql("ALTER TABLE readings RENAME TO elsewhere")
    outcome = house.store_beside(house.batch(readings([1])))
    wait_until(lambda: house.sink.trouble, what="the pause")

    house.sink.stop()

    wait_until(lambda: outcome, what="the end")
    assert isinstance(outcome[0], Stopped)


def test_without_a_database_the_session_is_not_raised_and_nothing_is_raised():
    sink = unreachable()

    assert not sink.raise_session(2)
    assert not sink.probe()
    assert sink.trouble.verdict is Verdict.RECONNECT


def test_a_database_that_lacks_its_objects_and_may_not_be_given_them_is_shown_with_what_is_missing(house_of, database):
    house = house_of(database, open=False)
    outcome = []
    opening = threading.Thread(target=lambda: outcome.append(house.sink.open(create=False)))
    house.threads.append(opening)
    opening.start()

    wait_until(lambda: house.sink.trouble, what="the pause")
    assert house.sink.trouble.verdict is Verdict.CONFIGURATION
    assert "mqtt_bridge.ledger" in str(house.sink.trouble)
    assert "mqtt-bridge schema" in str(house.sink.trouble)
    house.observer.autocommit = False
    house.sql(schema.ddl())
    house.observer.commit()
    house.observer.autocommit = True

    wait_until(lambda: outcome, what="the claim")


def test_the_claim_of_a_new_client_id_is_the_first_of_its_session_and_remembers_nothing(house):
    assert house.claim == ledger.Claim(house.claim.owner_epoch, 1, ())
