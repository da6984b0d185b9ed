"""`mqtt-bridge dead-letters`, against PostgreSQL: what is shown, what is stored again, what is deleted."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import psycopg2
import pytest

from mqtt_bridge import dead_letters, schema
from mqtt_bridge.connections import BridgeConnection
from mqtt_bridge.dead_letters import Selection
from mqtt_bridge.errors import MessageError
from mqtt_bridge.model import DeadLetter, Message, Tally
from mqtt_bridge.routes import Router, default_routes
from mqtt_bridge.tools.dead_letter_office import REQUEUE_CHUNK, DeadLetterOffice
from mqtt_bridge.topics import covers
from tests.program import command_line, environment, run_command
from tests.waiting import wait_until

TOPICS = "devices/{device}/telemetry"
NOW = datetime.now(UTC).replace(microsecond=123456)
GATE = 4711
"""An advisory lock: while the test has it, whoever meets the gate waits."""


@dataclass
class Office:
    """A database with dead letters, and the commands on it."""

    database: str
    directory: Path
    connection: BridgeConnection

    @property
    def settings(self) -> dict[str, str]:
        return {"DATABASE_URL": self.database, "MQTT_TOPICS": TOPICS}

    def run(self, *arguments: object, code: int = 0, **settings: object) -> subprocess.CompletedProcess[str]:
        ended = run_command(self.directory, "dead-letters", *map(str, arguments), **(self.settings | settings))
        assert "Traceback" not in ended.stderr
        assert "Warning:" not in ended.stderr
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended

    @contextmanager
    def started(self, *arguments: object, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
        """A command that runs meanwhile; killed at the end, whatever happens."""
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(
            command_line("dead-letters", *map(str, arguments)),
            cwd=self.directory,
            env=environment(**self.settings),
            **(pipes | streams),
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def listed(self, *arguments: object) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.run("list", "--json", *arguments).stdout.splitlines()]

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    # -- what is there

    def add(
        self,
        topic: str = "devices/d1/telemetry",
        payload: bytes = b'{"t": 21.5}',
        *,
        stage: str = "store",
        error: str = "refused",
        at: datetime = NOW,
        route: str | None = None,
        properties: str | None = None,
        requeued: bool = False,
    ) -> int:
        ((letter_id,),) = self.query(
            "INSERT INTO mqtt_bridge.dead_letters (received_at, topic, payload, qos, retain, properties, route, stage,"
            " error, client_id, requeued_at) VALUES (%s, %s, %s, 1, false, %s, %s, %s, %s, 'mqtt-bridge', %s)"
            " RETURNING id",
            *(at, topic, payload, properties, route, stage, error, NOW if requeued else None),
        )
        return int(letter_id)

    def add_as_the_bridge_does(self, topic: bytes, payload: bytes) -> None:
        """What the routes refuse, in the row that the bridge would write."""
        message = Message(topic, payload, 1, False, int(NOW.timestamp() * 1e6))
        with pytest.raises(MessageError) as caught:
            Router(default_routes(TOPICS)).translate(message, Tally())
        letter = DeadLetter(message, caught.value.route, caught.value.stage, caught.value.reason)
        names = ", ".join(dead_letters.TABLE.columns)
        values = list(dead_letters.row(letter, "mqtt-bridge"))
        self.query(
            f"INSERT INTO mqtt_bridge.dead_letters ({names}) VALUES ({', '.join(['%s'] * len(values))})",
            *(NOW, *values[1:]),
        )

    def add_many(self, count: int) -> None:
        """Letters of `count` devices, d1 and so on, whose reading `n` is the number of the device."""
        self.query(
            "INSERT INTO mqtt_bridge.dead_letters (received_at, topic, payload, qos, retain, stage, error, client_id)"
            " SELECT now(), 'devices/d' || n || '/telemetry', convert_to('{\"n\": ' || n || '}', 'UTF8'), 1, false,"
            " 'store', 'refused', 'mqtt-bridge' FROM generate_series(1, %s) AS n",
            count,
        )

    def readings(self) -> list[tuple[Any, ...]]:
        return self.query("SELECT time, device, metric, value, value_text FROM readings ORDER BY device, metric")

    def waiting(self) -> list[int]:
        """Letters that have not been requeued."""
        return [
            i for (i,) in self.query("SELECT id FROM mqtt_bridge.dead_letters WHERE requeued_at IS NULL ORDER BY id")
        ]

    def count(self) -> int:
        return int(self.query("SELECT count(*) FROM mqtt_bridge.dead_letters")[0][0])

    def assert_each_is_stored_once(self, count: int) -> None:
        stored = Counter(device for (device,) in self.query("SELECT device FROM readings"))
        assert stored == {f"d{n}": 1 for n in range(1, count + 1)}
        assert self.waiting() == []

    # -- a gate

    def set_gate(self, table: str, event: str, condition: str) -> None:
        """Whoever does this to a row of `table` waits while the gate is closed."""
        self.query(
            "CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN PERFORM pg_advisory_xact_lock_shared({GATE}); RETURN NEW; END $$"
        )
        self.query(
            f"CREATE TRIGGER gate AFTER {event} ON {table} FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION gate()"
        )

    @contextmanager
    def closed_gate(self) -> Iterator[Callable[[], object]]:
        """The gate is closed until what this yields is called, or the block ends."""
        self.query(f"SELECT pg_advisory_lock({GATE})")
        try:
            yield lambda: self.query("SELECT pg_advisory_unlock_all()")
        finally:
            self.query("SELECT pg_advisory_unlock_all()")

    def wait_for_somebody_at_the_gate(self, count: int = 1) -> None:
        def are_there() -> bool:
            ((waiting,),) = self.query(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted", GATE
            )
            return bool(waiting == count)

        wait_until(are_there, timeout_s=30, what=f"{count} at the gate")

    def wait_until_alone(self) -> None:
        statement = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        wait_until(lambda: self.query(statement) == [(1,)], timeout_s=30, what="the other sessions to end")


@pytest.fixture
def office(database: str, tmp_path: Path) -> Iterator[Office]:
    with closing(psycopg2.connect(database, connection_factory=BridgeConnection)) as connection:
        schema.apply(connection)
        yield Office(database, tmp_path, connection)


# --- list ---


def test_the_list_begins_with_the_newest_and_names_topic_stage_error_age_and_size(office):
    old = office.add(
        "devices/d1/telemetry", b"x" * 2048, error="the first line\nthe second", at=NOW - timedelta(days=3)
    )
    new = office.add("devices/d2/telemetry", b"abc", stage="decode", error="not JSON", at=NOW - timedelta(hours=2))

    lines = office.run("list").stdout.splitlines()

    assert [line.split()[0] for line in lines] == ["id", str(new), str(old)]
    assert re.search(r"2 h \d+ min +decode +3 B +no +devices/d2/telemetry +not JSON$", lines[1])
    assert re.search(r"3 d 0 h +store +2.0 KiB +no +devices/d1/telemetry +the first line$", lines[2])


def test_an_empty_list_says_so(office):
    assert office.run("list").stdout == "no dead letters\n"
    assert office.run("list", "--stage", "route").stdout == "no dead letters meet these conditions\n"
    assert office.run("list", "--json").stdout == ""


def test_what_devices_send_cannot_steer_the_terminal(office):
    letter = office.add("devices/\x1b[2J/telemetry", b"\x1b[31mred", error="bell \x07", properties='{"a": "\x9b1m"}')

    for command in (["list"], ["list", "--summary"], ["show", letter], ["requeue", "--dry-run"]):
        output = office.run(*command).stdout
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", output)


FILTERS = {
    "--since 90m": ["new"],
    "--since 1d": ["cold", "new"],
    f"--since {(NOW - timedelta(hours=5)).isoformat()}": ["cold", "new"],
    "--until 1d": ["hall", "odd"],
    f"--until {(NOW - timedelta(days=10)):%Y-%m-%d}": ["odd"],
    "--since 4d --until 1d": ["hall"],
    "--topic devices/+/telemetry": ["cold", "new"],
    "--topic devices/cold/telemetry": ["cold"],
    "--topic devices/#": ["cold", "new"],
    "--topic +/+": ["hall"],
    "--stage route": ["hall", "odd"],
    "--error JSON": ["new"],
    "--error json": ["new"],
    "--error 100%": ["odd"],
    "--route telemetry": ["new"],
    "--requeued": ["cold"],
    "--not-requeued": ["hall", "new", "odd"],
    "--stage route --topic hall/# --not-requeued": ["hall"],
    "--limit 2": ["cold", "new"],
    "--stage decode --requeued": [],
}


@pytest.fixture
def sorted_office(office) -> tuple[Office, dict[int, str]]:
    ids = {
        "new": office.add("devices/new/telemetry", stage="decode", error="not JSON: {", route="telemetry"),
        "cold": office.add("devices/cold/telemetry", at=NOW - timedelta(hours=2), requeued=True),
        "hall": office.add("hall/3", stage="route", error="No route.", at=NOW - timedelta(days=3)),
        "odd": office.add("$x/a\\b.c/(d", stage="route", error="100% wrong", at=NOW - timedelta(days=30)),
    }
    return office, {letter_id: name for name, letter_id in ids.items()}


@pytest.mark.parametrize("arguments", FILTERS, ids=[re.sub(r"\d{4}-\S+", "DATE", arguments) for arguments in FILTERS])
def test_a_filter_selects_what_meets_it(sorted_office, arguments):
    office, names = sorted_office

    found = [names[letter["id"]] for letter in office.listed(*arguments.split())]

    assert sorted(found) == FILTERS[arguments]


TOPIC_FILTERS = [
    *("#", "+", "+/+", "a/#", "a/+", "a/+/c", "+/b/#", "/", "/+", "+/", "a//c", "$SYS/#", "$SYS/+/x", "a.b/+", "a/b"),
    *("a b/#", "(a|b)/#", "[ab]/+", "a\\d/+", "ä/+", "^a/#", "a$/#", "a*/+", "a?/#", "a-b/~/&/#"),
]
FILTERED_TOPICS = [
    *("a", "a/", "a/b", "a/b/c", "a/b/c/d", "a//c", "/", "/a", "b/b", "b/b/c", "$SYS", "$SYS/a/x", "$SYS/a", "a.b/c"),
    *("axb/c", "a b/c", "(a|b)/c", "[ab]/c", "a\\d/c", "a1/c", "ä/ö", "^a/b", "a$/b", "a*/b", "a?/b", "aa/b"),
    *("a\nb/c", "a/b\nc", "a-b/~/&/x"),
]


def test_the_database_reads_topic_filters_as_the_bridge_does(office):
    for topic in FILTERED_TOPICS:
        office.add(topic)

    for topic_filter in TOPIC_FILTERS:
        found = dead_letters.newest(office.connection, Selection(topic_filter=topic_filter), limit=100)

        expected = [topic for topic in FILTERED_TOPICS if covers(topic_filter, topic)]
        assert sorted(letter.topic for letter in found) == sorted(expected), topic_filter


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("list --since yesterday", "'yesterday' is no time"),
        ("list --until 5y", "'5y' is no time"),
        ("list --topic a/#/b", "must be the last level"),
        ("list --topic a/{x...}/b", "is a pattern"),
        ("list --stage nowhere", "nowhere"),
        ("list --limit 0", "--limit"),
        ("requeue --id one", "--id"),
        ("purge --older-than soon", "'soon' is not an age"),
        ("show seventeen", "seventeen"),
    ],
)
def test_a_wrong_option_ends_with_2_and_is_named(office, arguments, complaint):
    assert complaint in office.run(*arguments.split(), code=2).stderr


ERRORS = {
    "The payload is not JSON: line 1 column 5 (char 4).": "The payload is not JSON: line # column #.",
    "It is not UTF-8 (byte 0x8b at position 1).": "It is not UTF-8.",
    "byte 0x8b at 7": "byte # at #",
    'violates "c1" (Failing row contains (1, (2))).': 'violates "c1".',
    "too long for varchar(3)": "too long for varchar(#)",
    "one\ntwo (3).": "one",
    "": "",
}


def test_errors_are_of_one_kind_that_differ_in_numbers_and_details_only(office):
    for error in ERRORS:
        office.add(error=error)

    groups = dead_letters.summary(office.connection, Selection(), limit=100)

    assert {group.error for group in groups} == set(ERRORS.values())
    assert [dead_letters.kind(error) for error in ERRORS] == list(ERRORS.values())


def test_the_summary_counts_by_stage_and_error(office):
    for number in range(5):
        office.add(f"devices/d{number % 2}/telemetry", stage="decode", error=f"bad byte at position {number}.")
    office.add(stage="route", error="No route.", requeued=True)

    lines = office.run("list", "--summary").stdout.splitlines()
    first, second = office.listed("--summary")

    assert re.search(r"^ +5 +0 +2 .* decode +bad byte at position #\.$", lines[1])
    assert re.search(r"^ +1 +1 +1 .* route +No route\.$", lines[2])
    assert (first["letters"], first["requeued"], first["topics"], first["stage"]) == (5, 0, 2, "decode")
    assert (second["letters"], second["requeued"], second["error"]) == (1, 1, "No route.")


# --- show ---


def test_show_tells_everything_and_what_would_become_of_it_now(office):
    letter = office.add(
        payload=b'{"t": 21.5,\n "s": "ok"}', error="refused", properties='{"ContentType": "json"}', route="old"
    )

    output = office.run("show", letter).stdout

    for fact in ("devices/d1/telemetry", f"{NOW:%Y-%m-%dT%H:%M:%S.123456Z}", "ContentType = json", "store, route old"):
        assert fact in output
    assert 'payload, 23 B:\n  {"t": 21.5,\n   "s": "ok"}\n' in output
    assert "is stored by route default in readings, 2 rows:" in output
    assert re.search(r"\(arrival\) +d1 +t +21.5", output)


def test_a_payload_that_is_no_text_is_shown_in_hex(office):
    for payload in (b"\xff\x00AB", b"\x00\x01AB"):
        output = office.run("show", office.add(payload=payload)).stdout

        assert re.search(rf"00000000  {payload[:2].hex(' ')} 41 42 +\.\.AB\n", output)


def test_of_a_long_payload_the_beginning_is_shown(office):
    text = office.run("show", office.add(payload=b'"' + b"x" * 10_000 + b'"')).stdout
    dump = office.run("show", office.add(payload=b"\xff" * 10_000)).stdout

    assert "payload, 9.8 KiB (the first 4.0 KiB):" in text
    assert text.partition("by today's")[0].count("x") < 4_200
    assert "00000ff0  ff" in dump
    assert "00001000" not in dump


def test_show_as_json_holds_the_whole_payload(office):
    text, binary = office.add(payload=b'{"t": 1}'), office.add(payload=b"\xff\x00")

    shown_text = json.loads(office.run("show", text, "--json").stdout)
    shown_binary = json.loads(office.run("show", binary, "--json").stdout)

    assert shown_text["payload"] == '{"t": 1}'
    assert shown_text["explanation"]["rows"][0]["value"] == 1
    assert shown_binary["payload_b64"] == "/wA="
    assert shown_binary["explanation"]["outcome"] == "dead_lettered"


def test_the_payload_is_written_byte_by_byte(office):
    payload = bytes(range(256)) * 100
    letter = office.add(payload=payload)
    file = office.directory / "payload.bin"

    assert office.run("show", letter, "--payload", file).stdout == ""
    with office.started("show", letter, "--payload", "-") as process:
        output = process.communicate(timeout=60)[0]

    assert file.read_bytes() == payload
    assert output == payload


def test_an_unknown_id_ends_with_1(office):
    assert "There is no dead letter 99" in office.run("show", 99, code=1).stderr


# --- requeue ---


def test_a_requeued_letter_is_stored_with_its_own_times_and_marked(office):
    arrived = datetime(2026, 3, 1, 12, 30, 15, 654321, tzinfo=UTC)
    office.add("devices/d1/telemetry", b'{"t": 21.5, "state": "on"}', at=arrived)
    office.add("devices/d2/telemetry", b'{"t": 3, "ts": "2026-02-28T23:00:00Z"}', at=arrived)

    output = office.run("requeue").stdout

    assert "requeued 2 dead letters of 2" in output
    assert "2, 3 rows stored" in output
    assert office.readings() == [
        (arrived, "d1", "state", None, "on"),
        (arrived, "d1", "t", 21.5, None),
        (datetime(2026, 2, 28, 23, tzinfo=UTC), "d2", "t", 3.0, None),
    ]
    assert office.waiting() == []
    assert office.count() == 2


def test_a_second_requeue_finds_nothing_to_do(office):
    office.add()
    office.run("requeue")

    assert office.run("requeue").stdout == "there is nothing to requeue\n"
    assert len(office.readings()) == 1


def test_a_letter_that_fails_again_is_left_as_it_is_and_the_reasons_are_grouped(office):
    broken = [office.add(payload=b'{"t": ' + b" " * n, stage="decode", error="once") for n in range(3)]
    lost = office.add("elsewhere/x", stage="route", error="once")
    office.add()
    everything = "SELECT * FROM mqtt_bridge.dead_letters WHERE id = ANY(%s) ORDER BY id"
    before = office.query(everything, [*broken, lost])

    output = office.run("requeue").stdout

    assert "requeued 1 dead letter of 5" in output
    assert "still failing 4, left as they are" in output
    assert re.search(rf"3 decode: The payload is not JSON: .* \(mqtt-bridge dead-letters show {broken[0]}\)", output)
    assert f"1 route: No route matches the topic. (mqtt-bridge dead-letters show {lost})" in output
    assert office.query(everything, [*broken, lost]) == before


def test_a_constraint_that_was_dropped_lets_the_letters_in(office):
    office.query("ALTER TABLE readings ADD CONSTRAINT warm CHECK (value > 0)")
    office.add(payload=b'{"t": -5}')
    refused = office.run("requeue").stdout
    stored_before = office.readings()

    office.query("ALTER TABLE readings DROP CONSTRAINT warm")
    office.run("requeue")

    assert 'store: PostgreSQL says: new row for relation "readings' in refused
    assert stored_before == []
    assert [row[3] for row in office.readings()] == [-5.0]


def test_a_route_that_was_added_takes_the_letters(office):
    office.add("halls/7/climate", stage="route", error="No route matches the topic.")
    office.run("requeue")
    stored_before = office.readings()

    office.run("requeue", MQTT_TOPICS=f"{TOPICS}, halls/{{device}}/climate")

    assert stored_before == []
    assert [row[1] for row in office.readings()] == ["7"]


@pytest.mark.parametrize("when", ["", "DEFERRABLE INITIALLY DEFERRED"])
def test_a_row_that_the_server_refuses_costs_its_letter_only(office, when):
    office.query(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'not this one' USING ERRCODE = 'check_violation', CONSTRAINT = 'odd'; END $$"
    )
    office.query(
        f"CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON readings {when} FOR EACH ROW"
        " WHEN (NEW.value IN (17, 250)) EXECUTE FUNCTION refuse()"
    )
    office.add_many(300)

    output = office.run("requeue").stdout

    assert "requeued 298 dead letters of 300" in output
    assert "2 store: PostgreSQL says: not this one." in output
    assert len(office.readings()) == 298
    assert len(office.waiting()) == 2


def test_what_todays_routes_ignore_is_marked_and_said(office):
    office.add(payload=b"{}")

    output = office.run("requeue").stdout

    assert "ignored       1 (no_values)" in output
    assert office.readings() == []
    assert office.waiting() == []


@pytest.mark.parametrize("topic", [b"devices/\xff/telemetry", b"devices/a\x00b/telemetry"])
def test_a_topic_that_was_not_readable_is_never_guessed(office, topic):
    office.add_as_the_bridge_does(topic, b'{"t": 1}')

    output = office.run("requeue").stdout

    assert "1 route: The topic was not readable" in output
    assert office.readings() == []
    assert len(office.waiting()) == 1


def test_a_topic_that_only_looks_like_an_escape_is_requeued(office):
    office.add("devices/\\xff/telemetry")

    office.run("requeue")

    assert [row[1] for row in office.readings()] == ["\\xff"]


def test_a_dry_run_says_what_the_server_would_refuse_and_changes_nothing(office):
    office.query("ALTER TABLE readings ADD CONSTRAINT warm CHECK (value > 1)")
    office.add_many(3)

    dry = office.run("requeue", "--dry-run").stdout
    after_dry = (office.readings(), len(office.waiting()))
    real = office.run("requeue").stdout

    assert after_dry == ([], 3)
    assert "would requeue 2 dead letters of 3" in dry
    assert "still failing 1" in dry
    assert "requeued 2 dead letters of 3" in real
    assert len(office.readings()) == 2


def test_filters_ids_and_a_limit_choose_what_is_requeued(sorted_office):
    office, names = sorted_office
    ids = {name: letter_id for letter_id, name in names.items()}

    by_id = office.run("requeue", "--id", ids["new"], "--id", ids["cold"], "--id", 99)
    office.add_many(5)
    by_limit = office.run("requeue", "--topic", "devices/#", "--limit", 2).stdout

    assert "requeued 1 dead letter of 1" in by_id.stdout
    assert "2 of these ids are not there, were requeued already, or are filtered out" in by_id.stderr
    assert "requeued 2 dead letters of 2" in by_limit
    assert [row[1] for row in office.readings()] == ["d1", "d2", "new"]


def test_large_payloads_are_taken_a_few_at_a_time(office):
    for number in range(5):
        office.add(f"devices/d{number}/telemetry", b'{"text": "%s"}' % (b"x" * 400_000))

    reports = [
        report.stored
        for report in DeadLetterOffice(
            office.connection, Router(default_routes(TOPICS)), statement_timeout_s=30
        ).requeue(Selection(requeued=False))
    ]

    assert len(reports) == 3
    assert reports[-1] == 5
    assert len(office.readings()) == 5


def test_a_table_that_is_missing_ends_it_with_1_and_the_remedy(office):
    office.add()
    office.query("DROP TABLE readings")

    assert "table readings is missing" in office.run("requeue", code=1).stderr
    assert len(office.waiting()) == 1

    office.query("DROP SCHEMA mqtt_bridge CASCADE")
    for command in (["list"], ["show", 1], ["requeue"], ["purge", "--requeued", "--yes"]):
        assert "mqtt-bridge schema --apply" in office.run(*command, code=1).stderr


def test_a_database_that_is_away_ends_it_with_1_and_the_setting(office):
    ended = office.run("list", code=1, DATABASE_URL="postgresql://x@127.0.0.1:1/x")

    assert "DATABASE_URL" in ended.stderr


# --- exactly once ---


@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
def test_two_at_the_same_time_store_each_letter_once(office, isolation):
    name = office.connection.info.dbname
    office.query(f"ALTER DATABASE {name} SET default_transaction_isolation = '{isolation}'")
    office.add_many(2_000)
    office.set_gate("readings", "INSERT", "NEW.device IN ('d1', 'd201')")

    with office.closed_gate() as open_gate, office.started("requeue") as first, office.started("requeue") as second:
        office.wait_for_somebody_at_the_gate(2)  # each has locked a chunk, and is in the middle of storing it
        open_gate()
        outputs = [process.communicate(timeout=60)[0].decode() for process in (first, second)]

    stored = [int(re.search(r"stored +([0-9,]+)", output)[1].replace(",", "")) for output in outputs]
    assert sum(stored) == 2_000
    assert min(stored) >= REQUEUE_CHUNK
    office.assert_each_is_stored_once(2_000)


def test_a_letter_that_another_run_has_just_finished_is_not_taken_again(office):
    theirs, ours = office.add(), office.add()
    chosen = dead_letters.sizes(office.connection, Selection(requeued=False), after=0, limit=10)
    dead_letters.mark_requeued(office.connection, [theirs])

    locked = dead_letters.lock(office.connection, [letter_id for letter_id, _ in chosen])

    assert [letter.id for letter in locked] == [ours]


@pytest.mark.parametrize(
    ("table", "event", "condition"),
    [
        ("readings", "INSERT", "NEW.device = 'd500'"),
        ("mqtt_bridge.dead_letters", "UPDATE", "NEW.topic = 'devices/d500/telemetry'"),
    ],
    ids=["while rows are stored", "before the commit"],
)
def test_after_a_kill_in_the_middle_the_next_run_completes_it(office, table, event, condition):
    office.add_many(1_000)
    office.set_gate(table, event, condition)

    with office.closed_gate(), office.started("requeue") as process:
        office.wait_for_somebody_at_the_gate()
        process.kill()
        process.wait()
    office.wait_until_alone()
    stored_by_then = len(office.readings())
    output = office.run("requeue").stdout

    assert stored_by_then == 400
    assert "requeued 600 dead letters of 600" in output
    office.assert_each_is_stored_once(1_000)


class Unanswering(BridgeConnection):
    """Loses the answer of the third COMMIT, or the connection right before it."""

    commits = 0
    committed = True

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        return super().cursor(*args, cursor_factory=_UnansweringCursor, **kwargs)


class _UnansweringCursor(psycopg2.extensions.cursor):
    connection: Unanswering

    def execute(self, query: Any, vars: Any = None) -> None:
        if query != "COMMIT":
            return super().execute(query, vars)
        self.connection.commits += 1
        if self.connection.commits < 3 or self.connection.committed:
            super().execute(query, vars)
        if self.connection.commits == 3:
            self.connection.close()
            raise psycopg2.OperationalError("server closed the connection unexpectedly")
        return None


@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_whose_answer_is_lost_neither_loses_nor_doubles(office, committed):
    office.add_many(1_000)
    with closing(psycopg2.connect(office.database, connection_factory=Unanswering)) as connection:
        connection.committed = committed
        losing = DeadLetterOffice(connection, Router(default_routes(TOPICS)), statement_timeout_s=30)
        with pytest.raises(psycopg2.OperationalError):
            list(losing.requeue(Selection(requeued=False)))
    office.wait_until_alone()
    stored_by_then = len(office.readings())

    office.run("requeue")

    assert stored_by_then == (600 if committed else 400)
    office.assert_each_is_stored_once(1_000)


def test_a_connection_that_is_lost_ends_it_with_1_and_the_advice(office):
    office.add_many(1_000)
    office.set_gate("readings", "INSERT", "NEW.device = 'd500'")

    with office.closed_gate(), office.started("requeue") as process:
        office.wait_for_somebody_at_the_gate()
        office.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                     " WHERE datname = current_database() AND pid <> pg_backend_pid()")  # fmt: skip
        errors = process.communicate(timeout=60)[1].decode()

    assert process.returncode == 1
    assert "400 dead letters were stored before" in errors
    assert "Run it again: none is stored twice." in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_the_chunk_in_hand_finish(office, number):
    office.add_many(1_000)
    office.set_gate("readings", "INSERT", "NEW.device = 'd250'")

    with office.closed_gate() as open_gate, office.started("requeue") as process:
        office.wait_for_somebody_at_the_gate()
        process.send_signal(number)
        open_gate()
        output, errors = (stream.decode() for stream in process.communicate(timeout=60))

    assert process.returncode == 1
    assert "interrupted" in errors
    assert "requeued 400 dead letters of 1,000" in output
    assert "not reached   600: run it again" in output
    assert len(office.readings()) == 400
    assert len(office.waiting()) == 600
    office.run("requeue")
    office.assert_each_is_stored_once(1_000)


class Terminal:
    """A terminal: what is written to its `end` is `shown`, what is typed can be read there."""

    def __init__(self) -> None:
        self._ours, self.end = pty.openpty()
        self._written: list[bytes] = []
        self._reader = threading.Thread(target=self._read, name="terminal")

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.end)
        self._reader.join(timeout=10)
        os.close(self._ours)

    def _read(self) -> None:
        with suppress(OSError):  # everybody has closed the other end
            while data := os.read(self._ours, 65_536):
                self._written.append(data)

    @property
    def shown(self) -> str:
        return b"".join(self._written).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())


def test_5000_letters_are_requeued_under_a_progress_bar(office):
    office.add_many(5_000)

    with Terminal() as terminal, office.started("requeue", stderr=terminal.end) as process:
        output = process.communicate(timeout=120)[0].decode()
        wait_until(lambda: "5000/5000" in terminal.shown, what="the bar to be full")

    assert process.returncode == 0
    assert "requeued 5,000 dead letters of 5,000" in output
    assert "requeueing" in terminal.shown
    assert "2400/5000" in terminal.shown
    assert "2,400 stored, 0 failing" in terminal.shown
    office.assert_each_is_stored_once(5_000)


# --- purge ---


@pytest.mark.parametrize("arguments", ["purge", "purge --yes"])
def test_a_purge_without_any_condition_is_refused(office, arguments):
    office.add()

    assert "this would delete every dead letter" in office.run(*arguments.split(), code=2).stderr
    assert office.count() == 1


def test_a_purge_that_nobody_can_confirm_is_refused(office):
    office.add()

    assert "--yes" in office.run("purge", "--older-than", "0s", code=2).stderr
    assert office.count() == 1


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ("--older-than 10d", ["cold", "hall", "new"]),
        ("--older-than 90m", ["new"]),
        ("--older-than 90m --since 10d", ["new", "odd"]),
        ("--requeued", ["hall", "new", "odd"]),
        ("--topic devices/#", ["hall", "odd"]),
        ("--stage route --error 100%", ["cold", "hall", "new"]),
        ("--not-requeued", ["cold"]),
        ("--stage store --not-requeued", ["cold", "hall", "new", "odd"]),
    ],
)
def test_a_purge_deletes_what_meets_every_condition(sorted_office, arguments, left):
    office, names = sorted_office

    output = office.run("purge", *arguments.split(), "--yes").stdout

    assert output == f"deleted {4 - len(left)} of {4 - len(left)} dead letters\n"
    assert sorted(names[i] for (i,) in office.query("SELECT id FROM mqtt_bridge.dead_letters")) == left


def test_a_purge_by_id_deletes_these(office):
    ids = [office.add() for _ in range(3)]

    office.run("purge", "--id", ids[0], "--id", ids[2], "--yes")

    assert office.query("SELECT id FROM mqtt_bridge.dead_letters") == [(ids[1],)]


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 0), ("n\n", 1, 2_500), ("\n", 1, 2_500)])
def test_on_a_terminal_a_purge_asks_first(office, answer, code, left):
    office.add_many(2_500)

    with Terminal() as terminal:
        with office.started("purge", "--older-than", "0s", stdin=terminal.end, stderr=terminal.end) as process:
            wait_until(lambda: "[y/N]" in terminal.shown, timeout_s=30, what="the question")
            terminal.type(answer)
            process.communicate(timeout=60)

    assert "Delete 2,500 dead letters for good, 2,500 of them never requeued?" in terminal.shown
    assert process.returncode == code
    assert office.count() == left


def test_a_letter_that_is_requeued_meanwhile_is_not_purged_as_not_requeued(office):
    letter = office.add()
    selection, _ = dead_letters.bounded(office.connection, Selection(requeued=False))
    dead_letters.mark_requeued(office.connection, [letter])

    assert dead_letters.delete(office.connection, selection, [letter]) == 0
    assert office.count() == 1


# --- help ---


@pytest.mark.parametrize("command", ["", "list", "show", "requeue", "purge"])
def test_every_command_has_help_with_examples(office, command):
    output = office.run(*command.split(), "--help").stdout

    assert "Examples:\n  " in output
    assert f"mqtt-bridge dead-letters {command}" in output
