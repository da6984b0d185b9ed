"""How long the sink goes on trying, and when its database counts as failing: with a real PostgreSQL."""

from __future__ import annotations

import threading
from contextlib import closing

import psycopg2
import pytest

from mqtt_bridge import sink as sink_module
from mqtt_bridge.connections import Connections
from mqtt_bridge.errors import Verdict
from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.model import READINGS_COLUMNS, Message, Table, Translation
from mqtt_bridge.sink import Impatient, Sink
from mqtt_bridge.transactions import Batch
from tests.waiting import wait_until


def batch(number=1):
    message = Message(b"d/telemetry", b"1", 1, False, 0, number, b"12345678")
    row = (0, "d", "m", 1.0, None)
    translated = [(message, Translation("r", Table("readings", READINGS_COLUMNS), [row]))]
    return Batch(Entry(BatchKey(1, number), 1, number, b"12345678"), translated, [])


@pytest.fixture
def make_sink():
    made = []

    def make(dsn, **kwargs):
        connections = Connections(lambda: dsn, size=2)
        made.append(connections)
        sink = Sink(connections, client_id="c", **kwargs)
        sink.open(create=True)
        return sink

    yield make
    for connections in made:
        connections.close()


@pytest.fixture
def postgres(own_postgres):
    return own_postgres()


def test_patience_ends_a_store_that_fails_and_not_one_that_succeeds(make_sink, postgres):
    sink = make_sink(postgres.dsn())
    sink.store(batch(1), patience_s=lambda: 0.0)

    postgres.stop()

    with pytest.raises(Impatient):
        sink.store(batch(2), patience_s=lambda: 0.0)


def test_patience_may_end_while_it_waits_for_the_next_try(make_sink, postgres):
    sink = make_sink(postgres.dsn())
    postgres.stop()

    with pytest.raises(Impatient):
        sink.store(batch(), patience_s=lambda: 0.5 - sink.failing_s)

    assert sink.failing_s >= 0.5


def test_the_trouble_of_one_who_lost_patience_lasts_until_something_is_stored(make_sink, postgres):
    sink = make_sink(postgres.dsn())
    postgres.stop()
    with pytest.raises(Impatient):
        sink.store(batch(1), patience_s=lambda: 0.5 - sink.failing_s)
    assert sink.trouble.verdict is Verdict.RECONNECT

    postgres.start()
    wait_until(sink.probe, what="the database to answer")
    assert sink.failing_s > 0  # answering is not storing: a full disk answers too
    sink.store(batch(2))

    assert (sink.trouble, sink.failing_s) == (None, 0.0)


def test_a_database_that_is_merely_slow_does_not_fail(make_sink, database):
    sink = make_sink(database, statement_timeout_s=1)
    with closing(psycopg2.connect(database)) as other, other.cursor() as cursor:
        cursor.execute("LOCK TABLE readings IN ACCESS EXCLUSIVE MODE")
        storing = threading.Thread(target=lambda: sink.store(batch()))
        storing.start()
        wait_until(lambda: sink.trouble, what="the statement to time out", timeout_s=30)

        assert sink.trouble.verdict is Verdict.BUSY
        assert sink.failing_s == 0.0
        other.rollback()
    storing.join(30)
    assert sink.trouble is None


def test_releasing_the_disk_holds_nobody_up_who_wants_to_leave(make_sink, database, monkeypatch):
    """Even where a statement may take very long."""
    monkeypatch.setattr(sink_module, "PROBE_LIMIT_S", 0.1)
    sink = make_sink(database, statement_timeout_s=3600)
    came = []
    with closing(psycopg2.connect(database)) as other, other.cursor() as cursor:
        cursor.execute("SELECT FROM mqtt_bridge.owners FOR UPDATE")

        def release():
            with pytest.raises(psycopg2.Error):
                sink.release_spool()
            came.append("the end")

        threading.Thread(target=release, daemon=True).start()

        # As the watchdog does every second.
        wait_until(lambda: sink._connections.cut_silent() or came, what="its time to be over")
        wait_until(lambda: came, what="the end of the try")
