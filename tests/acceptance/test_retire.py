"""`mqtt-bridge retire`: a client id ends, and nothing that its session held is lost or stored twice."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from mqtt_bridge.tools.embedded import Broker, free_port
from tests.acceptance.traffic import Publisher, compare, count_of_readings, query
from tests.program import Program, command_line, environment, run_command
from tests.waiting import wait_until

PROTOCOLS = ["5", "3.1.1"]
QUIET = ("--yes", "--quiet", "1")
StartRetire = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_retire(tmp_path: Path) -> Iterator[StartRetire]:
    """Starts `mqtt-bridge retire` with the settings of a bridge; killed after the test."""
    with ExitStack() as stack:

        def start(bridge: Program, *arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                command_line("retire", str(bridge.settings["MQTT_CLIENT_ID"]), *arguments),
                cwd=tmp_path,
                env=environment(**bridge.settings),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def retire(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `mqtt-bridge retire` to its end."""

    def run(bridge: Program, *arguments: str) -> subprocess.CompletedProcess[str]:
        client_id = str(bridge.settings["MQTT_CLIENT_ID"])
        return run_command(tmp_path, "retire", client_id, *(arguments or QUIET), timeout_s=120, **bridge.settings)

    return run


def has_session(broker: Broker, bridge: Program) -> bool:
    """Whether the broker has a session of the bridge's client id. Where it has none, asking begins one."""
    answers: list[mqtt.ConnectFlags] = []
    client_id = str(bridge.settings["MQTT_CLIENT_ID"])
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, clean_session=False, protocol=4, manual_ack=True)
    client.on_connect = lambda _client, _userdata, flags, _reason, _properties: answers.append(flags)
    client.connect(broker.host, broker.port)
    client.loop_start()
    wait_until(lambda: answers, what="CONNACK")
    client.disconnect()
    client.loop_stop()
    return answers[0].session_present


def traces(database: str, bridge: Program) -> int:
    """Rows about the client id that are left in the database."""
    client_id = bridge.settings["MQTT_CLIENT_ID"]
    tables = ("mqtt_bridge.owners", "mqtt_bridge.ledger")
    return sum(
        query(database, f"SELECT count(*) FROM {table} WHERE client_id = %s", client_id)[0][0] for table in tables
    )


def fill(bridge: Program, broker: Broker, site: str, count: int) -> set[tuple[str, int]]:
    """Begin a session, leave it, and have so many messages queued in it."""
    bridge.start().wait_until_ready()
    assert bridge.stop() == 0
    with Publisher(broker, site) as publisher:
        publisher.publish(count)
        publisher.settle()
    return publisher.published


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_5_000_queued_messages_are_stored_before_the_session_ends(
    make_bridge, database, own_broker, site, retire, protocol
):
    broker = own_broker()
    bridge = make_bridge(database, broker, MQTT_PROTOCOL=protocol)
    published = fill(bridge, broker, site, 5000)

    ended = retire(bridge)

    assert ended.returncode == 0, ended.stderr
    assert "is retired: its session held 5,000 messages (5,000 stored)" in ended.stdout
    assert compare(database, published).exact
    assert traces(database, bridge) == 0
    assert not has_session(broker, bridge)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("endings", [(signal.SIGKILL, signal.SIGKILL), (signal.SIGINT,)])
def test_ended_midway_and_run_again_it_loses_nothing_and_stores_nothing_twice(
    make_bridge, database, own_broker, site, start_retire, retire, protocol, endings
):
    broker = own_broker()
    bridge = make_bridge(database, broker, MQTT_PROTOCOL=protocol, BRIDGE_BATCH_SIZE=20, BRIDGE_WORKERS=1)
    published = fill(bridge, broker, site, 5000)

    for ending in endings:
        enough = count_of_readings(database) + 500
        midway = start_retire(bridge, *QUIET)
        wait_until(lambda enough=enough: count_of_readings(database) >= enough, timeout_s=60, what="a part of it")
        midway.send_signal(ending)
        output, _ = midway.communicate(timeout=60)
        assert midway.returncode == (1 if ending == signal.SIGINT else -signal.SIGKILL), output
    ended = retire(bridge)

    assert ended.returncode == 0, ended.stderr
    assert compare(database, published).exact
    assert traces(database, bridge) == 0
    assert not has_session(broker, bridge)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_client_id_that_nobody_knows_leaves_no_trace(make_bridge, database, own_broker, retire, protocol):
    broker = own_broker()
    bridge = make_bridge(database, broker, MQTT_PROTOCOL=protocol)

    ended = retire(bridge)

    assert ended.returncode == 0, ended.stderr
    assert "known neither to the broker nor to the database" in ended.stdout
    assert traces(database, bridge) == 0
    assert not has_session(broker, bridge)


def test_without_a_session_at_the_broker_the_database_is_tidied(make_bridge, database, own_broker, retire):
    bridge = make_bridge(database, own_broker())
    bridge.start().wait_until_ready()
    bridge.kill()
    another = own_broker()
    bridge.settings |= {"MQTT_HOST": another.host, "MQTT_PORT": another.port}

    ended = retire(bridge)

    assert ended.returncode == 0, ended.stderr
    assert "the broker has no session" in ended.stdout
    assert traces(database, bridge) == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_bridge_that_runs_under_it_leaves_with_3(make_bridge, database, own_broker, site, retire, protocol):
    broker = own_broker()
    bridge = make_bridge(database, broker, MQTT_PROTOCOL=protocol).start().wait_until_ready()
    with Publisher(broker, site) as publisher:
        publisher.publish(500)
        publisher.settle()

        ended = retire(bridge)

    assert ended.returncode == 0, ended.stderr
    assert bridge.wait() == 3
    assert compare(database, publisher.published).exact
    assert traces(database, bridge) == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_under_load_what_is_stored_is_all_that_was_published_until_it_unsubscribed(
    make_bridge, database, own_broker, site, retire, protocol
):
    broker = own_broker()
    bridge = make_bridge(database, broker, MQTT_PROTOCOL=protocol).start().wait_until_ready()
    with Publisher(broker, site) as publisher:
        publisher.begin(per_s=2000)
        publisher.go_on(2000)

        ended = retire(bridge)
        publisher.end()

    assert ended.returncode == 0, ended.stderr
    assert bridge.wait() == 3
    stored = [int(value) for (value,) in query(database, "SELECT value FROM readings ORDER BY value")]
    assert stored == list(range(len(stored)))
    assert 2000 <= len(stored) < len(publisher.published)


def test_a_bridge_that_is_started_under_it_again_ends_it_with_3(make_bridge, database, own_broker, start_retire):
    bridge = make_bridge(database, own_broker()).start().wait_until_ready()
    assert bridge.stop() == 0
    retiring = start_retire(bridge, "--yes", "--quiet", "60")
    epochs = "SELECT owner_epoch FROM mqtt_bridge.owners"
    before = query(database, epochs)
    wait_until(lambda: query(database, epochs) != before, timeout_s=30, what="the claim")

    bridge.start().wait_until_ready()
    output, _ = retiring.communicate(timeout=60)

    assert retiring.returncode == 3, output
    assert "a bridge was started under it again" in output
    assert bridge.running
    assert bridge.stop() == 0


def test_the_database_and_the_broker_may_be_away_at_first(make_bridge, own_postgres, own_broker, site, start_retire):
    postgres, broker = own_postgres(), own_broker()
    bridge = make_bridge(postgres.dsn(), broker)
    published = fill(bridge, broker, site, 100)
    postgres.stop()
    broker.stop()

    retiring = start_retire(bridge, *QUIET)
    assert retiring.stdout is not None
    said = next(line for line in retiring.stdout if "The database: " in line)
    postgres.start()
    said += next(line for line in retiring.stdout if "nothing listens at" in line)
    broker.start()
    output, _ = retiring.communicate(timeout=90)

    assert retiring.returncode == 0, said + output
    assert compare(postgres.dsn(), published).exact
    assert traces(postgres.dsn(), bridge) == 0


def test_what_is_published_later_goes_to_the_others_of_a_shared_group(make_bridge, database, own_broker, site, retire):
    broker = own_broker()
    leaver, stayer = (make_bridge(database, broker, MQTT_SHARED_GROUP="bridges") for _ in range(2))
    leaver.start().wait_until_ready()
    stayer.start().wait_until_ready()
    assert leaver.stop() == 0
    with Publisher(broker, site) as publisher:
        publisher.publish(1000)
        publisher.settle()

        ended = retire(leaver)
        publisher.publish(1000)
        publisher.settle()
        wait_until(lambda: stayer.messages()["stored"] == 1500, timeout_s=60, what="the rest at the other")

    assert ended.returncode == 0, ended.stderr
    assert "held 500 messages" in ended.stdout
    assert compare(database, publisher.published).exact
    assert stayer.stop() == 0


def test_a_client_id_whose_spool_may_hold_messages_is_refused_and_its_bridge_left_alone(
    make_bridge, database, own_broker, retire
):
    bridge = make_bridge(database, own_broker()).start().wait_until_ready()
    query(database, "UPDATE mqtt_bridge.owners SET spool_id = 'disk-7'")

    ended = retire(bridge)

    assert ended.returncode == 1
    assert "disk-7" in ended.stderr
    assert "BRIDGE_SPOOL_DIR" in ended.stderr
    assert traces(database, bridge) >= 1
    assert bridge.stop() == 0


@pytest.fixture
def naming_broker(own_broker: Callable[..., Broker]) -> tuple[Broker, int]:
    """One with a second listener, at this port, that makes the user name the client id."""
    port = free_port()
    return own_broker(config_lines=[f"listener {port} 127.0.0.1", "use_username_as_clientid true"]), port


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("user", ["other-bridge", "operator"])
def test_where_the_broker_makes_the_user_name_the_client_id_nobody_elses_session_ends(
    make_bridge, database, naming_broker, site, retire, user, protocol
):
    broker, port = naming_broker
    common = {"MQTT_PORT": port, "MQTT_PROTOCOL": protocol}
    other = make_bridge(database, broker, **common, MQTT_CLIENT_ID="other-bridge", MQTT_USERNAME="other-bridge")
    bridge = make_bridge(database, broker, **common, MQTT_CLIENT_ID="old-bridge", MQTT_USERNAME="old-bridge")
    other.start().wait_until_ready()
    other.stop()
    published = fill(bridge, broker, site, 10)
    bridge.settings["MQTT_USERNAME"] = user

    ended = retire(bridge)

    assert ended.returncode == 1
    assert "Set MQTT_USERNAME" in ended.stderr
    assert traces(database, bridge) == 1
    assert has_session(broker, other)
    assert has_session(broker, bridge)
    assert user == "other-bridge" or not has_session(broker, make_bridge(database, MQTT_CLIENT_ID=user))
    bridge.settings["MQTT_USERNAME"] = "old-bridge"
    assert retire(bridge).returncode == 0
    assert compare(database, published).exact
    assert not has_session(broker, bridge)


def test_without_a_terminal_it_has_to_be_told_yes(make_bridge, database, own_broker, retire):
    bridge = make_bridge(database, own_broker()).start().wait_until_ready()

    ended = retire(bridge, "--quiet", "1")

    assert ended.returncode == 2
    assert "--yes" in ended.stderr
    assert bridge.stop() == 0


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"y\n", 0)])
def test_on_a_terminal_it_asks_and_says_what_it_is_about_to_end(
    tmp_path, make_bridge, database, own_broker, answer, code
):
    bridge = make_bridge(database, own_broker()).start().wait_until_ready()
    assert bridge.stop() == 0
    controller, terminal = os.openpty()

    process = subprocess.Popen(
        command_line("retire", str(bridge.settings["MQTT_CLIENT_ID"]), "--quiet", "1"),
        cwd=tmp_path,
        env=environment(**bridge.settings),
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    os.write(controller, answer)
    output = process.communicate(timeout=60)[0].decode()
    os.close(controller)
    os.close(terminal)

    assert process.returncode == code, output
    assert "last claimed" in output
    assert "/telemetry" in output
    assert traces(database, bridge) == (0 if code == 0 else 1)


@pytest.mark.parametrize("client_id", ["", " ", "a\x01b"])
def test_what_cannot_be_a_client_id_is_a_configuration_error(tmp_path, client_id):
    ended = run_command(tmp_path, "retire", client_id, *QUIET, DATABASE_URL=f"postgresql://x@127.0.0.1:{free_port()}/x")

    assert ended.returncode == 2
    assert "MQTT_CLIENT_ID" in ended.stderr


def test_what_is_left_in_the_disk_buffer_is_stored_before_the_client_id_is_retired(
    make_bridge, own_postgres, own_broker, site, retire, tmp_path
):
    postgres, broker = own_postgres(), own_broker()
    database = postgres.create_database("test")
    spool: dict[str, object] = {"BRIDGE_SPOOL": "always", "BRIDGE_SPOOL_DIR": tmp_path / "spool"}
    bridge = make_bridge(database, broker, **spool).start().wait_until_ready()
    postgres.stop("immediate")
    with Publisher(broker, site) as publisher:
        publisher.publish(300)
        publisher.settle()
        wait_until(lambda: bridge.status()["spool"]["messages"] == 300, what="the messages to be on the disk")
    bridge.kill()
    postgres.start()
    bridge.settings["BRIDGE_SPOOL"] = "off"

    directory = bridge.settings.pop("BRIDGE_SPOOL_DIR")
    refused = retire(bridge)
    bridge.settings["BRIDGE_SPOOL_DIR"] = directory
    ended = retire(bridge)

    assert refused.returncode == 1
    assert "may still have messages in a disk buffer" in refused.stderr
    assert ended.returncode == 0, ended.stderr
    assert "is retired: its session held" in ended.stdout
    assert compare(database, publisher.published).exact
    assert query(database, "SELECT client_id FROM mqtt_bridge.owners") == []
