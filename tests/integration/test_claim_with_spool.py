"""Taking over a client id with batches on the disk, with a real PostgreSQL."""

from __future__ import annotations

from contextlib import closing

import psycopg2
import pytest

from mqtt_bridge import schema
from mqtt_bridge.connections import BridgeConnection, Connections
from mqtt_bridge.errors import Fenced, SpoolElsewhere
from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.model import READINGS_COLUMNS, Message, Table, Translation
from mqtt_bridge.ownership import AlreadyCommitted, SpoolAtHand, claim
from mqtt_bridge.sink import Sink
from mqtt_bridge.transactions import Batch, Stored

ME = "client"
MARKS = b"12345678"


@pytest.fixture
def connection(database):
    with closing(psycopg2.connect(database, connection_factory=BridgeConnection)) as connection:
        schema.apply(connection)
        yield connection


@pytest.fixture
def make_sink(database):
    """Makes a sink that has claimed the client id, with this spool at hand."""
    made = []

    def make(spool=SpoolAtHand()):  # noqa: B008
        connections = Connections(lambda: database, size=1)
        made.append(connections)
        sink = Sink(connections, client_id=ME)
        sink.claim = sink.open(create=True, spool=spool)
        return sink

    yield make
    for connections in made:
        connections.close()


def query(connection, statement):
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall()


def owner(connection):
    return query(connection, "SELECT owner_epoch, session_epoch, spool_id FROM mqtt_bridge.owners")[0]


def ledger(connection):
    return [BatchKey(*key) for key in query(connection, "SELECT owner_epoch, batch FROM mqtt_bridge.ledger ORDER BY 2")]


def entry(epoch, number, *, session=1, marks=MARKS):
    return Entry(BatchKey(epoch, number), session, number, marks)


def batch(entry):
    message = Message(b"d/telemetry", b"1", 1, False, 0, entry.first_position, MARKS)
    row = (0, "d", "m", 1.0, None)
    return Batch(entry, [(message, Translation("r", Table("readings", READINGS_COLUMNS), [row]))], [], [message])


def test_the_disk_that_a_process_brings_is_noted(connection):
    claim(connection, ME, SpoolAtHand("disk"))

    assert owner(connection)[1:] == (1, "disk")


def test_without_the_disk_that_may_hold_messages_nothing_is_taken_over(connection):
    claim(connection, ME, SpoolAtHand("disk"))

    for spool in (SpoolAtHand(), SpoolAtHand("another"), SpoolAtHand(accepts=frozenset({"a third"}))):
        with pytest.raises(SpoolElsewhere, match="--abandon-spool disk"):
            claim(connection, ME, spool)
        connection.rollback()

    assert owner(connection)[1:] == (1, "disk")


@pytest.mark.parametrize(
    ("spool", "noted"),
    [
        (SpoolAtHand("disk"), "disk"),
        (SpoolAtHand(accepts=frozenset({"disk"})), None),
        (SpoolAtHand("another", accepts=frozenset({"another", "disk"})), "another"),
    ],
)
def test_the_disk_may_be_there_or_empty_or_given_up(connection, spool, noted):
    claim(connection, ME, SpoolAtHand("disk"))

    claim(connection, ME, spool)

    assert owner(connection)[1:] == (1, noted)


def test_a_refused_start_leaves_the_sink_without_a_retry(make_sink):
    make_sink(SpoolAtHand("disk"))

    with pytest.raises(SpoolElsewhere):
        make_sink()


def test_a_session_that_only_the_disk_knows_of_is_known_from_then_on(connection):
    claim(connection, ME)
    query(connection, "UPDATE mqtt_bridge.owners SET subscriptions = 'a/#' RETURNING 1")

    taken = claim(connection, ME, SpoolAtHand("disk", session_epoch=3))

    assert (taken.session_epoch, taken.subscriptions) == (3, frozenset())
    assert owner(connection)[1:] == (3, "disk")
    assert claim(connection, ME, SpoolAtHand("disk", session_epoch=2)).session_epoch == 3


@pytest.mark.parametrize("is_known", [True, False])
def test_no_process_makes_the_keys_of_batches_on_the_disk_again_though_the_database_has_forgotten_theirs(
    connection, is_known
):
    """As after a restore from a backup, or with a new database: both may be given out again."""
    if is_known:
        claim(connection, ME, SpoolAtHand("disk"))
    newest = 1 << 40

    taken = claim(connection, ME, SpoolAtHand("disk", owner_epoch=newest))

    assert taken.owner_epoch > newest
    assert owner(connection)[0] == taken.owner_epoch


def test_rows_of_batches_on_the_disk_stay_and_match_nothing_by_themselves(connection, make_sink):
    first = make_sink()
    entries = [entry(1, 1), entry(1, 2), entry(1, 3, marks=b""), entry(1, 4, marks=b"")]
    for each in entries:
        first.store(batch(each))

    on_disk = frozenset({entries[1].key, entries[3].key})
    taken = claim(connection, ME, SpoolAtHand("disk", keys=on_disk))

    assert [each.key for each in taken.entries] == [entries[0].key]
    assert ledger(connection) == [entries[0].key, entries[1].key, entries[3].key]


def test_rows_of_an_earlier_session_go_but_for_those_of_batches_on_the_disk(connection, make_sink):
    first = make_sink()
    entries = [entry(1, 1), entry(1, 2)]
    for each in entries:
        first.store(batch(each))

    taken = claim(connection, ME, SpoolAtHand("disk", keys=frozenset({entries[1].key}), session_epoch=2))

    assert taken.entries == ()
    assert ledger(connection) == [entries[1].key]


def test_a_batch_of_an_earlier_process_is_stored_by_its_successor_under_its_own_key_and_once(connection, make_sink):
    make_sink(SpoolAtHand("disk"))
    old = batch(entry(1, 7))
    second = make_sink(SpoolAtHand("disk", keys=frozenset({old.entry.key})))

    second.store(old)
    second.store(old)  # as after a crash before it was taken off the disk

    assert ledger(connection) == [old.entry.key]
    assert query(connection, "SELECT count(*) FROM readings") == [(1,)]


def test_a_batch_that_was_committed_before_it_went_to_the_disk_is_not_stored_again(connection, make_sink):
    first = make_sink(SpoolAtHand("disk"))
    in_doubt = batch(entry(1, 1))
    first.store(in_doubt)
    third = [make_sink(SpoolAtHand("disk", keys=frozenset({in_doubt.entry.key}))) for _ in range(2)][-1]

    third.store(in_doubt)

    assert query(connection, "SELECT count(*) FROM readings") == [(1,)]


def test_a_process_that_was_overtaken_can_not_drain_what_it_has(make_sink):
    first = make_sink(SpoolAtHand("disk"))
    make_sink(SpoolAtHand("disk"))

    with pytest.raises(Fenced):
        first.store(batch(entry(1, 1)))


def test_the_disk_is_released_by_its_owner_only(connection, make_sink):
    first = make_sink(SpoolAtHand("disk"))
    second = make_sink(SpoolAtHand("disk"))

    first.release_spool()
    assert owner(connection)[1:] == (1, "disk")
    second.release_spool()
    assert owner(connection)[1:] == (1, None)


def together(*entries):
    """These as one transaction, as the drainer stores them."""
    parts = [batch(each) for each in entries]
    return Batch(entries[0], [t for part in parts for t in part.translated], [], (), entries[1:])


def test_batches_that_are_drained_together_leave_a_row_each(connection, make_sink):
    entries = [entry(1, number) for number in (1, 2, 3)]

    make_sink().store(together(*entries))

    assert ledger(connection) == [each.key for each in entries]
    assert query(connection, "SELECT count(*) FROM readings") == [(3,)]


def test_where_one_of_several_was_committed_before_nothing_of_them_is_stored(connection, make_sink):
    sink = make_sink()
    entries = [entry(1, number) for number in (1, 2, 3)]
    sink.store(batch(entries[1]))

    with pytest.raises(AlreadyCommitted):
        sink.store(together(*entries))

    assert ledger(connection) == [entries[1].key]
    assert query(connection, "SELECT count(*) FROM readings") == [(1,)]


def test_a_batch_in_doubt_that_is_committed_vouches_for_no_other(connection, make_sink):
    sink = make_sink()
    entries = [entry(1, 1), entry(1, 2)]
    sink.store(batch(entries[0]))
    sink._transactions._in_doubt[entries[0].key,] = Stored({"readings": 1})  # its answer was not seen

    with pytest.raises(AlreadyCommitted):
        sink.store(together(*entries))

    for each in entries:
        sink.store(batch(each))
    assert query(connection, "SELECT count(*) FROM readings") == [(2,)]


def test_several_whose_own_commit_was_in_doubt_are_known_to_be_committed(connection, make_sink):
    sink = make_sink()
    entries = [entry(1, 1), entry(1, 2)]
    sink.store(together(*entries))
    sink._transactions._in_doubt[tuple(each.key for each in entries)] = Stored({"readings": 2})

    assert sink.store(together(*entries)) == Stored({"readings": 2})

    assert query(connection, "SELECT count(*) FROM readings") == [(2,)]


def test_nothing_that_is_known_to_be_committed_stays_in_doubt(connection, make_sink):
    """However it was tried: the doubts would pile up in every outage."""
    sink = make_sink()
    entries = [entry(1, 1), entry(1, 2)]
    sink._transactions._in_doubt[entries[0].key,] = Stored({"readings": 1})  # before it went to the disk

    sink.store(together(*entries))

    assert sink._transactions._in_doubt == {}


def test_no_epoch_comes_twice_though_the_database_forgets_or_the_clock_is_set_back(connection):
    first = claim(connection, ME)
    query(connection, "DELETE FROM mqtt_bridge.owners RETURNING 1")  # as by a retirement, or an old backup
    second = claim(connection, ME)
    query(connection, "UPDATE mqtt_bridge.owners SET owner_epoch = owner_epoch + 3600000 RETURNING 1")

    third = claim(connection, ME)

    assert first.owner_epoch < second.owner_epoch < third.owner_epoch
    assert third.owner_epoch == second.owner_epoch + 3600001
