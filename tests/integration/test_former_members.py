"""Which client ids a bridge has had processes for, as a real PostgreSQL remembers it."""

from __future__ import annotations

from contextlib import closing

import psycopg2
import pytest

from mqtt_bridge import schema
from mqtt_bridge.connections import BridgeConnection
from mqtt_bridge.ownership import claim, former_members


@pytest.fixture
def connection(database):
    with closing(psycopg2.connect(database, connection_factory=BridgeConnection)) as connection:
        schema.apply(connection)
        yield connection


def test_client_ids_without_a_process_any_more_are_found_and_those_of_others_are_not(connection):
    for client_id in ("hall-1", "hall-2", "hall-3"):
        claim(connection, client_id, member_of="hall")
    claim(connection, "hall-4", member_of="hall-4")  # a bridge of somebody else's, whatever its name looks like
    claim(connection, "hall", member_of="hall")

    assert former_members(connection, "hall", ["hall-1", "hall-2"]) == ["hall", "hall-3"]
    assert former_members(connection, "hall", ["hall"]) == ["hall-1", "hall-2", "hall-3"]
    assert former_members(connection, "hall-4", ["hall-4"]) == []


def test_who_takes_over_without_saying_whose_it_is_leaves_what_is_noted(connection):
    claim(connection, "hall-2", member_of="hall")

    claim(connection, "hall-2")  # as a retirement does, which may be killed before its end

    assert former_members(connection, "hall", ["hall"]) == ["hall-2"]


def test_a_client_id_of_an_older_version_was_a_bridge_of_its_own(connection):
    claim(connection, "hall")

    assert former_members(connection, "hall", ["hall-1", "hall-2"]) == ["hall"]
    assert former_members(connection, "hall-1", ["hall-1"]) == []


def test_a_client_id_that_becomes_a_bridge_of_its_own_is_nobodys_member_any_more(connection):
    claim(connection, "hall-2", member_of="hall")

    claim(connection, "hall-2", member_of="hall-2")

    assert former_members(connection, "hall", ["hall"]) == []
