"""2,000 messages with 50 among them that the server refuses, through the program."""

from __future__ import annotations

from collections import Counter
from contextlib import closing

import psycopg2

from tests.acceptance.traffic import Publisher, compare, query, wait_until_stored
from tests.program import run_command
from tests.waiting import wait_until

REFUSE_EVERY_40TH = "ALTER TABLE readings ADD CONSTRAINT sane CHECK (value::int % 40 <> 7)"
LOCK = 4711
WAIT_AT_1000 = f"""
CREATE FUNCTION wait_at_1000() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
IF NEW.value = 1000 THEN PERFORM pg_advisory_xact_lock({LOCK}); END IF; RETURN NEW; END $$;
CREATE TRIGGER wait_at_1000 BEFORE INSERT ON readings FOR EACH ROW EXECUTE FUNCTION wait_at_1000()
"""


def good(published):
    return {(device, seq) for device, seq in published if seq % 40 != 7}


def letters(database):
    rows = query(database, "SELECT payload, stage, sqlstate, error FROM mqtt_bridge.dead_letters")
    assert all(row[1:3] == ("store", "23514") and "sane" in row[3] for row in rows)
    return Counter(bytes(payload) for payload, *_ in rows)


def payloads(numbers):
    return Counter(b'{"seq": %d}' % number for number in numbers)


def test_50_bad_of_2000_become_dead_letters_and_are_stored_once_when_their_cause_is_mended(
    make_bridge, database, broker, site, tmp_path
):
    bridge = make_bridge(database, broker, BRIDGE_BATCH_WAIT_MS=1000).start().wait_until_ready()
    query(database, REFUSE_EVERY_40TH)

    with Publisher(broker, site) as publisher:
        publisher.publish(2000)
        publisher.settle()
    messages = bridge.wait_for_outcomes(2000)

    assert (messages["stored"], messages["dead_lettered"]) == (1950, 50)
    assert wait_until_stored(database, good(publisher.published)).exact
    assert letters(database) == payloads(range(7, 2000, 40))
    assert bridge.readyz() == (200, [])

    query(database, "ALTER TABLE readings DROP CONSTRAINT sane")
    settings = {"DATABASE_URL": database, "MQTT_TOPICS": f"{site}/{{device}}/telemetry"}
    for requeued in ("requeued 50 dead letters of 50", "there is nothing to requeue"):
        ended = run_command(tmp_path, "dead-letters", "requeue", **settings)
        assert ended.returncode == 0, ended.stderr
        assert requeued in ended.stdout
        assert compare(database, publisher.published).exact
    assert query(database, "SELECT count(*) FROM mqtt_bridge.dead_letters WHERE requeued_at IS NULL") == [(0,)]


def test_kill_9_in_the_middle_of_a_poisoned_batch_changes_nothing(make_bridge, database, broker, site):
    bridge = make_bridge(database, broker, BRIDGE_BATCH_WAIT_MS=1000).start().wait_until_ready()
    query(database, REFUSE_EVERY_40TH)
    query(database, WAIT_AT_1000)

    with closing(psycopg2.connect(database)) as holder, Publisher(broker, site) as publisher:
        holder.autocommit = True  # within one transaction pg_stat_activity would never change
        with holder.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
            publisher.publish(2000)
            publisher.settle()
            # By then its batch is taken apart: some of it is stored, some is refused, and nothing is committed.
            wait_until(lambda: waits_for(cursor, LOCK), timeout_s=30, what="the batch to come to number 1000")
            bridge.kill()
    assert len(letters(database)) < 50
    bridge.start().wait_until_ready()

    assert wait_until_stored(database, good(publisher.published), bridge).exact
    assert letters(database) == payloads(range(7, 2000, 40))
    assert query(database, "SELECT count(*) FROM readings") == [(1950,)]


def waits_for(cursor, lock):
    """Whether a transaction waits for the lock, in the COPY of a part of its batch."""
    cursor.execute(
        "SELECT query FROM pg_locks JOIN pg_stat_activity USING (pid)"
        " WHERE locktype = 'advisory' AND objid = %s AND NOT granted",
        (lock,),
    )
    return any("SAVEPOINT" in query for (query,) in cursor.fetchall())
