"""`explain`: what becomes of a message, without a broker and a database; and the real messages of the corpus."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mqtt_bridge.errors import BridgeError
from mqtt_bridge.routes import Router, default_routes
from mqtt_bridge.tools.explain import explain, explain_tape, render

AT = datetime(2026, 10, 1, 12, tzinfo=UTC)
CORPUS = Path(__file__).parent.parent / "tapes" / "devices.jsonl"


@pytest.fixture
def router():
    return Router(default_routes("devices/{device}/telemetry, wide/{device...}/end"))


def test_a_stored_message_shows_its_route_its_table_and_its_rows(router):
    explained = explain(router, "devices/d1/telemetry", b'{"t": 21.5, "s": "ok", "on": true}', at=AT)

    assert explained == {
        "topic": "devices/d1/telemetry",
        "outcome": "stored",
        "route": "default",
        "table": "readings",
        "rows": [
            {"time": None, "device": "d1", "metric": "t", "value": 21.5, "value_text": None},
            {"time": None, "device": "d1", "metric": "s", "value": None, "value_text": "ok"},
            {"time": None, "device": "d1", "metric": "on", "value": 1, "value_text": None},
        ],
        "error": None,
        "stage": None,
    }


@pytest.mark.parametrize(
    ("ts", "shown"),
    [
        ('"2024-02-19T08:14:11+01:00"', "2024-02-19T07:14:11Z"),
        ("1708326851.41", "2024-02-19T07:14:11.41Z"),
        ('"2024-02-19 07:14:10.000001"', "2024-02-19T07:14:10.000001Z"),
        ("1790856000", "2026-10-01T12:00:00Z"),
    ],
)
def test_a_time_of_the_payload_is_shown_in_utc_even_when_it_equals_the_arrival(router, ts, shown):
    explained = explain(router, "devices/d1/telemetry", f'{{"ts": {ts}, "t": 1}}'.encode(), at=AT)

    assert [(row["time"], row["metric"]) for row in explained["rows"]] == [(shown, "t")]


def test_a_time_that_is_replaced_is_shown_as_the_arrival_time(router):
    a_day_and_a_bit_later = '{"time": "2026-10-02T12:00:00.000001Z"}'

    explained = explain(router, "devices/d1/telemetry", a_day_and_a_bit_later.encode(), at=AT)

    assert [(row["time"], row["metric"]) for row in explained["rows"]] == [(None, "time")]


def test_a_dead_letter_shows_its_stage_and_reason(router):
    explained = explain(router, "devices/d1/telemetry", b'{"t": ')

    assert (explained["outcome"], explained["stage"], explained["route"]) == ("dead_lettered", "decode", "default")
    assert "not JSON" in explained["error"]
    assert (explained["table"], explained["rows"]) == (None, [])


@pytest.mark.parametrize("topic", ["nobody/asked", "a/\udcff", "a/\0"])
def test_a_topic_that_no_route_takes_is_a_dead_letter_of_stage_route(router, topic):
    explained = explain(router, topic, b"1")

    assert (explained["outcome"], explained["stage"], explained["route"]) == ("dead_lettered", "route", None)
    json.dumps(explained)
    render(explained).encode()


@pytest.mark.parametrize(
    ("topic", "payload", "route", "reason"),
    [
        ("devices/d1/telemetry", b"{}", "default", "no_values"),
        ("wide/d1/other", b"1", None, "no_route"),
    ],
)
def test_an_ignored_message_shows_why(router, topic, payload, route, reason):
    explained = explain(router, topic, payload)

    assert (explained["outcome"], explained["route"], explained["error"], explained["stage"]) == (
        "ignored",
        route,
        reason,
        None,
    )


def test_a_tape_is_explained_message_by_message(router):
    lines = [
        '{"t": 0, "topic": "devices/d1/telemetry", "payload": "21.5", "qos": 1, "retain": false, "properties": {}}\n',
        "\n",
        json.dumps({"topic": "devices/d2/telemetry", "payload_b64": base64.b64encode(b"\xff").decode()}),
    ]

    first, second = explain_tape(router, lines)

    assert (first["outcome"], first["rows"][0]["value"]) == ("stored", 21.5)
    assert (second["outcome"], second["stage"]) == ("dead_lettered", "decode")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "topic"),
        ('{"payload": "x"}', "topic"),
        ('{"topic": 5, "payload": "x"}', "topic"),
        ('{"topic": "a"}', "payload"),
        ('{"topic": "a", "payload": {"t": 1}}', "payload"),
        ('{"topic": "a", "payload": "x", "payload_b64": "eA=="}', "payload"),
        ('{"topic": "a", "payload_b64": "x"}', "base64"),
        ('{"topic": "a", "payload_b64": "ü"}', "base64"),
        (r'{"topic": "a", "payload": "\ud800"}', "Unicode"),
    ],
)
def test_a_line_that_is_no_message_is_named(router, line, reason):
    with pytest.raises(BridgeError, match=rf"^Line 2 of the tape .*{reason}"):
        list(explain_tape(router, ["", line]))


def test_a_person_reads_a_sentence_and_aligned_rows(router):
    payload = b'{"ts": 1708326851.41, "temperature": 21.5, "s": "ok"}'

    assert render(explain(router, "devices/d1/telemetry", payload)).splitlines() == [
        "devices/d1/telemetry",
        "  is stored by route default in readings, 2 rows:",
        "",
        "    time                     device  metric       value  value_text",
        "    2024-02-19T07:14:11.41Z  d1      temperature  21.5   -",
        "    2024-02-19T07:14:11.41Z  d1      s            -      ok",
    ]
    assert "(arrival)" in render(explain(router, "devices/d1/telemetry", b"1"))


def test_a_person_reads_why_a_message_is_not_stored(router):
    assert "a dead letter by route default, stage decode. The payload is not JSON" in render(
        explain(router, "devices/d1/telemetry", b"[")
    )
    assert "is a dead letter, stage route. No route" in render(explain(router, "x", b"1")).replace("becomes", "is")
    assert "is ignored by route default: no_values." in render(explain(router, "devices/d1/telemetry", b""))


def test_a_payload_cannot_write_to_the_terminal(router):
    shown = render(
        explain(router, "devices/d1/telemetry", b'{"a": "\\u001b[2J\\nfake line", "b": "' + b"x" * 500 + b'"}')
    )

    assert "\x1b" not in shown
    assert len(shown.splitlines()) == 6
    assert max(map(len, shown.splitlines())) < 200


# Real messages -----------------------------------------------------------------------------------------------------

NEEDS_ROUTE = {
    "shelly2-notify-1": "the metrics start at `params`, the time is `params.ts`",
    "shelly2-notify-2": "the metrics start at `params`, the time is `params.ts`",
    "tts-up-docs": "the metrics start at `uplink_message.decoded_payload`, the time is `received_at`",
    "tts-up-nodecode": "the metrics start at `uplink_message`",
    "victron-power": "the metric is in the topic although the payload is an object (`value`)",
    "victron-setpoint": "a request, not a measurement: to be ignored by its topic (W/...)",
    "aws-shadow-documents": "`#` does not deliver topics that begin with $; the metrics start at `state.reported`",
    "aws-shadow-null-desired": "`#` does not deliver topics that begin with $; the metrics start at `state.reported`",
    "tb-ts-values": "the metrics start at `values`",
}
"""Messages whose metrics only a route of their own (a preset) can name as `expected` does, and why."""

NEEDS_ROUTE_FOR_TIME = {
    "tasmota-sensor-energy": "the time is `Time`",
    "tasmota-state": "the time is `Time`",
    "ot-location-ha": "the time is `tst`, and 1970 is not plausible",
    "ot-transition-ha": "the time is `tst`, and 1970 is not plausible",
}

NASTY = {
    "tasmota-nan-lower": "stored",
    "tasmota-corrupt-sensor": "dead_lettered",
    "tasmota-missing-brace": "dead_lettered",
    "z2m-u0000": "stored",
    "single-quotes": "dead_lettered",
    "json-double-encoded": "stored",
    "big-int-ids": "stored",
    "numeric-strings": "stored",
    "scalar-nan": "ignored",
    "scalar-none": "ignored",
    "trailing-nul-json": "stored",
    "gzip": "dead_lettered",
}


def corpus():
    return [json.loads(line) for line in CORPUS.read_text().splitlines()]


def payload_of(real):
    return real["payload_utf8"].encode() if "payload_utf8" in real else bytes.fromhex(real["payload_hex"])


def is_plain_object(real):
    try:
        return real["kind"] == "normal" and isinstance(json.loads(payload_of(real)), dict)
    except ValueError:
        return False


def explain_real(real):
    return explain(Router(default_routes("#")), real["topic"], payload_of(real), at=AT)


def metrics(explained):
    """Metric -> the value in the form in which nothing of it is lost."""
    rows = explained["rows"]
    return {row["metric"]: row["value"] if row["value_text"] is None else row["value_text"] for row in rows}


def to_microseconds(time):
    return time and datetime.fromisoformat(time)


@pytest.mark.parametrize("real", corpus(), ids=lambda real: real["id"])
def test_every_real_message_is_explained(real):
    explained = explain_real(real)

    assert explained["outcome"] in ("stored", "dead_lettered", "ignored")
    json.dumps(explained, allow_nan=False)
    assert render(explained)


@pytest.mark.parametrize(
    "real",
    [real for real in corpus() if is_plain_object(real) and real["id"] not in NEEDS_ROUTE],
    ids=lambda real: real["id"],
)
def test_a_real_json_object_yields_the_expected_metrics_under_the_default_rules(real):
    expected = real["expected"]

    explained = explain_real(real)

    found = metrics(explained)
    allowed = {*expected["metrics"], *expected.get("also_ok", ())}
    assert {name: found.get(name) for name in expected["metrics"]} == expected["metrics"]
    assert "*" in allowed or set(found) <= allowed
    if real["id"] not in NEEDS_ROUTE_FOR_TIME:
        times = {to_microseconds(row["time"]) for row in explained["rows"]}
        assert times == {to_microseconds(expected["time"])}


@pytest.mark.parametrize("name", NEEDS_ROUTE)
def test_the_list_of_messages_that_need_a_route_holds_no_other(name):
    (real,) = [real for real in corpus() if real["id"] == name]

    found = metrics(explain_real(real))

    expected = real["expected"]["metrics"]
    assert is_plain_object(real)
    assert not expected or any(found.get(metric) != value for metric, value in expected.items())


@pytest.mark.parametrize("real", [real for real in corpus() if real["kind"] == "nasty"], ids=lambda real: real["id"])
def test_nasty_messages_end_as_expected(real):
    assert explain_real(real)["outcome"] == NASTY[real["id"]]


def test_nasty_messages_lose_nothing_that_can_be_saved():
    reals = {real["id"]: real for real in corpus()}

    for name in ("tasmota-nan-lower", "big-int-ids", "trailing-nul-json"):
        found, expected = metrics(explain_real(reals[name])), reals[name]["expected"]["metrics"]
        # An integer that no double holds stands in full in `value_text`.
        assert {m: found[m] for m in expected} == {m: v if found[m] == v else str(v) for m, v in expected.items()}
