"""The command line, as people and scripts use it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from dotenv import dotenv_values

from mqtt_bridge import __version__
from mqtt_bridge.settings import NAMES
from mqtt_bridge.tools.embedded import free_port
from tests.acceptance.traffic import Publisher, query, wait_until_stored
from tests.program import run_command

COMMANDS = ("run", "demo", "check", "explain", "simulate", "schema", "status", "retire")


def test_the_version_is_printed(tmp_path):
    ended = run_command(tmp_path, "--version")

    assert (ended.returncode, ended.stdout) == (0, f"mqtt-bridge, version {__version__}\n")


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_has_help_with_examples(tmp_path, command, option):
    ended = run_command(tmp_path, *command, option)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Examples:" in ended.stdout
    assert re.search(r"^ +(?:\S+=\S+ )*mqtt-bridge " + "".join(command), ended.stdout, re.MULTILINE)


def test_the_list_of_commands_is_complete(tmp_path):
    ended = run_command(tmp_path, "--help")

    listed = re.findall(r"^  ([a-z-]+)  ", ended.stdout.partition("Commands:")[2], re.MULTILINE)
    assert set(COMMANDS) <= set(listed)


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["run", "--no-such-option"], ["explain"], ["simulate", "-1"]]
)
def test_what_cannot_be_meant_ends_with_2_and_the_usage(tmp_path, arguments):
    ended = run_command(tmp_path, *arguments)

    assert ended.returncode == 2
    assert "Usage:" in ended.stderr
    assert "Traceback" not in ended.stderr


# --- explain ---


def explained(tmp_path: Path, *arguments: str, stdin: bytes = b"", **settings: object) -> list[dict]:
    ended = run_command(tmp_path, "explain", *arguments, "--json", stdin=stdin, **settings)
    assert (ended.returncode, ended.stderr) == (0, "")
    return [json.loads(line) for line in ended.stdout.splitlines()]


STORED = {
    "topic": "devices/d1/telemetry",
    "outcome": "stored",
    "route": "default",
    "table": "readings",
    "rows": [
        {
            "time": "2026-01-01T00:00:00Z",
            "device": "d1",
            "metric": "temperature",
            "value": 21.5,
            "value_text": None,
        }
    ],
    "error": None,
    "stage": None,
}
PAYLOAD = '{"temperature": 21.5, "ts": 1767225600}'


def test_explain_takes_its_payload_as_text_from_standard_input_or_from_a_file(tmp_path):
    (tmp_path / "payload.json").write_text(PAYLOAD)
    topic = "devices/d1/telemetry"

    assert explained(tmp_path, topic, PAYLOAD) == [STORED]
    assert explained(tmp_path, topic, "-", stdin=PAYLOAD.encode()) == [STORED]
    assert explained(tmp_path, topic, "@payload.json") == [STORED]


def test_explain_shows_a_person_the_rows(tmp_path):
    ended = run_command(tmp_path, "explain", "devices/d1/telemetry", PAYLOAD)

    assert ended.returncode == 0
    assert "is stored by route default in readings, 1 row:" in ended.stdout
    assert re.search(r"2026-01-01T00:00:00Z +d1 +temperature +21\.5 +-", ended.stdout)


def test_explain_says_why_a_message_is_a_dead_letter_or_ignored(tmp_path):
    [dead] = explained(tmp_path, "devices/d1/telemetry", "-", stdin=b"\xff")
    [elsewhere] = explained(tmp_path, "somewhere/else", "1")
    [ignored] = explained(tmp_path, "devices/d1/telemetry")

    assert (dead["outcome"], dead["stage"]) == ("dead_lettered", "decode")
    assert "not UTF-8" in dead["error"]
    assert (elsewhere["outcome"], elsewhere["stage"]) == ("dead_lettered", "route")
    assert (ignored["outcome"], ignored["error"]) == ("ignored", "no_values")


def test_explain_reads_a_tape(tmp_path):
    (tmp_path / "tape.jsonl").write_text(
        '{"t": 0, "topic": "devices/d1/telemetry", "payload": "1", "qos": 1, "retain": false, "properties": {}}\n'
        '{"t": 0.5, "topic": "devices/d1/telemetry", "payload_b64": "//4="}\n'
        "\n"
        '{"t": 1, "topic": "devices/d1/telemetry", "payload": "{}"}\n'
    )

    explanations = explained(tmp_path, "--tape", "tape.jsonl")

    assert [explanation["outcome"] for explanation in explanations] == ["stored", "dead_lettered", "ignored"]


def test_explain_says_what_is_wrong_with_a_tape_or_a_file(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"topic": "a", "payload": "1"}\n{"topic": 7}\n')

    broken = run_command(tmp_path, "explain", "--tape", "broken.jsonl", "--json")
    missing = run_command(tmp_path, "explain", "a", "@no-such-file")
    no_tape = run_command(tmp_path, "explain", "--tape", "no-such-tape")
    both = run_command(tmp_path, "explain", "a", "--tape", "broken.jsonl")

    assert (broken.returncode, missing.returncode, no_tape.returncode, both.returncode) == (1, 2, 2, 2)
    assert "Line 2 of the tape" in broken.stderr
    assert "no-such-file" in missing.stderr
    assert "no-such-tape" in no_tape.stderr
    assert all("Traceback" not in ended.stderr for ended in (broken, missing, no_tape, both))


def test_what_explain_says_is_what_is_stored(make_bridge, database, broker, site, tmp_path):
    bridge = make_bridge(database, broker).start().wait_until_ready()
    payload = '{"a": {"b": [1, "x", true]}, "big": 9007199254740993, "ts": "2026-01-01T12:00:00+02:00", "n": null}'

    with Publisher(broker, site) as publisher:
        publisher.send(f"{site}/d1/telemetry", payload.encode())
        publisher.settle()
    bridge.wait_for_outcomes(1)

    [explanation] = explained(tmp_path, f"{site}/d1/telemetry", payload, MQTT_TOPICS=f"{site}/{{device}}/telemetry")
    stored = query(
        database,
        "SELECT to_char(time AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), device, metric, value, value_text"
        " FROM readings ORDER BY metric",
    )
    assert sorted((tuple(row.values()) for row in explanation["rows"]), key=lambda row: row[2]) == stored
    assert len(stored) == 4


# --- schema ---


def test_an_owner_can_apply_what_schema_prints_and_run_needs_no_more(make_bridge, database, broker, site, tmp_path):
    printed = run_command(tmp_path, "schema")
    assert (printed.returncode, printed.stderr) == (0, "")
    query(database, printed.stdout)

    bridge = make_bridge(database, broker, DB_AUTO_CREATE="false").start().wait_until_ready()
    with Publisher(broker, site) as publisher:
        publisher.publish(10)
        publisher.settle()

    assert wait_until_stored(database, publisher.published, bridge).exact


def test_a_role_with_no_more_than_the_printed_grants_can_run(make_bridge, own_postgres, broker, site, tmp_path):
    postgres = own_postgres()
    printed = run_command(tmp_path, "schema").stdout
    query(postgres.dsn(), printed)
    query(postgres.dsn(), "CREATE ROLE bridge LOGIN")
    grants = re.findall(r"^-- (GRANT .*;)$", printed, re.MULTILINE)
    query(postgres.dsn(), "".join(grants))

    bridge = make_bridge(postgres.dsn(user="bridge"), broker, DB_AUTO_CREATE="false").start().wait_until_ready()
    with Publisher(broker, site) as publisher:
        publisher.publish(10)
        publisher.send(f"{site}/d/telemetry", b"\xff")
        publisher.settle()
    messages = bridge.wait_for_outcomes(11)

    assert len(grants) >= 5
    assert (messages["stored"], messages["dead_lettered"]) == (10, 1)
    assert bridge.stop() == 0


def test_schema_apply_creates_what_is_missing_and_then_nothing(tmp_path, database):
    first = run_command(tmp_path, "schema", "--apply", DATABASE_URL=database)
    second = run_command(tmp_path, "schema", "--apply", DATABASE_URL=database)

    assert (first.returncode, second.returncode) == (0, 0)
    assert "created: readings" in first.stdout
    assert second.stdout == "nothing was missing\n"
    assert query(database, "SELECT count(*) FROM readings") == [(0,)]


def test_schema_apply_says_why_it_cannot(tmp_path, postgres_server):
    ended = run_command(tmp_path, "schema", "--apply", DATABASE_URL=postgres_server.dsn("no_such_database"))

    assert ended.returncode == 1
    assert 'database "no_such_database" does not exist' in ended.stderr
    assert "DATABASE_URL" in ended.stderr
    assert "Traceback" not in ended.stderr


# --- status ---


def test_status_shows_a_running_bridge(make_bridge, database, broker, tmp_path):
    bridge = make_bridge(database, broker).start().wait_until_ready()

    for_people = run_command(tmp_path, "status", **bridge.settings)
    as_json = run_command(tmp_path, "status", "--json", **bridge.settings)

    assert (for_people.returncode, as_json.returncode) == (0, 0)
    assert f"client id {bridge.settings['MQTT_CLIENT_ID']}: running" in for_people.stdout
    assert json.loads(as_json.stdout).keys() == bridge.status().keys()


def test_status_says_that_no_bridge_runs(tmp_path):
    ended = run_command(tmp_path, "status", HTTP_PORT=1)

    assert ended.returncode == 1
    assert "No bridge answers" in ended.stderr
    assert "HTTP_PORT" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_status_gives_the_token(make_bridge, database, broker, tmp_path):
    bridge = make_bridge(database, broker, HTTP_TOKEN="s3cret").start().wait_until_ready()

    with_it = run_command(tmp_path, "status", **bridge.settings)
    without = run_command(tmp_path, "status", HTTP_PORT=bridge.settings["HTTP_PORT"])

    assert with_it.returncode == 0
    assert without.returncode == 1
    assert "HTTP_TOKEN" in without.stderr
    assert "s3cret" not in with_it.stdout + without.stderr + bridge.log


# --- simulate ---


def test_what_is_simulated_is_stored(make_bridge, database, broker, site, tmp_path):
    bridge = make_bridge(database, broker).start().wait_until_ready()

    ended = run_command(
        tmp_path,
        *("simulate", "--devices", "20", "--count", "200", "--interval", "0.01", "--garbage", "0.1"),
        *("--topic", f"{site}/{{device}}/telemetry"),
        **bridge.settings,
    )
    messages = bridge.wait_for_outcomes(200)

    assert ended.returncode == 0, ended.stderr
    assert "200" in ended.stdout
    assert messages["stored"] + messages["dead_lettered"] + messages["ignored"] == 200
    assert messages["dead_lettered"] > 0


def test_simulate_says_that_there_is_no_broker(tmp_path):
    ended = run_command(tmp_path, "simulate", "--count", "1", MQTT_HOST="127.0.0.1", MQTT_PORT=1)

    assert ended.returncode == 1
    assert "MQTT_PORT" in ended.stderr
    assert "Traceback" not in ended.stderr


# --- check ---


def test_check_finds_nothing_where_all_is_well(database, broker, tmp_path):
    ended = run_command(
        tmp_path, "check", DATABASE_URL=database, MQTT_HOST=broker.host, MQTT_PORT=broker.port, HTTP_PORT=0
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "0 problems, 0 warnings" in ended.stdout
    assert query(database, "SELECT to_regclass('readings')") == [(None,)]


def test_check_leaves_a_running_bridge_alone(make_bridge, database, broker, site, tmp_path):
    bridge = make_bridge(database, broker).start().wait_until_ready()

    ended = run_command(tmp_path, "check", **bridge.settings)
    with Publisher(broker, site) as publisher:
        publisher.publish(10)
        publisher.settle()

    assert ended.returncode == 0, ended.stdout
    assert "a bridge is running at" in ended.stdout
    assert wait_until_stored(database, publisher.published, bridge).exact
    assert bridge.status()["broker"]["reconnects"] == 0


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_check_leaves_the_session_alone_that_the_broker_gives_it_for_its_user_name(
    make_bridge, database, own_broker, site, tmp_path, protocol
):
    port = free_port()
    broker = own_broker(config_lines=[f"listener {port} 127.0.0.1", "use_username_as_clientid true"])
    user = {"MQTT_PORT": port, "MQTT_CLIENT_ID": "bridge", "MQTT_USERNAME": "bridge", "MQTT_PROTOCOL": protocol}
    bridge = make_bridge(database, broker, **user).start().wait_until_ready()
    assert bridge.stop() == 0
    with Publisher(broker, site) as publisher:
        publisher.publish(10)
        publisher.settle()

        ended = run_command(tmp_path, "check", **bridge.settings)
        bridge.start().wait_until_ready()

        assert ended.returncode == 0, ended.stdout
        assert "the broker makes the user name the client id" in ended.stdout
        assert wait_until_stored(database, publisher.published, bridge).exact


def test_check_offline_reaches_no_server(tmp_path):
    good = run_command(
        tmp_path, "check", "--offline", MQTT_HOST="no-such-host.invalid", DATABASE_URL="postgresql://x@y/z"
    )
    bad = run_command(tmp_path, "check", "--offline", MQTT_TOPICS="a/{b")

    assert (good.returncode, bad.returncode) == (0, 2)
    assert "devices/+/telemetry" in good.stdout
    assert "MQTT_TOPICS=a/{b" in bad.stdout


def test_check_warns_of_a_server_that_may_lose_what_it_has_committed(own_postgres, broker, tmp_path):
    postgres = own_postgres(settings={"fsync": "off"})

    ended = run_command(tmp_path, "check", DATABASE_URL=postgres.dsn(), MQTT_HOST=broker.host, MQTT_PORT=broker.port)

    assert ended.returncode == 0
    assert "fsync=off" in ended.stdout


def test_settings_are_read_from_a_dotenv_file(tmp_path, make_bridge, database, broker):
    bridge = make_bridge(database, broker)
    (tmp_path / "bridge-0" / ".env").write_text("".join(f"{name}={value}\n" for name, value in bridge.settings.items()))
    port = bridge.settings["HTTP_PORT"]
    bridge.settings = {}
    bridge.start()
    bridge.settings = {"HTTP_PORT": port}

    bridge.wait_until_ready()


def test_the_example_of_a_dotenv_file_is_valid_and_complete(tmp_path):
    example = (Path(__file__).parents[2] / ".env.example").read_text()
    (tmp_path / ".env").write_text(example)

    ended = run_command(tmp_path, "check", "--offline")

    assert ended.returncode == 0, ended.stdout
    uncommented = re.sub(r"^#(?=[A-Z_]+=)", "", example, flags=re.MULTILINE)
    assert set(NAMES) - dotenv_values(stream=io.StringIO(uncommented)).keys() == set()


def test_at_log_level_error_a_bridge_that_is_well_says_nothing(make_bridge, database, broker, site):
    bridge = make_bridge(database, broker, LOG_LEVEL="error").start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.publish(10)
        publisher.settle()
    bridge.wait_for_outcomes(10)

    assert bridge.stop() == 0
    assert bridge.log == ""
