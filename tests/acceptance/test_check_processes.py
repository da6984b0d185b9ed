"""`mqtt-bridge check` with several processes."""

from __future__ import annotations

import pytest

from mqtt_bridge.tools.embedded import free_port
from tests.program import run_command


@pytest.fixture
def check(tmp_path, database, broker):
    """Runs it; the settings lead to the database and the broker of the tests, with two processes."""

    def run(*options, **settings):
        usual = {
            "DATABASE_URL": database,
            "MQTT_HOST": broker.host,
            "MQTT_PORT": broker.port,
            "MQTT_CLIENT_ID": "hall",
            "HTTP_PORT": 0,
            "BRIDGE_PROCESSES": 2,
            "BRIDGE_WORKERS": 2,
        }
        return run_command(tmp_path, "check", *options, **(usual | settings))

    return run


def test_it_names_the_client_ids_the_group_the_connections_and_what_a_group_does_not_do(check):
    ended = check()

    assert ended.returncode == 0, ended.stdout
    assert "client ids hall-1 to hall-2 share the group hall" in ended.stdout
    assert "8 connections are needed (BRIDGE_PROCESSES=2 times DB_POOL_SIZE=4), of " in ended.stdout
    assert "Mosquitto does not save shared subscriptions" in ended.stdout
    assert "MQTT_RETAINED=once has no effect" in ended.stdout
    assert "0 problems, 1 warnings" in ended.stdout


def test_of_retained_messages_it_warns_where_they_were_asked_for(check):
    ended = check("--offline", BRIDGE_PROCESSES=1, MQTT_SHARED_GROUP="halls", MQTT_RETAINED="always")

    assert "WARNING MQTT_RETAINED=always has no effect" in " ".join(ended.stdout.split())
    assert "retained" not in check("--offline", BRIDGE_PROCESSES=1).stdout


def test_more_connections_than_the_server_has_are_a_problem(check, own_postgres):
    postgres = own_postgres(settings={"max_connections": "15", "superuser_reserved_connections": "3"})

    enough = check(DATABASE_URL=postgres.dsn(), BRIDGE_PROCESSES=3)
    too_many = check(DATABASE_URL=postgres.dsn(), BRIDGE_PROCESSES=4)

    assert enough.returncode == 0, enough.stdout
    assert "12 connections are needed" in enough.stdout
    assert too_many.returncode == 2
    assert "16 connections are needed (BRIDGE_PROCESSES=4 times DB_POOL_SIZE=4), and the server allows 12" in (
        too_many.stdout
    )


def test_a_broker_that_makes_the_user_name_the_client_id_cannot_tell_the_processes_apart(check, own_broker):
    port = free_port()
    broker = own_broker(config_lines=[f"listener {port} 127.0.0.1", "use_username_as_clientid true"])

    ended = check(MQTT_HOST=broker.host, MQTT_PORT=port, MQTT_USERNAME="hall")

    assert ended.returncode == 2
    assert "all processes would be one client" in ended.stdout
    assert check(MQTT_HOST=broker.host, MQTT_PORT=port, MQTT_USERNAME="hall", BRIDGE_PROCESSES=1).returncode == 0


def test_each_process_has_its_own_disk_buffer_in_the_directory(check, tmp_path):
    spool = {"BRIDGE_SPOOL": "outage", "BRIDGE_SPOOL_DIR": tmp_path / "spool", "BRIDGE_SPOOL_MAX_MB": 1}
    not_there_yet = check(**spool)
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "hall-2").write_text("no directory")

    in_the_way = check(**spool)

    assert not_there_yet.returncode == 0, not_there_yet.stdout
    assert in_the_way.returncode == 2
    assert str(tmp_path / "spool" / "hall-2") in in_the_way.stdout


def test_several_processes_over_mqtt_3_are_refused_with_the_setting(check):
    ended = check("--offline", MQTT_PROTOCOL="3.1.1")

    assert ended.returncode == 2
    assert "BRIDGE_PROCESSES=2" in ended.stdout
    assert "MQTT_PROTOCOL=5" in ended.stdout
