"""Tables with a natural key in a real PostgreSQL: nothing lost and nothing twice, however often it comes."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime

import pytest

from mqtt_bridge import copying, schema
from mqtt_bridge.errors import Verdict
from mqtt_bridge.model import READINGS_COLUMNS, Table, Translation
from mqtt_bridge.natural_keys import Conflicts
from mqtt_bridge.transactions import Stored
from tests.integration.test_poison import CommitsInDoubt
from tests.integration.test_sink import NOW_US, House, reading
from tests.pgbouncer import PgBouncer
from tests.waiting import wait_until

KEY = ("device", "metric", "time")
NOTHING = Table("readings", READINGS_COLUMNS, key=KEY)
UPDATE = Table("readings", READINGS_COLUMNS, key=KEY, on_conflict="update")
SIZE = 500
WEEK_US = 7 * 86_400_000_000


@pytest.fixture
def house(database):
    house = House(database)
    house.sql("CREATE UNIQUE INDEX ON readings (device, metric, time)")
    yield house
    house.close()


@pytest.fixture
def sent(monkeypatch):
    """The first words of what was sent with COPY data: `COPY readings`, or the temporary table's."""
    statements = []
    send = copying.send

    def noting(cursor, text, data):
        whole = text if isinstance(text, str) else text.as_string(cursor)
        statements.append("staged" if "mqtt_bridge_rows_" in whole else "straight")
        send(cursor, text, data)

    monkeypatch.setattr(copying, "send", noting)
    return statements


def message(number, *rows, table=NOTHING):
    """A message whose payload is its number, with these rows: (device, time, value), or with a text behind."""
    one, _ = reading(number)
    made = [
        (NOW_US + time, device, "m", value, *text, *[None] * (1 - len(text))) for device, time, value, *text in rows
    ]
    return one, Translation("default", table, made)


def messages(numbers, *, table=NOTHING, value=float):
    return [message(n, ("d", n, value(n)), table=table) for n in numbers]


def stored(house):
    """(device, microseconds, value) of every row."""
    return house.sql(
        "SELECT device, (extract(epoch FROM time) * 1000000)::bigint - %s, value FROM readings ORDER BY 1, 2, 3", NOW_US
    )


def test_rows_without_conflict_are_copied_straight_into_the_table(house, sent):
    assert house.sink.store(house.batch(messages(range(SIZE)))) == Stored({"readings": SIZE})

    assert sent == ["straight"]


def test_rows_whose_key_is_there_are_left_out_and_all_others_are_stored(house, sent):
    house.sink.store(house.batch(messages(range(0, SIZE, 2))))

    batch = house.batch(messages(range(SIZE), value=lambda n: -1.0 - n))
    assert house.sink.store(batch) == Stored({"readings": SIZE // 2})

    assert stored(house) == [("d", n, float(n) if n % 2 == 0 else -1.0 - n) for n in range(SIZE)]
    assert sent == ["straight", "straight", "staged"]
    assert house.letters() == []
    assert house.sink.retries == 0
    assert len(house.ledger_keys()) == 2


def test_a_batch_that_is_there_altogether_is_stored_again_without_a_row(house):
    house.sink.store(house.batch(messages(range(SIZE))))

    again = house.sink.store(house.batch(messages(range(SIZE))))

    assert again == Stored({"readings": 0})
    assert stored(house) == [("d", n, float(n)) for n in range(SIZE)]
    assert len(house.ledger_keys()) == 2


def test_with_update_what_is_there_is_replaced_and_what_is_the_same_is_not_written(house):
    house.sink.store(house.batch(messages(range(SIZE), table=UPDATE)))
    written_by = house.sql("SELECT xmin::text FROM readings WHERE value = 1")

    newer = messages(range(SIZE + 5), table=UPDATE, value=lambda n: float(n) if n < SIZE - 10 else n + 0.5)
    assert house.sink.store(house.batch(newer)) == Stored({"readings": 15})

    assert stored(house) == [("d", n, float(n) if n < SIZE - 10 else n + 0.5) for n in range(SIZE + 5)]
    assert house.sql("SELECT xmin::text FROM readings WHERE value = 1") == written_by


@pytest.mark.parametrize(("table", "kept"), [(NOTHING, 0.0), (UPDATE, 9.0)])
def test_of_equal_keys_in_one_batch_the_first_is_kept_or_with_update_the_last(house, table, kept):
    rows = messages(range(100), table=table)
    rows[10:10] = [message(1_000 + n, ("twice", 1, float(n)), table=table) for n in range(5)]
    rows += [message(1_005 + n, ("twice", 1, 5.0 + n), table=table) for n in range(5)]

    assert house.sink.store(house.batch(rows)) == Stored({"readings": 101})

    assert [row for row in stored(house) if row[0] == "twice"] == [("twice", 1, kept)]


@pytest.mark.parametrize(("table", "kept"), [(NOTHING, 0.0), (UPDATE, 4.0)])
def test_equal_keys_in_one_message_are_no_fault(house, table, kept):
    one = message(1, *[("d", 1, float(n)) for n in range(5)], table=table)

    assert house.sink.store(house.batch([one])) == Stored({"readings": 1})

    assert stored(house) == [("d", 1, kept)]


@pytest.mark.parametrize("on_conflict", ["nothing", "update"])
def test_a_row_without_a_value_in_its_key_equals_no_other(house, on_conflict):
    house.sql("CREATE TABLE rooms (device text, room text, value float8, UNIQUE (device, room))")
    table = Table("rooms", ("device", "room", "value"), key=("device", "room"), on_conflict=on_conflict)
    one, _ = reading(1)
    rows = [*[("d", None, float(n)) for n in range(3)], ("e", "hall", 7.0), ("e", "hall", 7.0)]

    house.sink.store(house.batch([(one, Translation("default", table, rows))]))

    assert house.sql("SELECT * FROM rooms ORDER BY value") == rows[:4]


def test_a_conflict_in_one_partition_is_a_conflict_of_the_table(house):
    # In two weeks' partitions, and in the default one.
    schema.make_partitions(house.observer, datetime.fromtimestamp(NOW_US / 1e6, UTC))
    times = [n - weeks * WEEK_US for weeks in (0, 1, 2, 500) for n in range(20)]
    rows = [message(n, ("d", time, 1.0)) for n, time in enumerate(times)]
    house.sink.store(house.batch(rows[:10] + rows[-10:]))

    assert house.sink.store(house.batch(rows)) == Stored({"readings": 60})

    assert [time for _, time, _ in stored(house)] == sorted(times)
    partitions = house.sql("SELECT count(*) FROM readings GROUP BY tableoid")
    assert sorted(partitions) == [(20,), (20,), (40,)]


@pytest.mark.parametrize("first", ["the bad one", "the duplicates"])
@pytest.mark.parametrize("table", [NOTHING, UPDATE])
def test_a_bad_row_among_duplicates_costs_its_message_and_nothing_else(house, table, first):
    house.sql("ALTER TABLE readings ADD CHECK (device <> 'bad')")
    there = range(200, 400) if first == "the bad one" else range(200)
    house.sink.store(house.batch(messages(there, table=table)))
    bad = {0, 100, 300, SIZE - 1} if first == "the bad one" else {250, 251, 450}
    batch = messages(range(SIZE), table=table)
    for n in bad:
        batch[n] = message(n, ("d", n, float(n)), ("bad", n, 1.0), table=table)

    result = house.sink.store(house.batch(batch))

    expected = set(range(SIZE)) - bad | set(there)
    assert stored(house) == [("d", n, float(n)) for n in sorted(expected)]
    assert result.rows == {"readings": len(expected) - len(there)}
    assert [int(letter.message.payload) for letter in result.refused] == sorted(bad)
    assert house.letters() == [(str(n), "store", "23514") for n in sorted(bad)]
    assert len(house.ledger_keys()) == 2


def test_a_row_that_copy_cannot_take_is_found_on_the_way_through_the_temporary_table(house):
    house.sink.store(house.batch(messages(range(SIZE))))
    batch = messages(range(SIZE + 100))
    batch[300] = message(300, ("d", 300, None, "\0"))
    batch[SIZE] = message(SIZE, ("d", SIZE, None, "\0"))
    batch[SIZE + 1] = message(SIZE + 1, ("d", SIZE + 1, None, "\ud800"))

    result = house.sink.store(house.batch(batch))

    assert result.rows == {"readings": 98}
    assert [letter.message.payload for letter in result.refused] == [b"300", b"500", b"501"]


def test_where_copy_into_the_temporary_table_names_the_line_few_statements_are_sent(house, sent):
    again_and_again(house, NOTHING)  # so that it is the first that is tried
    batch = messages(range(SIZE))
    batch[300] = message(300, ("d", 300, None, "\0"))
    sent.clear()

    result = house.sink.store(house.batch(batch))

    assert [letter.message.payload for letter in result.refused] == [b"300"]
    # All, the 300 before it, itself, chunks of 64 and 128, the rest; the letter.
    assert sent == ["staged"] * 6 + ["straight"]


@pytest.mark.parametrize("on_conflict", ["nothing", "update"])
def test_what_was_stored_among_bad_rows_is_not_stored_again_with_the_rows_behind_it(house, on_conflict):
    house.sql(
        "CREATE TABLE rooms (device text CHECK (device <> 'bad'), room text, value float8, UNIQUE (device, room))"
    )
    house.sql("INSERT INTO rooms VALUES ('d', 'hall', 0)")
    table = Table("rooms", ("device", "room", "value"), key=("device", "room"), on_conflict=on_conflict)
    batch = []
    for n in range(100):
        row = ("d", "hall", 0.0) if n == 0 else ("bad", None, 1.0) if n in (30, 60) else ("d", None, float(n))
        batch.append((reading(n)[0], Translation("default", table, [row])))

    result = house.sink.store(house.batch(batch))

    assert result.rows == {"rooms": 97}
    assert len(result.refused) == 2
    assert house.sql("SELECT value FROM rooms ORDER BY 1") == [(float(n),) for n in range(100) if n not in (30, 60)]


def test_another_unique_index_than_that_of_the_key_makes_dead_letters(house):
    house.sql("CREATE UNIQUE INDEX ON readings (value, time)")
    house.sink.store(house.batch(messages(range(10))))
    clash = message(20, ("other", 5, 5.0))

    result = house.sink.store(house.batch([*messages(range(12)), clash]))

    assert result.rows == {"readings": 2}
    assert [letter.sqlstate for letter in result.refused] == ["23505"]
    assert [int(letter.message.payload) for letter in result.refused] == [20]


def test_tables_with_and_without_a_key_share_a_batch(house):
    house.sql("CREATE TABLE plain (LIKE readings)")
    house.sql("CREATE TABLE latest (LIKE readings, PRIMARY KEY (device))")
    latest = Table("latest", READINGS_COLUMNS, key=("device",), on_conflict="update")
    tables = [NOTHING, Table("plain", READINGS_COLUMNS), latest]
    batch = [message(n, (f"d{n % 30}", n % 10, float(n)), table=tables[n % 3]) for n in range(300)]

    first = house.sink.store(house.batch(batch))
    second = house.sink.store(house.batch(batch))

    assert first.rows == {"readings": 10, "plain": 100, "latest": 10}
    assert second.rows == {"readings": 0, "plain": 100, "latest": 0}
    newest = {f"d{n % 30}": float(n) for n in range(300) if n % 3 == 2}
    assert dict(house.sql("SELECT device, value FROM latest")) == newest


def test_a_table_in_a_schema_with_columns_of_its_own_takes_rows_of_a_key(house):
    house.sql("CREATE SCHEMA site")
    house.sql(
        'CREATE TABLE site."the readings" (id bigint GENERATED ALWAYS AS IDENTITY, seen timestamptz NOT NULL DEFAULT'
        " now(), time timestamptz, device varchar(20), metric text, value float8, value_text text, twice float8"
        " GENERATED ALWAYS AS (value * 2) STORED, PRIMARY KEY (device, metric, time))"
    )
    table = Table("site.the readings", READINGS_COLUMNS, key=KEY, on_conflict="update")

    house.sink.store(house.batch(messages(range(10), table=table)))
    house.sink.store(house.batch(messages(range(20), table=table, value=lambda n: n + 1.0)))

    assert house.sql('SELECT value, twice FROM site."the readings" ORDER BY value') == [
        (n + 1.0, 2 * n + 2.0) for n in range(20)
    ]


def test_a_key_of_all_columns_has_nothing_to_replace(house):
    house.sql("CREATE TABLE seen (device text, metric text, PRIMARY KEY (device, metric))")
    table = Table("seen", ("device", "metric"), key=("metric", "device"), on_conflict="update")
    one, _ = reading(1)
    batch = [(one, Translation("default", table, [("d", "m"), ("d", "n"), ("d", "m")]))]

    assert house.sink.store(house.batch(batch)) == Stored({"seen": 2})


@pytest.mark.parametrize("table", [NOTHING, UPDATE])
def test_dead_letters_that_are_requeued_may_be_there_already(house, table):
    house.sql("ALTER TABLE readings ADD CHECK (device <> 'bad')")
    house.sink.store(house.batch(messages(range(0, 100, 3), table=table)))
    again = [*messages(range(100), table=table), message(100, ("bad", 1, 1.0), table=table)]
    present = Counter()

    # As `dead-letters requeue` does: all that can be, in a transaction that was not tried in one piece before.
    with house.connections.connection() as connection, connection.cursor() as cursor:
        cursor.execute("BEGIN")
        refused = house.sink._transactions.isolate(connection, cursor, again, present=present)
        cursor.execute("COMMIT")

    assert [int(one.payload) for (one, _), _ in refused] == [100]
    assert present == {"readings": 34}
    assert stored(house) == [("d", n, float(n)) for n in range(100)]


# -- what is expected


def again_and_again(house, table):
    """Two batches in a row with a conflict."""
    for value in (0.0, 1.0, 2.0):
        house.sink.store(house.batch([message(0, ("d", 0, value), table=table)]))


@pytest.mark.parametrize("table", [NOTHING, UPDATE])
def test_after_conflicts_in_a_row_copy_is_not_tried_for_a_while_and_then_again(house, sent, table):
    again_and_again(house, table)
    sent.clear()

    for n in range(Conflicts.BATCHES + 1):
        house.sink.store(house.batch([message(0, ("d", 0, 3.0 + n), table=table)]))

    assert sent == ["staged"] * Conflicts.BATCHES + ["straight", "staged"]


def test_a_batch_without_conflict_brings_copy_back(house, sent):
    again_and_again(house, NOTHING)
    sent.clear()

    for n in (1, 2):
        house.sink.store(house.batch(messages([n])))

    assert sent == ["staged", "straight"]


def test_after_a_conflict_now_and_then_copy_comes_first(house, sent):
    house.sink.store(house.batch(messages([0])))
    sent.clear()

    for n in (0, 1, 0, 2, 0, 3):
        house.sink.store(house.batch(messages([n])))

    assert sent == ["straight", "staged", "straight"] * 3


def test_one_table_with_conflicts_does_not_slow_another_down(house, sent):
    house.sql("CREATE TABLE other (LIKE readings, PRIMARY KEY (device, metric, time))")
    other = Table("other", READINGS_COLUMNS, key=KEY)
    again_and_again(house, NOTHING)
    sent.clear()

    house.sink.store(house.batch([*messages([1]), *messages([2], table=other)]))

    assert sent == ["staged", "straight"]


# -- what is missing


@pytest.mark.parametrize(
    "index",
    [
        "CREATE INDEX ON {} (device, metric, time)",
        "CREATE UNIQUE INDEX ON {} (device, metric, time, value)",
        "CREATE UNIQUE INDEX ON {} (device, time)",
        "CREATE UNIQUE INDEX ON {} (device, metric, time) WHERE value > 0",
        "CREATE UNIQUE INDEX ON {} (device, metric, time, lower(value_text))",
        "ALTER TABLE {} ADD UNIQUE (device, metric, time) DEFERRABLE",
    ],
)
def test_without_a_unique_index_on_the_key_nothing_is_stored_and_the_index_is_named(house, index):
    house.sql("CREATE TABLE own (LIKE readings)")
    house.sql(index.format("own"))
    table = Table("own", READINGS_COLUMNS, key=KEY)

    outcome = house.store_beside(house.batch(messages(range(3), table=table)))

    trouble = wait_until(lambda: house.sink.trouble, what="the trouble")
    assert trouble.verdict is Verdict.CONFIGURATION
    assert 'CREATE UNIQUE INDEX ON "own" ("device", "metric", "time");' in trouble.sql
    assert house.sql("SELECT count(*) FROM own") == [(0,)]
    house.sql("CREATE UNIQUE INDEX ON own (time, device, metric) INCLUDE (value)")
    assert wait_until(lambda: outcome, what="the batch") == [Stored({"own": 3})]


def test_a_privilege_that_only_a_conflict_needs_is_asked_for_before_there_is_one(house, database):
    (name,) = house.sql("SELECT current_database()")[0]
    house.sql("CREATE ROLE keyed LOGIN")
    house.sql("GRANT USAGE ON SCHEMA mqtt_bridge TO keyed")
    house.sql("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA mqtt_bridge TO keyed")
    house.sql("GRANT SELECT, INSERT ON readings TO keyed")
    house.sql(f"REVOKE TEMPORARY ON DATABASE {name} FROM public")
    guest = House(database.replace("postgres@", "keyed@"), observed_by=database, client_id="keyed")
    try:
        outcome = guest.store_beside(guest.batch(messages(range(3), table=UPDATE)))

        trouble = wait_until(lambda: guest.sink.trouble, what="the trouble")
        grants = [f'GRANT TEMPORARY ON DATABASE "{name}" TO "keyed";', 'GRANT UPDATE ON "readings" TO "keyed";']
        assert trouble.sql == " ".join(grants)
        for grant in grants:
            house.sql(grant)
        assert wait_until(lambda: outcome, what="the batch") == [Stored({"readings": 3})]
        assert guest.sink.store(guest.batch(messages(range(4), table=UPDATE))) == Stored({"readings": 1})
    finally:
        guest.close()
        house.sql("DROP OWNED BY keyed")
        house.sql("DROP ROLE keyed")


# -- commits in doubt, and many at once


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("table", [NOTHING, UPDATE])
def test_a_batch_with_conflicts_whose_commit_is_in_doubt_counts_its_new_rows_once(house, monkeypatch, table, committed):
    house.sink.store(house.batch(messages(range(100), table=table)))
    doubt = CommitsInDoubt(1, committed=committed)
    doubt.install(monkeypatch, house)
    batch = house.batch(messages(range(SIZE), table=table))

    assert house.sink.store(batch) == Stored({"readings": SIZE - 100})

    assert doubt.commits >= 1
    assert stored(house) == [("d", n, float(n)) for n in range(SIZE)]
    assert len(house.ledger_keys()) == 2


def test_a_batch_with_conflicts_that_was_committed_is_not_stored_a_second_time(house):
    house.sink.store(house.batch(messages(range(10), table=UPDATE)))
    batch = house.batch(messages(range(20), table=UPDATE, value=lambda n: -1.0 - n))
    house.sink.store(batch)
    house.sql("UPDATE readings SET value = 1")  # what a later batch has done
    house.sink._transactions._in_doubt.clear()  # as a process that remembers nothing

    house.sink.store(batch)

    assert {value for _, _, value in stored(house)} == {1.0}


@pytest.mark.parametrize("table", [NOTHING, UPDATE])
def test_of_batches_side_by_side_with_the_same_keys_each_key_is_stored_once(house, table):
    assert_stored_once(house, table)


@pytest.mark.parametrize("table", [NOTHING, UPDATE])
@pytest.mark.parametrize("connections", [1, 3])
def test_the_same_behind_pgbouncer_in_transaction_mode(house, postgres_server, database, table, connections):
    with PgBouncer(postgres_server, "transaction", settings=[f"default_pool_size = {connections}"]) as pooler:
        behind = House(pooler.dsn(database.rpartition("/")[2]), observed_by=database, client_id="behind")
        try:
            assert_stored_once(behind, table)
        finally:
            behind.close()


def assert_stored_once(house, table):
    numbers = list(range(300))
    batches = []
    for seed in range(12):
        random.Random(seed).shuffle(numbers)
        batches.append(house.batch(messages(numbers[:200], table=table)))

    outcomes = [house.store_beside(batch) for batch in batches]
    wait_until(lambda: all(outcomes), timeout_s=60, what="all batches")

    union = {row[0] - NOW_US for batch in batches for _, t in batch.translated for row in t.rows}
    assert stored(house) == [("d", n, float(n)) for n in sorted(union)]
    assert sum((Counter(outcome[0].rows) for outcome in outcomes), Counter()) == {"readings": len(union)}
    assert house.letters() == []
    assert len(house.ledger_keys()) == 12


def test_a_column_that_was_altered_makes_no_garbage_on_the_way_through_the_temporary_table(house):
    house.sink.store(house.batch(messages(range(10))))
    # The encoder of this connection was made for float8; eight bytes of it would be taken for a bigint.
    house.sql("ALTER TABLE readings ALTER value TYPE bigint")

    outcome = house.store_beside(house.batch(messages(range(5, 15))))

    trouble = wait_until(lambda: house.sink.trouble, what="the trouble")
    assert trouble.verdict in (Verdict.CONFLICT, Verdict.CONFIGURATION)
    house.sql("ALTER TABLE readings ALTER value TYPE float8")
    assert wait_until(lambda: outcome, timeout_s=30, what="the batch") == [Stored({"readings": 5})]
    assert stored(house) == [("d", n, float(n)) for n in range(15)]
