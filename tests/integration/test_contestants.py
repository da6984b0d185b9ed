"""The systems that the bridge is compared with: those that need no download store what they are sent, and are gone.

The others (collectd, mq-bridge, mqttwarn, Node-RED) are fetched from registries; the benchmark itself exercises them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import paho.mqtt.client as mqtt
import paho.mqtt.publish
import psutil
import psycopg2
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks.contestant import REFERENCE, Stage, Unavailable
from benchmarks.contestants import all_contestants
from benchmarks.one_program import OneProgram
from benchmarks.packages import from_debian, from_npm, from_pypi
from benchmarks.program import Program
from mqtt_bridge.tools.embedded import Broker
from tests.waiting import wait_until

FOUR_ROWS = ["connection-per-payload", "pooled-inserts", REFERENCE]
MESSAGES = 300
TS = 1_760_000_000_123
"""2025-10-09 08:53:20.123 UTC."""


@pytest.fixture
def stage(own_broker: Callable[..., Broker], database: str, tmp_path: Path) -> Stage:
    broker = own_broker()
    return Stage(broker.host, broker.port, database, "bench/+/telemetry", tmp_path, MESSAGES, lambda _: None)


@pytest.fixture
def start(stage: Stage) -> Iterator[Callable[[str], OneProgram]]:
    started: list[OneProgram] = []

    def start(name: str) -> OneProgram:
        contestant = all_contestants()[name]
        assert isinstance(contestant, OneProgram)
        started.append(contestant)
        assert contestant.install()
        contestant.start(stage)
        return contestant

    yield start
    for contestant in started:
        contestant.stop()


@pytest.mark.parametrize("name", [*FOUR_ROWS, "mosquitto-psql"])
def test_every_message_is_stored_and_counted(start: Callable[[str], OneProgram], stage: Stage, name: str) -> None:
    contestant = start(name)

    publish(stage, MESSAGES)

    with closing(psycopg2.connect(stage.dsn)) as connection:
        connection.autocommit = True
        wait_until(lambda: contestant.count(connection) == MESSAGES, timeout_s=60, what="all messages to be stored")
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT count(*) FROM {contestant.stored.split()[0]}")
            assert cursor.fetchone() == (MESSAGES * contestant.rows_per_message,)


@pytest.mark.parametrize("name", FOUR_ROWS)
def test_readings_have_the_time_the_device_and_the_values_of_the_payload(
    start: Callable[[str], OneProgram], stage: Stage, name: str
) -> None:
    contestant = start(name)

    publish(stage, 1)

    with closing(psycopg2.connect(stage.dsn)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        wait_until(lambda: contestant.count(connection) == 1, timeout_s=60, what="the message to be stored")
        cursor.execute("SELECT extract(epoch FROM time) * 1000, device, metric, value FROM readings ORDER BY metric")
        assert cursor.fetchall() == [
            (TS, "device-0000", "battery", 3.712),
            (TS, "device-0000", "humidity", 45.1),
            (TS, "device-0000", "rssi", -67.0),
            (TS, "device-0000", "temperature", 21.5),
        ]


@pytest.mark.parametrize("name", [*FOUR_ROWS, "mosquitto-psql"])
def test_nothing_is_left_of_it_but_what_it_stored(start: Callable[[str], OneProgram], stage: Stage, name: str) -> None:
    contestant = start(name)
    (root,) = contestant.pids()
    tree = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]

    contestant.stop()
    contestant.stop()

    assert not any(map(is_alive, tree))
    assert contestant.pids() == []
    assert not has_session(stage, contestant.client_id)


def test_the_reference_acknowledges_what_is_committed_and_nothing_else(
    start: Callable[[str], OneProgram], stage: Stage
) -> None:
    contestant = start(REFERENCE)
    with closing(psycopg2.connect(stage.dsn)) as locking, locking.cursor() as cursor:
        cursor.execute("LOCK TABLE readings")
        publish(stage, MESSAGES)
        wait_until(lambda: waits_for_the_lock(stage.dsn), what="a worker to wait for the lock")
        (root,) = contestant.pids()
        psutil.Process(root).kill()

    assert contestant._program is not None
    contestant._program.stop()
    again = Program(stage.directory / "again.log")
    contestant.launch(again, stage)

    try:
        with closing(psycopg2.connect(stage.dsn)) as connection:
            connection.autocommit = True
            wait_until(lambda: contestant.count(connection) == MESSAGES, timeout_s=60, what="all to be delivered again")
    finally:
        again.stop()


def test_a_program_that_ends_at_once_is_unavailable_with_its_last_words(tmp_path: Path) -> None:
    program = Program(tmp_path / "program.log")
    program.start(["/bin/sh", "-c", "echo no such option >&2; exit 2"], directory=tmp_path, environment={})

    with pytest.raises(Unavailable, match=r"ended at once.*no such option"):
        program.wait_until_it_says("ready")


def test_a_program_that_ignores_sigterm_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.program.STOP_TIMEOUT_S", 0.1)
    program = Program(tmp_path / "program.log")
    script = "trap '' TERM; sleep 1000 & echo ready; wait; wait"
    program.start(["/bin/sh", "-c", script], directory=tmp_path, environment={})
    program.wait_until_it_says("ready")
    (root,) = program.pids
    children = psutil.Process(root).children()

    program.stop()

    assert children
    assert not any(map(is_alive, children))
    assert program.pids == []


def test_what_a_program_starts_while_it_is_stopped_is_killed_too(tmp_path: Path) -> None:
    program = Program(tmp_path / "program.log")
    again = tmp_path / "again.pid"
    script = f"trap 'sleep 1000 & echo $! > {again}; exit' TERM; echo ready; while :; do sleep 0.01; done"
    program.start(["/bin/sh", "-c", script], directory=tmp_path, environment={})
    program.wait_until_it_says("ready")

    program.stop()

    pid = int(again.read_text())
    assert not psutil.pid_exists(pid) or not is_alive(psutil.Process(pid))


def test_what_a_registry_does_not_have_is_unavailable_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MQTT_BRIDGE_BENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(Unavailable, match="Node"):
        from_npm("a", "b@1")
    with pytest.raises(Unavailable, match="apt-get"):
        from_debian("a", "b")
    with pytest.raises(Unavailable, match="could not fetch"):
        from_pypi("a", str(tmp_path / "no-such-wheel.whl"))
    assert os.listdir(tmp_path / "a") == []


def publish(stage: Stage, count: int) -> None:
    payload = b'{"temperature":21.5,"humidity":45.1,"battery":3.712,"rssi":-67,"ts":%d}'
    messages = [(f"bench/device-{number:04}/telemetry", payload % (TS + number), 1, False) for number in range(count)]
    paho.mqtt.publish.multiple(messages, hostname=stage.broker_host, port=stage.broker_port)


def has_session(stage: Stage, client_id: str) -> bool:
    present: list[bool] = []
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, clean_session=False)
    client.on_connect = lambda client, userdata, flags, *_: present.append(flags.session_present)
    client.connect(stage.broker_host, stage.broker_port)
    client.loop_start()
    wait_until(lambda: present, what="the broker's answer")
    client.disconnect()
    client.loop_stop()
    return present[0]


def waits_for_the_lock(dsn: str) -> bool:
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'readings'::regclass")
        return cursor.fetchone() is not None


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
