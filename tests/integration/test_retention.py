"""Dead letters that are older than BRIDGE_DEAD_LETTER_DAYS are deleted, some at a time."""

from __future__ import annotations

from contextlib import closing

import psycopg2
import pytest

from mqtt_bridge import dead_letters, schema
from mqtt_bridge.dead_letters import purge_older_than


@pytest.fixture
def connection(database):
    with closing(psycopg2.connect(database)) as connection:
        connection.autocommit = True
        schema.apply(connection)
        yield connection


def keep(connection, *ages):
    """Dead letters of these ages; their payloads are the ages."""
    with connection.cursor() as cursor:
        for age in ages:
            cursor.execute(
                "INSERT INTO mqtt_bridge.dead_letters"
                " (received_at, topic, payload, qos, retain, stage, error, client_id)"
                " VALUES (now() - %s::interval, 't', %s, 1, false, 'decode', 'no JSON', 'hall')",
                (age, age.encode()),
            )


def kept(connection):
    with connection.cursor() as cursor:
        cursor.execute("SELECT convert_from(payload, 'UTF8') FROM mqtt_bridge.dead_letters ORDER BY received_at")
        return [age for (age,) in cursor.fetchall()]


def test_dead_letters_older_than_the_days_are_deleted(connection):
    keep(connection, "400 days", "91 days", "89 days", "1 second")

    assert purge_older_than(connection, 90) == 2

    assert kept(connection) == ["89 days", "1 second"]
    assert purge_older_than(connection, 90) == 0


def test_0_days_keeps_them_for_ever(connection):
    keep(connection, "100 years")

    assert purge_older_than(connection, 0) == 0

    assert kept(connection) == ["100 years"]


def test_the_most_days_that_the_setting_allows_can_be_asked_for(connection):
    keep(connection, "101 years", "99 years")

    assert purge_older_than(connection, 36_500) == 1


def test_so_many_are_deleted_at_once_and_the_oldest_first(connection, monkeypatch):
    monkeypatch.setattr(dead_letters, "PURGED_AT_ONCE", 2)
    keep(connection, "92 days", "94 days", "91 days", "93 days", "95 days")

    purged = [purge_older_than(connection, 90)]

    assert kept(connection) == ["93 days", "92 days", "91 days"]
    purged += [purge_older_than(connection, 90), purge_older_than(connection, 90), purge_older_than(connection, 90)]
    assert purged == [2, 2, 1, 0]


def test_one_that_is_being_requeued_is_not_waited_for(connection, database):
    keep(connection, "92 days", "91 days")
    with closing(psycopg2.connect(database)) as other, other.cursor() as cursor:
        cursor.execute("SELECT 1 FROM mqtt_bridge.dead_letters WHERE payload = '92 days' FOR UPDATE")

        assert purge_older_than(connection, 90) == 1

        assert kept(connection) == ["92 days"]
