"""What the processes of one bridge are called, and what differs between them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mqtt_bridge.membership import client_ids, settings_of, variables_of
from mqtt_bridge.settings import Settings, load

GIVEN = {"MQTT_CLIENT_ID": "hall", "BRIDGE_SPOOL_DIR": "/spool", "HTTP_TOKEN": "s3cret", "BRIDGE_WORKERS": "3"}


def test_a_single_process_has_the_client_id_itself_and_several_are_numbered_from_1():
    assert client_ids(Settings(mqtt_client_id="hall")) == ("hall",)
    assert client_ids(Settings(mqtt_client_id="hall", bridge_processes=3)) == ("hall-1", "hall-2", "hall-3")


@pytest.mark.parametrize(
    ("group", "client_id", "expected"),
    [(None, "hall", None), (None, "hall-2", "hall"), ("all", "hall", "all"), ("all", "hall-2", "all")],
)
def test_several_processes_share_a_group_and_a_single_one_only_where_it_is_told_to(group, client_id, expected):
    settings = Settings(mqtt_client_id="hall", mqtt_shared_group=group)

    assert settings_of(settings, client_id).mqtt_shared_group == expected


@pytest.mark.parametrize(
    ("client_id", "expected"),
    [("hall", "/spool"), ("hall-2", "/spool/hall-2"), ("../etc/hall-1", "/spool/..%2Fetc%2Fhall-1")],
)
def test_each_process_has_a_spool_of_its_own_within_the_directory(client_id, expected):
    settings = Settings(mqtt_client_id="hall", bridge_spool_dir=Path("/spool"))

    assert settings_of(settings, client_id).bridge_spool_dir == Path(expected)
    assert settings_of(Settings(), client_id).bridge_spool_dir is None


@pytest.mark.parametrize("client_id", ["hall", "hall-1"])
def test_the_variables_make_the_same_settings(client_id):
    settings = load(GIVEN | {"BRIDGE_PROCESSES": "2"}, None)

    made = load(GIVEN | {"BRIDGE_PROCESSES": "2"} | variables_of(settings, client_id), None)

    assert made == settings_of(settings, client_id).model_copy(update={"http_token": None})
    assert made.http_token is None
