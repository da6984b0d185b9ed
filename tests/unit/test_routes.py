"""From a message to a translation: which route, which device, which rows."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_bridge.errors import MessageError
from mqtt_bridge.model import Message, Tally, Translation
from mqtt_bridge.routes import READINGS, Router, default_routes

RECEIVED = 1_790_000_000_000_000
POSTGRES_TIMES = range(-210_866_803_200_000_000, 9_224_318_016_000_000_000)
"""4713 BC to 294276 AD in microseconds since 1970: what a timestamptz can hold."""


def message(topic, payload, *, received_us=RECEIVED):
    topic = topic.encode() if isinstance(topic, str) else topic
    return Message(topic, payload, qos=1, retain=False, received_us=received_us)


def translate(topics, topic, payload, *, tally=None):
    router = Router(default_routes(topics), max_values=10_000, max_depth=64)
    return router.translate(message(topic, payload), tally or Tally())


def refusal(topics, topic, payload=b"1"):
    with pytest.raises(MessageError) as refused:
        translate(topics, topic, payload)
    return refused.value


def outcome(router, topic, payload):
    """The translation, or the refusal: there must be nothing else."""
    try:
        return router.translate(message(topic, payload), Tally())
    except MessageError as refused:
        return refused


def assert_storable(rows):
    for time_us, device, metric, value, value_text in rows:
        assert type(time_us) is int
        assert time_us in POSTGRES_TIMES
        assert value is None or (type(value) in (int, float) and math.isfinite(float(value)))
        assert value is not None or value_text is not None
        for name in (device, metric):
            assert len(name.encode()) <= 1_000
        for text in filter(None, (device, metric, value_text)):
            assert "\0" not in text
            text.encode()


def test_a_message_becomes_rows_of_its_device():
    translation = translate("devices/{device}/telemetry", "devices/d1/telemetry", b'{"t": 21.5, "s": "ok"}')

    assert translation == Translation(
        "default",
        READINGS,
        [(RECEIVED, "d1", "t", 21.5, None), (RECEIVED, "d1", "s", None, "ok")],
    )


def test_the_time_of_the_payload_is_the_time_of_every_row():
    translation = translate("#", "d1", b'{"ts": 1708326851.41, "a": 1, "b": 2}')

    assert [row[0] for row in translation.rows] == [1_708_326_851_410_000] * 2


def test_without_a_device_in_the_pattern_the_topic_is_the_device():
    assert translate("devices/+/#", "devices/d1/x/y", b'{"t": 1}').rows == [(RECEIVED, "devices/d1/x/y", "t", 1, None)]


@pytest.mark.parametrize(
    ("pattern", "topic", "device", "metric"),
    [
        ("#", "a/b/c", "a/b/c", "c"),
        ("#", "a/b/", "a/b/", "b"),
        ("#", "/", "/", "/"),
        ("{device}/#", "a/b/c", "a", "c"),
        ("homie/{device}/{metric...}", "homie/car/engine/temperature", "car", "engine.temperature"),
        ("{x}/{device...}/{metric}", "a/b/c/d", "b/c", "d"),
        ("s/{metric}/{device}", "s/temp/d1", "d1", "temp"),
    ],
)
def test_a_single_value_is_named_by_its_topic(pattern, topic, device, metric):
    assert translate(pattern, topic, b"21.5").rows == [(RECEIVED, device, metric, 21.5, None)]


def test_the_metric_of_the_topic_does_not_touch_the_names_in_an_object():
    assert translate("{device}/{metric}", "d1/env", b'{"t": 1}').rows == [(RECEIVED, "d1", "t", 1, None)]


@pytest.mark.parametrize("payload", [b"", b"{}", b"[]", b"null", b" ", b'{"a": null}', b"nan", b'{"ts": 1708326851}'])
def test_a_message_without_a_value_is_ignored(payload):
    translation = translate("#", "d1", payload)

    assert translation.ignored == "no_values"
    assert translation.rows == []


def test_integers_beyond_64_bits_are_kept_in_full():
    payload = b'{"a": 18446744073709551617, "b": -9223372036854775809, "c": 1e20, "d": 36893488147419103232}'

    rows = translate("#", "d1", payload).rows

    assert [row[2:] for row in rows] == [
        ("a", 2.0**64, "18446744073709551617"),
        ("b", -(2.0**63), "-9223372036854775809"),
        ("c", 1e20, None),
        ("d", 2.0**65, None),
    ]


@pytest.mark.parametrize("payload", [b"18446744073709551617", b"+18446744073709551617\n"])
def test_a_single_integer_beyond_64_bits_is_kept_in_full(payload):
    assert translate("#", "n", payload).rows == [(RECEIVED, "n", "n", 2.0**64, "18446744073709551617")]


def test_repairs_are_counted_once_also_when_the_payload_is_read_twice():
    tally = Tally()

    rows = translate(
        "#", "d", rb'{"ts": 99999999999999999999, "s": "a\u0000b", "n": 18446744073709551617}', tally=tally
    ).rows

    assert [row[2:] for row in rows] == [
        ("ts", 1e20, "99999999999999999999"),
        ("s", None, "ab"),
        ("n", 2.0**64, "18446744073709551617"),
    ]
    assert tally == Tally(nul_removed=1, time_replaced=1)


def test_values_that_are_not_finite_are_skipped_and_counted_and_the_others_stored():
    tally = Tally()

    rows = translate("#", "d", b'{"a": nan, "b": 1, "c": [-Infinity, 1e999]}', tally=tally).rows

    assert [row[2:] for row in rows] == [("b", 1, None)]
    assert tally == Tally(nan_skipped=3)


def test_a_nul_at_the_end_of_a_text_is_removed_and_counted():
    tally = Tally()

    assert translate("#", "d", b"on\0", tally=tally).rows == [(RECEIVED, "d", "d", None, "on")]
    assert tally == Tally(nul_removed=1)


def test_a_refused_message_leaves_no_trace_in_the_counts():
    router, tally = Router(default_routes("#"), max_values=1, max_depth=64), Tally()

    with pytest.raises(MessageError):
        router.translate(message("d", rb'{"s": "\u0000", "ts": 1, "x": [1, 2]}'), tally)

    assert tally == Tally()


def test_the_first_route_that_matches_takes_the_message():
    topics = " devices/{device}/telemetry , devices/#,,other/+ "

    names = [translate(topics, topic, b"1").route for topic in ("devices/d1/telemetry", "devices/d1/state", "other/x")]

    assert names == ["default", "default-2", "default-3"]


def test_a_list_without_a_topic_makes_no_route():
    assert default_routes(" , ") == ()


def test_a_topic_that_is_no_pattern_is_refused():
    with pytest.raises(ValueError):
        default_routes("a/#/b")


@pytest.mark.parametrize(
    ("topics", "filters"),
    [
        ("devices/{device}/telemetry", ("devices/+/telemetry",)),
        ("a/b,a/+,c", ("a/+", "c")),
        ("a/+,a/b,c", ("a/+", "c")),
        ("a/{x},a/+,a/{y}", ("a/+",)),
        ("a/b,c/d,#", ("#",)),
        ("#,$SYS/#", ("#", "$SYS/#")),
    ],
)
def test_only_filters_that_no_other_covers_are_subscribed_to(topics, filters):
    assert Router(default_routes(topics)).filters == filters


def test_a_topic_that_no_route_matches_is_refused_without_a_route():
    refused = refusal("devices/{device}/telemetry", "devices/d1/state")

    assert (refused.stage, refused.route, refused.reason) == ("route", None, "No route matches the topic.")


def test_a_topic_that_came_only_because_the_filter_had_to_be_wide_is_ignored():
    router = Router(default_routes("x, a/{device...}/b"))

    for _ in range(2):
        translation = router.translate(message("a/1/2/c", b"1"), Tally())
        assert translation == Translation("default-2", READINGS, [], "no_route")


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        (b"a/\xff", "not UTF-8: byte 0xff at position 2"),
        (b"a/\xed\xa0\x80", "not UTF-8: byte 0xed at position 2"),
        (b"a/\0b", "NUL character at position 2"),
    ],
)
def test_a_topic_that_mqtt_forbids_is_refused(topic, reason):
    refused = refusal("#", topic)

    assert reason in refused.reason
    assert refused.stage == "route"


def test_a_device_too_long_for_an_index_is_refused():
    assert translate("#", "d" * 1_000, b'{"a": 1}').rows

    refused = refusal("#", "d" * 1_001, b'{"a": 1}')

    assert "longer than 1,000 bytes" in refused.reason
    assert (refused.stage, refused.route) == ("route", "default")


def test_a_metric_from_the_topic_that_is_too_long_is_refused():
    refused = refusal("{device}/{metric...}", "d/" + "m" * 1_001)

    assert "longer than 1,000 bytes" in refused.reason
    assert (refused.stage, refused.route) == ("decode", "default")


def test_a_payload_that_cannot_be_read_is_refused_by_its_route():
    refused = refusal("x,#", "d1", b'{"t": ')

    assert "not JSON" in refused.reason
    assert (refused.stage, refused.route) == ("decode", "default-2")


def test_limits_beyond_the_stack_of_python_still_end_in_a_message_error():
    router = Router(default_routes("#"), max_depth=100_000)

    with pytest.raises(MessageError, match="too deeply"):
        router.translate(message("d", b"[" * 1_000 + b"]" * 1_000), Tally())


def test_the_memory_for_topics_is_bounded_and_forgetting_them_changes_nothing():
    router = Router(default_routes("{device}"))

    for number in range(60_000):
        rows = router.translate(message(f"d{number}", b"1"), Tally()).rows
        assert rows[0][1] == f"d{number}"
    router.translate(message("d" * 900, b"1"), Tally())

    assert len(router._matches) <= 50_000
    assert max(map(len, router._matches)) <= 500


@given(st.binary(), st.binary())
@pytest.mark.parametrize("topics", ["#", "a/{device...}/b,{device}/{metric...},+/{x}"])
def test_any_bytes_become_rows_that_postgresql_takes_or_a_message_error(topics, topic, payload):
    result = outcome(Router(default_routes(topics)), topic, payload)

    if isinstance(result, MessageError):
        assert result.reason
        assert result.stage in ("route", "decode")
    else:
        assert_storable(result.rows)
        assert (result.ignored is None) == bool(result.rows)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(st.characters(exclude_categories=()))
    | st.datetimes().map(str),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["time", "ts", "a", "\0"]) | st.text(), inner),
    max_leaves=20,
)


@given(anything)
def test_any_json_becomes_rows_that_postgresql_takes_or_a_message_error(document):
    result = outcome(Router(default_routes("#")), "d1", json.dumps(document).encode())

    if isinstance(result, MessageError):
        assert "surrogate" in result.reason
    else:
        assert_storable(result.rows)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40), st.integers()
    )
)
def test_no_integer_loses_a_digit(document):
    keys = ("time", "timestamp", "ts")
    document = {key: value for key, value in document.items() if key not in keys}

    rows = translate("#", "d1", json.dumps(document).encode()).rows

    assert {metric: int(value if text is None else text) for _, _, metric, value, text in rows} == document
