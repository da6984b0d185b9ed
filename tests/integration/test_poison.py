"""Batches of 2,000 messages with bad ones among them, into a real PostgreSQL: who is refused, why, and at what cost."""

from __future__ import annotations

import random
from collections import Counter

import psycopg2
import pytest
from psycopg2 import extensions

from mqtt_bridge import connections as connections_module
from mqtt_bridge import copying
from mqtt_bridge.breaker import Breaker
from mqtt_bridge.connections import BridgeConnection
from mqtt_bridge.model import READINGS_COLUMNS, Table, Translation
from mqtt_bridge.transactions import Stored
from tests.integration.test_sink import NOW_US, House, reading

SIZE = 2_000
READINGS = Table("readings", READINGS_COLUMNS)


@pytest.fixture
def house(database):
    house = House(database)
    yield house
    house.close()


@pytest.fixture
def sent(monkeypatch):
    """The statements that were given COPY data, one after another."""
    statements = []
    send = copying.send

    def noting(cursor, text, data):
        statements.append(text if isinstance(text, str) else text.as_string(cursor))
        send(cursor, text, data)

    monkeypatch.setattr(copying, "send", noting)
    return statements


def message(number, *rows):
    """A message whose payload is its number, with these rows: (table, device, value), or with a text behind."""
    tables = {table for table, *_ in rows} or {"readings"}
    one, _ = reading(number)
    made = [(NOW_US + number, device, "m", value, *text, *[None] * (1 - len(text))) for _, device, value, *text in rows]
    return one, Translation("default", Table(tables.pop(), READINGS_COLUMNS), made)


def batch_with(bad, *, device="bad", value=None, text=None, table="readings"):
    """2,000 messages of a row each; those at the places `bad` get this device, or this value."""
    return [
        message(n, (table, device, float(n) if value is None else value(n), text))
        if n in bad
        else message(n, (table, "d", float(n), None))
        for n in range(SIZE)
    ]


RAISE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
IF NEW.device = 'bad' THEN RAISE EXCEPTION 'value 5 of device bad'; END IF; RETURN NEW; END $$
"""
FAULTS = {
    "check": ("23514", ["ALTER TABLE readings ADD CHECK (device <> 'bad')"]),
    "not null": ("23502", ["ALTER TABLE readings ALTER value SET NOT NULL"]),
    "trigger before": ("P0001", [RAISE, "CREATE TRIGGER t BEFORE INSERT ON readings FOR EACH ROW {}"]),
    "trigger after": ("P0001", [RAISE, "CREATE TRIGGER t AFTER INSERT ON readings FOR EACH ROW {}"]),
    "trigger at commit": (
        "P0001",
        [RAISE, "CREATE CONSTRAINT TRIGGER t AFTER INSERT ON readings INITIALLY DEFERRED FOR EACH ROW {}"],
    ),
    "foreign key": (
        "23503",
        [
            "CREATE TABLE devices (device text PRIMARY KEY)",
            "INSERT INTO devices VALUES ('d')",
            "ALTER TABLE readings ADD FOREIGN KEY (device) REFERENCES devices",
        ],
    ),
    "foreign key at commit": (
        "23503",
        [
            "CREATE TABLE devices (device text PRIMARY KEY)",
            "INSERT INTO devices VALUES ('d')",
            "ALTER TABLE readings ADD FOREIGN KEY (device) REFERENCES devices INITIALLY DEFERRED",
        ],
    ),
    "unique": (
        "23505",
        [
            "CREATE UNIQUE INDEX ON readings (time, device, value)",
            f"INSERT INTO readings SELECT to_timestamp({NOW_US / 1e6}) + n * interval '1 microsecond', 'bad', 'm', n"
            f" FROM generate_series(0, {SIZE}) n",
        ],
    ),
    "unique at commit": (
        "23505",
        [
            "ALTER TABLE readings ADD UNIQUE (time, device, value) DEFERRABLE INITIALLY DEFERRED",
            f"INSERT INTO readings SELECT to_timestamp({NOW_US / 1e6}) + n * interval '1 microsecond', 'bad', 'm', n"
            f" FROM generate_series(0, {SIZE}) n",
        ],
    ),
    "domain": (
        "23514",
        [
            "CREATE DOMAIN device_name AS text CONSTRAINT good CHECK (VALUE <> 'bad')",
            "DROP TABLE readings",
            "CREATE TABLE readings (time timestamptz, device device_name, metric text, value float8, value_text text)",
        ],
    ),
    "too long": (
        "22001",
        [
            "DROP TABLE readings",
            "CREATE TABLE readings (time timestamptz, device varchar(2), metric text, value float8, value_text text)",
        ],
    ),
    "a NUL": ("22021", []),
    "does not fit into a page": (
        "54000",
        [
            "DROP TABLE readings",
            "CREATE TABLE readings (time timestamptz, device text, metric text, value float8, value_text text)",
            "ALTER TABLE readings ALTER value_text SET STORAGE PLAIN",
        ],
    ),
}
"""By how a row is refused: the SQLSTATE, and what makes the server refuse it."""
TEXTS = {"a NUL": "\0", "does not fit into a page": "x" * 9_000}


def install(house, kind):
    sqlstate, statements = FAULTS[kind]
    for statement in statements:
        house.sql(statement.replace("{}", "EXECUTE FUNCTION refuse()"))
    return sqlstate


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("count", [1, 5, 50])
def test_of_2000_messages_the_bad_ones_become_dead_letters_and_all_others_are_stored(house, kind, count):
    sqlstate = install(house, kind)
    were_there = len(house.values()) if kind in ("unique", "unique at commit") else 0
    bad = set(random.Random(f"{kind} {count}").sample(range(SIZE), count))
    value = (lambda n: None) if kind == "not null" else None

    stored = house.sink.store(house.batch(batch_with(bad, text=TEXTS.get(kind), value=value)))

    assert stored.rows == {"readings": SIZE - count}
    assert [int(letter.message.payload) for letter in stored.refused] == sorted(bad)
    assert house.letters() == [(str(number), "store", sqlstate) for number in sorted(bad)]
    good = house.sql("SELECT value FROM readings WHERE device = 'd' ORDER BY value")
    assert [int(n) for (n,) in good] == sorted(set(range(SIZE)) - bad)
    assert len(house.values()) == were_there + SIZE - count
    assert len(house.ledger_keys()) == 1
    assert house.sink.retries == 0
    errors = {error for (error,) in house.sql("SELECT error FROM mqtt_bridge.dead_letters")}
    assert all(error.startswith("PostgreSQL says: ") for error in errors)


NAMED = [kind for kind in FAULTS if not kind.startswith(("trigger a", "unique at", "does not"))]


@pytest.mark.parametrize("kind", NAMED)
def test_where_the_server_says_which_row_it_was_few_statements_are_sent(house, sent, kind):
    install(house, kind)
    value = (lambda n: None) if kind == "not null" else None

    house.sink.store(house.batch(batch_with({1234}, text=TEXTS.get(kind), value=value)))

    # All, the 1,234 before it, itself, chunks of 64, 128, 256 and the rest; the dead letter.
    assert len(sent) == 8


def test_where_the_server_does_not_say_which_row_it_was_the_batch_is_halved(house, sent):
    install(house, "trigger after")

    house.sink.store(house.batch(batch_with({1234})))

    assert len(sent) <= 8 + 12


def test_one_row_that_cannot_be_encoded_is_found_without_the_server(house, sent):
    stored = house.sink.store(house.batch(batch_with({1234}, text="\ud800")))

    assert [letter.message.payload for letter in stored.refused] == [b"1234"]
    assert len(house.values()) == SIZE - 1
    assert len(sent) == 2  # all others, and the dead letter


def test_rows_that_cannot_be_encoded_and_rows_that_the_server_refuses_are_told_apart(house):
    install(house, "check")
    translated = batch_with({7, 700})
    translated[70] = message(70, ("readings", "d", 1.0, "\ud800"))
    translated[1999] = message(1999, ("readings", "d", 10**400))

    stored = house.sink.store(house.batch(translated))

    assert stored.rows == {"readings": SIZE - 4}
    assert house.letters() == [
        ("7", "store", "23514"),
        ("70", "store", None),
        ("700", "store", "23514"),
        ("1999", "store", None),
    ]


def test_a_message_of_many_rows_is_found_by_any_of_them_and_none_is_stored(house, sent):
    install(house, "check")
    translated = [message(n, *[("readings", "d", float(n))] * (n % 7)) for n in range(500)]
    for n in (100, 333):
        translated[n] = message(n, *[("readings", "d", 1.0)] * 3, ("readings", "bad", 1.0), ("readings", "d", 1.0))

    stored = house.sink.store(house.batch(translated))

    rows = sum(n % 7 for n in range(500) if n not in (100, 333))
    assert stored.rows == {"readings": rows}
    assert [letter.message.payload for letter in stored.refused] == [b"100", b"333"]
    assert len(house.values()) == rows
    assert len(sent) <= 2 + 4 * 2 + 4


def test_rows_of_several_tables_are_refused_by_either(house, sent):
    for statement in (
        "CREATE SCHEMA site",
        "CREATE TABLE site.air (LIKE readings)",
        "CREATE TABLE air (LIKE readings)",
        "ALTER TABLE site.air ADD CONSTRAINT fresh CHECK (device <> 'bad')",
        "ALTER TABLE readings ADD CONSTRAINT sane CHECK (device <> 'bad')",
    ):
        house.sql(statement)
    tables = ("readings", "site.air", "air")
    bad = {30, 31, 400, 401, 900}
    translated = [message(n, (tables[n % 3], "bad" if n in bad else "d", float(n))) for n in range(SIZE)]

    stored = house.sink.store(house.batch(translated))

    # Nothing forbids the device `bad` in public.air.
    refused = sorted(n for n in bad if tables[n % 3] != "air")
    assert [int(letter.message.payload) for letter in stored.refused] == refused
    assert stored.rows == {t: sum(n % 3 == at and n not in refused for n in range(SIZE)) for at, t in enumerate(tables)}
    for at, table in enumerate(tables):
        kept = house.sql(f"SELECT value FROM {table} ORDER BY value")
        assert [int(n) for (n,) in kept] == [n for n in range(SIZE) if n % 3 == at and n not in refused]
    assert len(sent) < 100


def test_of_two_messages_that_exclude_each_other_the_first_is_stored(house):
    house.sql("CREATE UNIQUE INDEX ON readings (time, device, value)")
    translated = [message(n, ("readings", "d", float(n))) for n in range(SIZE)]
    translated.insert(1500, message(700, ("readings", "d", 700.0)))

    stored = house.sink.store(house.batch(translated))

    assert [int(letter.message.payload) for letter in stored.refused] == [700]
    assert len(house.values()) == SIZE


def test_rows_arrive_in_the_order_of_their_messages(house):
    install(house, "check")
    house.sql("ALTER TABLE readings ADD COLUMN arrival bigserial")

    house.sink.store(house.batch(batch_with({5, 6, 700, 1500})))

    values = [value for (value,) in house.sql("SELECT value FROM readings ORDER BY arrival")]
    assert values == sorted(values)


def test_when_all_of_2000_are_bad_hardly_more_than_one_statement_each_is_needed(house, sent):
    install(house, "check")

    stored = house.sink.store(house.batch(batch_with(set(range(SIZE)))))

    assert len(stored.refused) == SIZE
    assert house.values() == []
    assert len(sent) < SIZE + 20


def test_a_trigger_that_only_minds_many_rows_at_once_costs_no_message(house):
    house.sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF (SELECT count(*) FROM added) > 10 THEN RAISE EXCEPTION 'too many'; END IF; RETURN NULL; END $$"
    )
    house.sql(
        "CREATE TRIGGER t AFTER INSERT ON readings REFERENCING NEW TABLE AS added"
        " FOR EACH STATEMENT EXECUTE FUNCTION refuse()"
    )

    stored = house.sink.store(house.batch(batch_with(set())[:200]))

    assert stored == Stored({"readings": 200})
    assert len(house.values()) == 200


# -- commits in doubt


class CommitsInDoubt:
    """Cuts the connection at the n-th COMMIT: when the server has carried it out, or before it hears of it."""

    def __init__(self, number, *, committed):
        self.number, self.committed = number, committed
        self.commits = 0

    def cursor_class(self):
        plan = self

        class Cursor(extensions.cursor):
            def execute(self, query, vars=None):
                if not str(query).endswith("COMMIT"):
                    super().execute(query, vars)
                    return
                plan.commits += 1
                if plan.commits != plan.number:
                    super().execute(query, vars)
                    return
                if plan.committed:
                    super().execute(query, vars)
                self.connection.close()
                raise psycopg2.OperationalError("server closed the connection unexpectedly")

        return Cursor

    def install(self, monkeypatch, house):
        cursor_class = self.cursor_class()

        class Connection(BridgeConnection):
            def cursor(self, *args, **kwargs):
                return super().cursor(*args, cursor_factory=cursor_class, **kwargs)

        monkeypatch.setattr(connections_module, "BridgeConnection", Connection)
        house.connections._pool = None


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize(("kind", "number"), [("check", 1), ("trigger at commit", 2)])
def test_a_poisoned_batch_whose_commit_is_in_doubt_counts_and_tells_its_dead_letters_once(
    house, monkeypatch, kind, number, committed
):
    # A constraint that is checked at COMMIT makes the first one fail, and be answered: the second is that of the parts.
    sqlstate = install(house, kind)
    bad = set(range(0, SIZE, 40))
    doubt = CommitsInDoubt(number, committed=committed)
    doubt.install(monkeypatch, house)
    batch = house.batch(batch_with(bad))

    stored = house.sink.store(batch)

    assert doubt.commits >= number
    assert stored.rows == {"readings": SIZE - 50}
    assert [(int(letter.message.payload), letter.sqlstate) for letter in stored.refused] == [
        (n, sqlstate) for n in sorted(bad)
    ]
    assert len(house.values()) == SIZE - 50
    assert Counter(payload for payload, *_ in house.letters()) == Counter(map(str, bad))
    assert house.ledger_keys() == [batch.entry.key]


def test_a_poisoned_batch_is_not_stored_a_second_time(house):
    install(house, "check")
    batch = house.batch(batch_with({1, 2, 3}))
    house.sink.store(batch)
    house.sink._transactions._in_doubt.clear()  # as a process that remembers nothing

    house.sink.store(batch)

    assert len(house.values()) == SIZE - 3
    assert len(house.letters()) == 3


# -- the breaker


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_three_bad_readings_a_minute_from_one_slow_device_pause_nobody(house):
    install(house, "check")
    clock = Clock()
    house.sink._transactions._breaker = Breaker(clock)

    # At night nothing else is published: each bad reading is a batch of its own.
    for number in range(180):
        clock.now_s += 20.0
        stored = house.sink.store(house.batch([message(number, ("readings", "bad", 1.0))]))
        assert len(stored.refused) == 1

    assert house.sink.retries == 0
    assert house.sink.trouble is None
    assert len(house.letters()) == 180
    assert house.sink.store(house.batch([message(200, ("readings", "d", 1.0))])) == Stored({"readings": 1})
