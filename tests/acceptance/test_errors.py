"""What is set up wrongly is said in one line that names the setting to change, and never shows a secret."""

from __future__ import annotations

import re
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
import trustme

from mqtt_bridge.tools.embedded import Broker, Postgres, free_port
from tests.acceptance.conftest import MakeBridge, python_complaints
from tests.acceptance.traffic import Publisher, query, wait_until_stored
from tests.program import Program, run_command
from tests.scripted_broker import Answer, ScriptedBroker
from tests.waiting import wait_until

SECRET = "hunter2-Ünïque"
SECRET_IN_A_URL = "hunter2-%C3%9Cn%C3%AFque"

COMPLAINT = re.compile(r"\[(warning|error|critical) *\] (.*)")


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """A folder that the servers' account can read."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def postgres_with_passwords(own_postgres) -> Postgres:
    """A server on which the role `bridge` has to give its password, SECRET, and may use the database `app`."""
    postgres: Postgres = own_postgres()
    query(postgres.dsn(), "CREATE ROLE bridge LOGIN PASSWORD %s", SECRET)
    postgres.create_database("app")
    rules = postgres.directory / "data" / "pg_hba.conf"
    rules.write_text(f"host all bridge 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
    query(postgres.dsn(), "SELECT pg_reload_conf()")
    wait_until(lambda: not _lets_in(postgres, "wrong"), what="the passwords to be asked for")
    return postgres


def _lets_in(postgres: Postgres, password: str) -> bool:
    try:
        with closing(psycopg2.connect(postgres.dsn("app", user="bridge"), password=password)):
            return True
    except psycopg2.OperationalError:
        return False


@pytest.fixture
def broker_with_passwords(own_broker, shared_directory: Path) -> Broker:
    """A broker that lets in the user `bridge` with SECRET."""
    passwords = shared_directory / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, "bridge", SECRET], check=True, capture_output=True)
    passwords.chmod(0o644)
    broker: Broker = own_broker(config_lines=["allow_anonymous false", f"password_file {passwords}"])
    return broker


Check = Callable[[Program], str]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Runs `check` with a program's settings; the one problem that it finds, on its one line."""

    def run(bridge: Program) -> str:
        ended = run_command(tmp_path, "check", **bridge.settings)
        assert ended.returncode == 2, ended.stdout
        assert python_complaints(ended.stderr) == []
        _assert_no_secret(ended.stdout)
        problems = [line for line in ended.stdout.splitlines() if line.startswith("PROBLEM")]
        assert len(problems) == 1, ended.stdout
        return problems[0]

    return run


def the_one_complaint(bridge: Program) -> str:
    """Start it, wait until it complains and is not ready for that reason, end it; the one line of complaint."""
    bridge.start().wait_until_up()
    line = bridge.wait_for_log(COMPLAINT.pattern)
    assert bridge.readyz()[0] == 503
    assert bridge.healthz() == 200
    assert bridge.running
    reasons = " ".join(bridge.readyz()[1])
    assert bridge.stop() == 0

    complaints = [found[2] for line in bridge.log.splitlines() if (found := COMPLAINT.search(line))]
    assert len(complaints) == 1, bridge.log
    _assert_no_secret(bridge.log + reasons)
    assert _settings_named(line) & _settings_named(reasons), reasons
    return line


def _settings_named(text: str) -> set[str]:
    return set(re.findall(r"(?:MQTT|DATABASE|DB|PG|HTTP)_?[A-Z_]+|GRANT|pg_hba", text))


def _assert_no_secret(text: str) -> None:
    assert "hunter2" not in text


# --- The database ---


def test_a_wrong_database_password_names_the_setting(make_bridge, check, postgres_with_passwords, broker):
    port = postgres_with_passwords.port
    wrong = f"postgresql://bridge:{SECRET_IN_A_URL}wrong@127.0.0.1:{port}/app"
    bridge = make_bridge(wrong, broker)

    for line in (check(bridge), the_one_complaint(bridge)):
        assert "password authentication failed" in line
        assert "DATABASE_URL" in line


def test_the_right_database_password_is_taken_with_special_characters(make_bridge, postgres_with_passwords, broker):
    query(postgres_with_passwords.dsn("app"), "GRANT CREATE ON DATABASE app TO bridge")
    query(postgres_with_passwords.dsn("app"), "GRANT CREATE ON SCHEMA public TO bridge")
    port = postgres_with_passwords.port

    bridge = make_bridge(f"postgresql://bridge:{SECRET_IN_A_URL}@127.0.0.1:{port}/app", broker)

    bridge.start().wait_until_ready()
    _assert_no_secret(bridge.log + str(bridge.get("/metrics")) + str(bridge.status()))


def test_an_unknown_database_host_names_the_setting(make_bridge, check, broker):
    bridge = make_bridge(f"postgresql://bridge:{SECRET_IN_A_URL}@no-such-host.invalid/app", broker)

    for line in (check(bridge), the_one_complaint(bridge)):
        assert "no-such-host.invalid" in line
        assert "Correct the host in DATABASE_URL" in line


def test_no_database_listening_names_the_setting(make_bridge, check, broker):
    port = free_port()
    bridge = make_bridge(f"postgresql://bridge:{SECRET_IN_A_URL}@127.0.0.1:{port}/app", broker)

    for line in (check(bridge), the_one_complaint(bridge)):
        assert str(port) in line
        assert "refused" in line
        assert "DATABASE_URL" in line


def test_an_unknown_database_names_the_setting(make_bridge, check, postgres_server, broker):
    bridge = make_bridge(postgres_server.dsn("no_such_database"), broker)

    for line in (check(bridge), the_one_complaint(bridge)):
        assert 'database "no_such_database" does not exist' in line
        assert "DATABASE_URL" in line


def test_tables_that_are_missing_and_must_not_be_made_are_named(make_bridge, check, database, broker, tmp_path):
    bridge = make_bridge(database, broker, DB_AUTO_CREATE="false")

    complaint = the_one_complaint(bridge)
    assert "table readings is missing" in complaint
    assert "mqtt-bridge schema --apply" in complaint
    assert "DB_AUTO_CREATE" in complaint

    ended = run_command(tmp_path, "check", **bridge.settings)
    assert ended.returncode == 2
    assert "table readings is missing" in ended.stdout
    assert "DB_AUTO_CREATE" in ended.stdout


def test_one_table_that_is_missing_is_named(make_bridge, check, database, broker, tmp_path):
    assert run_command(tmp_path, "schema", "--apply", DATABASE_URL=database).returncode == 0
    query(database, "DROP TABLE readings")
    bridge = make_bridge(database, broker, DB_AUTO_CREATE="false")

    for line in (check(bridge), the_one_complaint(bridge)):
        assert "table readings is missing" in line
        assert "mqtt-bridge schema --apply" in line
        assert "DB_AUTO_CREATE" in line


def test_a_table_that_vanishes_holds_the_messages_until_it_is_back(make_bridge, database, broker, site, tmp_path):
    bridge = make_bridge(database, broker).start().wait_until_ready()
    query(database, "DROP TABLE readings")

    with Publisher(broker, site) as publisher:
        publisher.publish(50)
        publisher.settle()
    wait_until(lambda: bridge.status()["state"] == "paused", what="it to pause")
    code, reasons = bridge.readyz()
    assert code == 503
    assert any("table readings is missing" in reason and "schema --apply" in reason for reason in reasons)
    assert run_command(tmp_path, "schema", "--apply", DATABASE_URL=database).returncode == 0

    assert wait_until_stored(database, publisher.published, bridge).exact
    bridge.wait_until_ready()


def test_a_grant_that_is_missing_is_printed(make_bridge, check, own_postgres, broker, tmp_path):
    postgres = own_postgres()
    assert run_command(tmp_path, "schema", "--apply", DATABASE_URL=postgres.dsn()).returncode == 0
    query(postgres.dsn(), "CREATE ROLE bridge LOGIN")
    query(postgres.dsn(), "GRANT USAGE ON SCHEMA mqtt_bridge TO bridge")
    query(postgres.dsn(), "GRANT ALL ON ALL TABLES IN SCHEMA mqtt_bridge TO bridge")
    bridge = make_bridge(postgres.dsn(user="bridge"), broker)

    grant = 'GRANT SELECT, INSERT ON readings TO "bridge"'
    for line in (check(bridge), the_one_complaint(bridge)):
        assert grant in line

    query(postgres.dsn(), grant)
    bridge.start().wait_until_ready()


def test_an_ordinary_role_that_may_not_create_is_told_the_grants(make_bridge, check, own_postgres, broker):
    postgres = own_postgres()
    query(postgres.dsn(), "CREATE ROLE bridge LOGIN")
    bridge = make_bridge(postgres.dsn(user="bridge"), broker)

    assert 'GRANT CREATE ON DATABASE "postgres" TO "bridge"' in check(bridge)
    assert "Grant what is missing" in the_one_complaint(bridge)


# --- The broker ---


def test_an_unknown_broker_host_names_the_setting(make_bridge, check, database):
    bridge = make_bridge(database, MQTT_HOST="no-such-host.invalid")

    for line in (check(bridge), the_one_complaint(bridge)):
        assert "'no-such-host.invalid' is not known. Correct MQTT_HOST." in line


def test_no_broker_listening_names_the_settings(make_bridge, check, database):
    port = free_port()
    bridge = make_bridge(database, MQTT_HOST="127.0.0.1", MQTT_PORT=port)

    for line in (check(bridge), the_one_complaint(bridge)):
        assert f"nothing listens at 127.0.0.1:{port}" in line
        assert "MQTT_HOST and MQTT_PORT" in line


def test_a_wrong_broker_password_names_the_settings(make_bridge, check, database, broker_with_passwords):
    user = {"MQTT_USERNAME": "bridge", "MQTT_PASSWORD": f"{SECRET}wrong"}
    for protocol in ("5", "3.1.1"):
        bridge = make_bridge(database, broker_with_passwords, MQTT_PROTOCOL=protocol, **user)

        for line in (check(bridge), the_one_complaint(bridge)):
            assert "ot authorized" in line
            assert "MQTT_USERNAME and MQTT_PASSWORD" in line


def test_the_right_broker_password_is_taken_from_a_file(make_bridge, database, broker_with_passwords, tmp_path):
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n")

    bridge = make_bridge(database, broker_with_passwords, MQTT_USERNAME="bridge", MQTT_PASSWORD_FILE=file)

    bridge.start().wait_until_ready()
    _assert_no_secret(bridge.log)


def test_a_broker_password_that_is_corrected_in_its_file_is_taken_up(
    make_bridge, database, broker_with_passwords, tmp_path
):
    file = tmp_path / "password"
    file.write_text("wrong")
    bridge = make_bridge(database, broker_with_passwords, MQTT_USERNAME="bridge", MQTT_PASSWORD_FILE=file)
    bridge.start()
    bridge.wait_for_log("MQTT_PASSWORD")

    file.write_text(SECRET)

    bridge.wait_until_ready()


@pytest.mark.parametrize(("protocol", "reason"), [("5", 0x87), ("3.1.1", 0x80)])
def test_a_subscription_that_the_broker_refuses_names_the_topic(make_bridge, check, database, site, protocol, reason):
    with ScriptedBroker() as broker:
        broker.subscribe_reason = reason
        bridge = make_bridge(database, broker, MQTT_PROTOCOL=protocol)

        for line in (check(bridge), the_one_complaint(bridge)):
            assert f"refused to subscribe to {site}/+/telemetry" in line
            assert "MQTT_TOPICS" in line


REFUSALS = {
    0x84: "MQTT_PROTOCOL",
    0x85: "MQTT_CLIENT_ID",
    0x86: "MQTT_PASSWORD",
    0x87: "MQTT_CLIENT_ID",
    0x8A: "banned",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_a_broker_that_refuses_the_connection_is_quoted(make_bridge, check, database, reason):
    with ScriptedBroker(answer=Answer(reason=reason)) as broker:
        bridge = make_bridge(database, broker)

        for line in (check(bridge), the_one_complaint(bridge)):
            assert "the broker refused the connection" in line
            assert REFUSALS[reason] in line


def test_something_that_is_no_broker_names_the_settings(make_bridge, check, database):
    port = int(query(database, "SHOW port")[0][0])
    bridge = make_bridge(database, MQTT_HOST="127.0.0.1", MQTT_PORT=port)

    for line in (check(bridge), the_one_complaint(bridge)):
        assert "MQTT_PORT" in line


# --- TLS ---


class Certificates:
    """An authority, and what it has signed for 127.0.0.1, as files."""

    def __init__(self, directory: Path) -> None:
        self.ca, self.cert, self.key = (directory / name for name in ("ca.pem", "server.pem", "server.key"))
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca)
        server = authority.issue_cert("127.0.0.1", "localhost")
        server.private_key_pem.write_to_path(self.key)
        for blob in server.cert_chain_pems:
            blob.write_to_path(self.cert, append=True)
        for path in (self.ca, self.cert, self.key):
            path.chmod(0o644)

    @property
    def config_lines(self) -> list[str]:
        return [f"cafile {self.ca}", f"certfile {self.cert}", f"keyfile {self.key}"]


@pytest.fixture
def tls_port(own_broker, shared_directory: Path) -> tuple[int, Certificates]:
    """A port of a broker that speaks TLS, and the files."""
    certificates, port = Certificates(shared_directory), free_port()
    own_broker(config_lines=[f"listener {port} 127.0.0.1", *certificates.config_lines])
    return port, certificates


def test_a_certificate_of_an_unknown_authority_names_the_setting(make_bridge, check, database, tls_port):
    bridge = make_bridge(database, MQTT_HOST="127.0.0.1", MQTT_PORT=tls_port[0], MQTT_TLS="true")

    for line in (check(bridge), the_one_complaint(bridge)):
        assert "certificate" in line
        assert "MQTT_TLS_CA" in line


def test_the_right_authority_is_trusted(make_bridge, database, tls_port):
    port, certificates = tls_port

    bridge = make_bridge(database, MQTT_HOST="127.0.0.1", MQTT_PORT=port, MQTT_TLS="true", MQTT_TLS_CA=certificates.ca)

    bridge.start().wait_until_ready()


def test_tls_with_a_plain_port_names_the_settings(make_bridge, check, database, broker):
    bridge = make_bridge(database, broker, MQTT_TLS="true")

    for line in (check(bridge), the_one_complaint(bridge)):
        assert "MQTT_PORT" in line
        assert "TLS" in line


def test_a_tls_port_without_tls_names_the_settings(make_bridge, check, database, tls_port):
    bridge = make_bridge(database, MQTT_HOST="127.0.0.1", MQTT_PORT=tls_port[0])

    for line in (check(bridge), the_one_complaint(bridge)):
        assert "MQTT_PORT" in line
        assert "MQTT_TLS" in line


# --- Settings ---


def test_a_port_in_use_ends_run_at_once_with_the_setting(make_bridge, check, database, broker):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        bridge: Program = make_bridge(database, broker, HTTP_PORT=port)

        assert f"HTTP_PORT: 127.0.0.1:{port}" in check(bridge)
        assert bridge.start().wait() == 2
        assert f"HTTP_PORT={port}: Another program listens" in bridge.log
        assert len(bridge.log.strip().splitlines()) == 2


WRONG = {
    "MQTT_PORT": "eighteen",
    "MQTT_QOS": "2",
    "BRIDGE_WORKERS": "0",
    "LOG_LEVEL": "loud",
    "MQTT_TLS": "perhaps",
    "BRIDGE_QUEUE_SIZE": "40000",
    "MQTT_TOPICS": "a/{b",
    "DATABASE_URL": f"postgresql://bridge:{SECRET}@host:port/app",
}


@pytest.mark.parametrize("command", ["run", "check", "status"])
def test_every_wrong_setting_is_named_at_once(tmp_path, command):
    ended = run_command(tmp_path, command, **WRONG, MQTT_PASSWORD=SECRET)

    output = ended.stdout + ended.stderr
    assert ended.returncode == 2
    for name, value in WRONG.items():
        assert f"{name}=" in output
        assert name == "DATABASE_URL" or value in output
    assert "MQTT_PASSWORD" not in output
    _assert_no_secret(output)
    assert "Traceback" not in output


def test_a_misspelt_setting_is_pointed_out(make_bridge, database, broker):
    bridge = make_bridge(database, broker, MQTT_TOPIC=SECRET).start().wait_until_ready()

    assert "MQTT_TOPIC: There is no such setting; it has no effect. Did you mean MQTT_TOPICS?" in bridge.log
    _assert_no_secret(bridge.log)


@pytest.mark.parametrize("level", ["debug", "info"])
def test_no_secret_is_in_any_log(make_bridge, postgres_with_passwords, broker_with_passwords, site, level):
    query(postgres_with_passwords.dsn("app"), "GRANT CREATE ON DATABASE app TO bridge")
    query(postgres_with_passwords.dsn("app"), "GRANT CREATE ON SCHEMA public TO bridge")
    url = f"postgresql://bridge:{SECRET_IN_A_URL}@127.0.0.1:{postgres_with_passwords.port}/app"
    bridge: Program = make_bridge(
        url,
        broker_with_passwords,
        MQTT_USERNAME="bridge",
        MQTT_PASSWORD=SECRET,
        LOG_LEVEL=level,
        LOG_FORMAT="json",
    )
    bridge.start().wait_until_ready()

    postgres_with_passwords.restart("immediate")
    broker_with_passwords.restart()
    wait_until(lambda: bridge.status()["broker"]["reconnects"], timeout_s=30, what="it to reconnect")
    bridge.wait_until_ready()
    assert bridge.stop() == 0

    _assert_no_secret(bridge.log)


def make_two(make_bridge: MakeBridge, database: str, broker: Broker) -> tuple[Program, Program]:
    settings = {"MQTT_CLIENT_ID": "the-same-for-both"}
    return make_bridge(database, broker, **settings), make_bridge(database, broker, **settings)


def test_a_bridge_whose_client_id_is_taken_over_ends_with_3_and_says_so(make_bridge, database, broker, site):
    first, second = make_two(make_bridge, database, broker)
    first.start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.begin()
        publisher.go_on(500)
        second.start().wait_until_up()
        assert first.wait() == 3
        publisher.go_on(500)
        publisher.end()

    second.wait_until_ready()
    assert wait_until_stored(database, publisher.published, second).exact
    assert "another process has taken over this client id" in first.log
