"""Topic patterns: what they subscribe to, what they match, and how filters relate."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_bridge.topics import TopicPattern, covering, covers, overlaps


@pytest.mark.parametrize(
    ("pattern", "topic_filter", "captures", "exact"),
    [
        ("devices/{device}/telemetry", "devices/+/telemetry", ("device",), True),
        ("{site}/+/{device}", "+/+/+", ("site", "device"), True),
        ("a/{x...}", "a/#", ("x",), False),
        ("a/{x...}/b", "a/#", ("x",), False),
        ("a/{x...}/{y}/c", "a/#", ("x", "y"), False),
        ("{x...}", "#", ("x",), True),
        ("{x...}/b", "#", ("x",), False),
        ("#", "#", (), True),
        ("a/#", "a/#", (), True),
        ("/a//b/", "/a//b/", (), True),
        ("$SYS/broker/#", "$SYS/broker/#", (), True),
    ],
)
def test_a_pattern_knows_its_filter_its_captures_and_whether_the_filter_is_wider(
    pattern, topic_filter, captures, exact
):
    parsed = TopicPattern.parse(pattern)

    assert (parsed.filter, parsed.captures, parsed.exact) == (topic_filter, captures, exact)
    assert parsed.text == pattern


@pytest.mark.parametrize(
    ("pattern", "topic", "captured"),
    [
        ("devices/{device}/telemetry", "devices/d1/telemetry", {"device": "d1"}),
        ("devices/{device}/telemetry", "devices/d1/telemetry/x", None),
        ("devices/{device}/telemetry", "devices//telemetry", {"device": ""}),
        ("devices/{device}", "devices/\n", {"device": "\n"}),
        ("a/+/{x}", "a/b/c", {"x": "c"}),
        ("a/{x...}", "a", None),
        ("a/{x...}", "a/b", {"x": "b"}),
        ("a/{x...}", "a/b/c", {"x": "b/c"}),
        ("a/{x...}/z", "a/b/c/z", {"x": "b/c"}),
        ("a/{x...}/z", "a/z", None),
        ("a/{x...}/{y}", "a/b/c/d", {"x": "b/c", "y": "d"}),
        ("a/#", "a", {}),
        ("a/#", "a/b/c", {}),
        ("a/#", "ab", None),
        ("/#", "/", {}),
        ("/#", "a/b", None),
        ("#", "a/b", {}),
        ("+/#", "a", {}),
        ("a.c", "abc", None),
    ],
)
def test_a_pattern_matches_as_mqtt_says_and_names_what_it_captured(pattern, topic, captured):
    assert TopicPattern.parse(pattern).match(topic) == captured


@pytest.mark.parametrize("pattern", ["#", "+/a", "{x}/a", "{x...}", "{x...}/a", "+/#"])
def test_a_wildcard_in_first_place_does_not_match_a_topic_that_begins_with_a_dollar(pattern):
    assert TopicPattern.parse(pattern).match("$SYS/a") is None


def test_a_pattern_that_spells_the_dollar_matches_it():
    assert TopicPattern.parse("$SYS/{x...}").match("$SYS/broker/load") == {"x": "broker/load"}


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("", "empty"),
        ("a/\0", "NUL"),
        ("a/#/b", "last level"),
        ("a#", "mixes"),
        ("a/b+", "mixes"),
        ("a/{x", "unbalanced"),
        ("a/x}", "unbalanced"),
        ("a/{x}y", "not a capture"),
        ("a/{}", "not a capture"),
        ("a/{1}", "not a capture"),
        ("a/}x{", "not a capture"),
        ("{x}/{x}", "stands twice"),
        ("{x...}/{y...}", "Only one"),
        ("{x...}/#", "Only one"),
        ("$share/group/a", "MQTT_SHARED_GROUP"),
        ("a/\udcff", "UTF-8"),
        ("ä" * 32_768, "65536 bytes"),
    ],
)
def test_a_bad_pattern_is_refused_with_one_sentence(pattern, complaint):
    with pytest.raises(ValueError, match=complaint) as refused:
        TopicPattern.parse(pattern)

    assert "\n" not in str(refused.value)


def test_a_pattern_may_be_longer_than_its_filter():
    pattern = "a" * 65_533 + "/{a_capture}"

    assert len(TopicPattern.parse(pattern).filter) == 65_535


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        ("#", "a/b"),
        ("#", "+/#"),
        ("+/#", "#"),
        ("a/#", "a"),
        ("a/#", "a/#"),
        ("a/#", "a/+/b"),
        ("a/+", "a/b"),
        ("a/+/#", "a/b/#"),
        ("$SYS/#", "$SYS/a"),
    ],
)
def test_a_filter_covers_what_it_delivers_all_of(wide, narrow):
    assert covers(wide, narrow)


@pytest.mark.parametrize(
    ("topic_filter", "other"),
    [
        ("a/+", "a/#"),
        ("a/+/#", "a/#"),
        ("a", "a/#"),
        ("a", "a/b"),
        ("a/b", "a"),
        ("a/b", "a/+"),
        ("#", "$SYS/#"),
        ("+/a", "$SYS/a"),
    ],
)
def test_a_filter_does_not_cover_what_it_misses_some_of(topic_filter, other):
    assert not covers(topic_filter, other)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a/+", "+/b", True),
        ("a/#", "a", True),
        ("a/#", "+/b/c", True),
        ("a/b", "a/c", False),
        ("a/+", "a", False),
        ("a/+/#", "a", False),
        ("#", "$SYS/#", False),
        ("+/x", "$SYS/x", False),
    ],
)
def test_filters_overlap_when_some_topic_fits_both(one, other, expected):
    assert overlaps(one, other) is expected
    assert overlaps(other, one) is expected


_NAMES = ["a", "b", "", "$s"]
_TOPICS = [
    # `z` stands in no filter: it is "any other level".
    "/".join(levels)
    for depth in (1, 2, 3, 4)
    for levels in itertools.product([*_NAMES, "z"], repeat=depth)
]


@st.composite
def _filters(draw):
    levels = draw(st.lists(st.sampled_from([*_NAMES, "+"]), max_size=3))
    return "/".join(levels + ["#"] * draw(st.integers(0, 1))) or "#"


@cache
def _delivered(topic_filter):
    pattern = TopicPattern.parse(topic_filter)
    return {topic for topic in _TOPICS if pattern.match(topic) is not None}


@given(_filters(), _filters())
def test_covers_and_overlaps_agree_with_what_the_filters_match(one, other):
    assert covers(one, other) is (_delivered(one) >= _delivered(other))
    assert overlaps(one, other) is bool(_delivered(one) & _delivered(other))


@given(st.permutations(["a", "{x}", "{y...}", "+", "b"]), st.integers(1, 5))
def test_a_pattern_matches_nothing_that_its_filter_does_not_deliver(levels, depth):
    pattern = TopicPattern.parse("/".join(levels[:depth]))

    matched = {topic for topic in _TOPICS if pattern.match(topic) is not None}

    assert matched <= _delivered(pattern.filter)
    assert not pattern.exact or matched == _delivered(pattern.filter)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a/+/b", "a/x/#", "a/+/#"),
        ("+/b", "a/+", "+/+"),
        ("a/b/#", "+/b/c", "+/b/#"),
    ],
)
def test_the_covering_filter_covers_both(one: str, other: str, expected: str) -> None:
    wider = covering(one, other)

    assert wider == expected
    assert covers(wider, one)
    assert covers(wider, other)
