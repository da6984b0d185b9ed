"""A `readings` of the user's own, made before the bridge comes: what it may be, with DB_AUTO_CREATE=false."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import pytest

from mqtt_bridge import schema
from mqtt_bridge.errors import Verdict
from mqtt_bridge.model import READINGS_COLUMNS, Table, Translation
from mqtt_bridge.transactions import Stored
from tests.integration.test_sink import NOW_US, House, reading
from tests.waiting import wait_until

BOOKKEEPING = schema._script("bookkeeping")
COLUMNS = "time timestamptz NOT NULL, device text NOT NULL, metric text NOT NULL, value float8, value_text text"
DAY_US = 86_400_000_000
KEYED = Table("readings", READINGS_COLUMNS, key=("device", "metric", "time"))


class OwnHouse(House):
    """A database in which nothing is made but what `statements` make; the bridge may be another role."""

    def __init__(self, dsn, *statements, role=None):
        super().__init__(dsn if role is None else dsn.replace("postgres@", f"{role}@"), observed_by=dsn, open=False)
        self.sql(BOOKKEEPING)
        for statement in statements:
            self.sql(statement)

    def come(self):
        """The bridge opens it, making nothing."""
        before = self.tables()
        self.claim = self.sink.open(create=False)
        schema.make_partitions(self.observer, datetime.now(UTC))  # as the tender does each hour
        assert self.tables() == before
        return self

    def tables(self):
        return self.sql("SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1")


@pytest.fixture
def own(database):
    houses = []

    def make(*statements, **options):
        houses.append(OwnHouse(database, *statements, **options))
        return houses[-1]

    yield make
    for house in houses:
        house.close()


def messages(numbers, *, table=None):
    """A reading a day, of ten devices."""
    made = []
    for number in numbers:
        message, translation = reading(number, device=f"d{number % 10}")
        rows = [(NOW_US + number * DAY_US, *row[1:]) for row in translation.rows]
        made.append((message, Translation("default", table or translation.table, rows)))
    return made


PARTITIONED = {
    "by hash of the device, as distributed tables are": [
        f"CREATE TABLE readings ({COLUMNS}, PRIMARY KEY (device, metric, time)) PARTITION BY HASH (device)",
        *(f"CREATE TABLE part_{n} PARTITION OF readings FOR VALUES WITH (MODULUS 4, REMAINDER {n})" for n in range(4)),
    ],
    "by device, then by month": [
        f"CREATE TABLE readings ({COLUMNS}, PRIMARY KEY (device, metric, time)) PARTITION BY LIST (device)",
        "CREATE TABLE part_some PARTITION OF readings FOR VALUES IN ('d0', 'd1') PARTITION BY RANGE (time)",
        "CREATE TABLE part_some_rest PARTITION OF part_some DEFAULT",
        "CREATE TABLE part_some_now PARTITION OF part_some FOR VALUES FROM ('2026-09-01') TO ('2026-10-01')",
        "CREATE TABLE part_others PARTITION OF readings DEFAULT",
    ],
    "by inheritance and a trigger, as hypertables once were": [
        f"CREATE TABLE readings ({COLUMNS}, PRIMARY KEY (device, metric, time))",
        "CREATE TABLE chunk (LIKE readings INCLUDING INDEXES) INHERITS (readings)",
        "CREATE FUNCTION away() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO chunk SELECT NEW.*; RETURN NULL; END $$",
        "CREATE TRIGGER away BEFORE INSERT ON readings FOR EACH ROW EXECUTE FUNCTION away()",
    ],
    "a column more, others first": [
        "CREATE TABLE readings (site text NOT NULL DEFAULT 'north', seen timestamptz DEFAULT now(), value_text varchar,"
        " value float8, id bigint GENERATED ALWAYS AS IDENTITY, metric varchar(99), device text, time timestamptz,"
        " doubled float8 GENERATED ALWAYS AS (value * 2) STORED, PRIMARY KEY (time, metric, device))",
    ],
    "in another schema, along the search path of the role": [
        "CREATE SCHEMA plant",
        f"CREATE TABLE plant.readings ({COLUMNS}, PRIMARY KEY (device, metric, time))",
        "DROP ROLE IF EXISTS searching",
        "CREATE ROLE searching LOGIN SUPERUSER",
        "ALTER ROLE searching SET search_path = plant, public",
        "SET search_path = plant, public",
    ],
}


@pytest.mark.parametrize("kind", PARTITIONED)
def test_a_table_of_ones_own_takes_readings_and_is_left_as_it_is(own, kind):
    house = own(*PARTITIONED[kind], role="searching" if "search path" in kind else None).come()

    assert house.sink.store(house.batch(messages(range(100)))) == Stored({"readings": 100})
    assert house.values() == [float(n) for n in range(100)]

    twice = house.sink.store(house.batch(messages(range(50, 150))))  # its primary key makes dead letters of them
    assert len(twice.refused) == 50
    assert house.values() == [float(n) for n in range(150)]


KEYED_KINDS = [kind for kind in PARTITIONED if "trigger" not in kind and "search path" not in kind]


@pytest.mark.parametrize("kind", KEYED_KINDS)
def test_where_its_primary_key_is_the_key_of_the_route_nothing_becomes_a_dead_letter(own, kind):
    house = own(*PARTITIONED[kind]).come()

    house.sink.store(house.batch(messages(range(100), table=KEYED)))
    twice = house.sink.store(house.batch(messages(range(50, 150), table=KEYED)))

    assert twice == Stored({"readings": 50})
    assert house.values() == [float(n) for n in range(150)]


def test_a_table_of_another_owner_needs_two_privileges(own):
    house = own(
        f"CREATE TABLE readings ({COLUMNS})",
        "DROP ROLE IF EXISTS guest",
        "CREATE ROLE guest LOGIN",
        "GRANT USAGE ON SCHEMA mqtt_bridge TO guest",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA mqtt_bridge TO guest",
        role="guest",
    )
    with house.connections.connection() as connection:
        assert schema.forbidden(connection) == ['a grant is missing: GRANT SELECT, INSERT ON readings TO "guest"']

    house.sql("GRANT SELECT, INSERT ON readings TO guest")
    house.come()

    assert house.sink.store(house.batch(messages(range(10)))) == Stored({"readings": 10})
    house.sql("DROP OWNED BY guest")


VIEW = ("CREATE TABLE kept ({})", "CREATE VIEW readings AS SELECT time, device, metric, value, value_text FROM kept")


def test_copy_does_not_write_to_a_view_and_its_messages_wait(own):
    house = own(VIEW[0].format(COLUMNS), VIEW[1]).come()

    outcome = house.store_beside(house.batch(messages(range(10))))

    trouble = wait_until(lambda: house.sink.trouble, what="the trouble")
    assert trouble.verdict is Verdict.CONFIGURATION
    assert "cannot copy to view" in trouble.sentence
    house.sql("DROP VIEW readings; ALTER TABLE kept RENAME TO readings")
    assert wait_until(lambda: outcome, timeout_s=30, what="the batch") == [Stored({"readings": 10})]


def test_with_an_instead_of_trigger_it_does(own):
    house = own(
        VIEW[0].format(COLUMNS),
        VIEW[1],
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO kept SELECT NEW.*; RETURN NEW; END $$",
        "CREATE TRIGGER keep INSTEAD OF INSERT ON readings FOR EACH ROW EXECUTE FUNCTION keep()",
    ).come()

    assert house.sink.store(house.batch(messages(range(10)))) == Stored({"readings": 10})

    assert house.sql("SELECT count(*) FROM kept") == [(10,)]


def test_a_missing_table_is_named_with_what_makes_it_and_nothing_is_made(own):
    house = own()
    before = house.tables()

    opening = threading.Thread(target=house.sink.open, kwargs={"create": False}, name="test-open")
    house.threads.append(opening)
    opening.start()

    trouble = wait_until(lambda: house.sink.trouble, what="the trouble")
    assert "table readings is missing" in trouble.sentence
    assert "CREATE TABLE readings" in trouble.sql
    assert house.tables() == before
    house.sql(f"CREATE TABLE readings ({COLUMNS})")
    wait_until(lambda: house.sink.owner_epoch, timeout_s=30, what="it to open")
