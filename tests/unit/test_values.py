"""From a document to rows of the narrow shape."""

from __future__ import annotations

import math

import pytest

from mqtt_bridge.decoders.values import Narrow, RoundedInteger
from mqtt_bridge.errors import MessageError

TIME_US = 1_700_000_000_000_000


def flatten(document, *, max_values=10_000, max_depth=64, repairs=None):
    """`(metric, value, value_text)` of every row."""
    shape = Narrow("d1", "scalar", max_values=max_values, max_depth=max_depth, names={})
    rows = shape.rows(document, TIME_US, [] if repairs is None else repairs)
    assert all(row[:2] == (TIME_US, "d1") for row in rows)
    return [row[2:] for row in rows]


def nested(levels):
    document = 1
    for _ in range(levels):
        document = {"a": document}
    return document


def test_numbers_go_to_value_texts_to_value_text_and_truth_to_one_or_zero():
    document = {"t": 21.5, "n": -3, "on": True, "off": False, "s": "text", "empty": ""}

    assert flatten(document) == [
        ("t", 21.5, None),
        ("n", -3, None),
        ("on", 1, None),
        ("off", 0, None),
        ("s", None, "text"),
        ("empty", None, ""),
    ]
    assert not any(isinstance(value, bool) for _, value, _ in flatten(document))


def test_nested_names_are_joined_by_dots_and_list_elements_are_named_by_their_index():
    document = {"BME280": {"Temperature": 21.5}, "phase": [230, {"u": 231}], "": {"": 1}}

    assert flatten(document) == [
        ("BME280.Temperature", 21.5, None),
        ("phase.0", 230, None),
        ("phase.1.u", 231, None),
        (".", 1, None),
    ]


def test_a_list_at_the_top_is_named_by_index_alone():
    assert flatten([1, {"temp": 2}]) == [("0", 1, None), ("1.temp", 2, None)]


def test_a_single_value_takes_the_name_from_its_topic():
    assert flatten(21.5) == [("scalar", 21.5, None)]
    assert flatten("on") == [("scalar", None, "on")]
    assert flatten(True) == [("scalar", 1, None)]


def test_two_keys_that_come_to_the_same_name_are_two_rows():
    assert flatten({"a.b": 1, "a": {"b": 2}}) == [("a.b", 1, None), ("a.b", 2, None)]


@pytest.mark.parametrize("document", [None, {}, [], {"a": None}, [None, {}, {"b": []}], {"a": math.nan}, math.inf])
def test_what_holds_no_value_makes_no_row(document):
    assert flatten(document) == []


@pytest.mark.parametrize(
    ("number", "value", "value_text"),
    [
        (2**53, 2**53, None),
        (2**53 + 1, 2.0**53, "9007199254740993"),
        (-(2**53) - 1, -(2.0**53), "-9007199254740993"),
        (2**60, 2.0**60, None),
        (1688888483063664642, 1688888483063664642.0, "1688888483063664642"),
        (2**64, 2.0**64, None),
        (2**64 + 1, 2.0**64, "18446744073709551617"),
        (10**400, None, "1" + "0" * 400),
    ],
)
def test_an_integer_that_a_double_cannot_hold_is_also_kept_in_full(number, value, value_text):
    assert flatten({"n": number}) == [("n", value, value_text)]


def test_a_float_beyond_53_bits_is_an_ordinary_number():
    assert flatten({"n": 1e17}) == [("n", 1e17, None)]


@pytest.mark.parametrize("number", [float(2**64), -1e19])
def test_a_float_that_may_be_a_rounded_integer_asks_for_the_exact_reading(number):
    with pytest.raises(RoundedInteger):
        flatten({"deep": [number]})


def test_not_a_number_and_infinities_are_skipped_and_listed():
    repairs = []

    rows = flatten({"a": math.nan, "b": 1, "c": [math.inf, -math.inf]}, repairs=repairs)

    assert rows == [("b", 1, None)]
    assert repairs == ["nan_skipped"] * 3


def test_nul_characters_are_removed_from_texts_and_names_and_listed():
    repairs = []

    rows = flatten({"a\0b": "x\0\0y", "c": {"\0": 1}, "fine": "fine"}, repairs=repairs)

    assert rows == [("ab", None, "xy"), ("c.", 1, None), ("fine", None, "fine")]
    assert repairs == ["nul_removed"] * 3


def test_as_many_values_as_allowed_are_stored():
    assert len(flatten([1] * 10_000)) == 10_000
    assert len(flatten({"a": [1] * 5_000, "b": [1] * 5_000})) == 10_000


@pytest.mark.parametrize("document", [[1] * 10_001, {"a": [1] * 5_001, "b": [1] * 5_000}, [[1] * 9_999] * 9_999])
def test_one_value_more_is_refused_before_it_fills_the_memory(document):
    with pytest.raises(MessageError, match="more than 10,000 values"):
        flatten(document)


def test_as_many_levels_as_allowed_are_stored_and_one_more_is_refused():
    assert flatten(nested(64)) == [(".".join("a" * 64), 1, None)]

    with pytest.raises(MessageError, match="more than 64 levels"):
        flatten(nested(65))


def test_the_limits_can_be_set():
    with pytest.raises(MessageError, match="more than 2 values"):
        flatten([1, 2, 3], max_values=2)
    with pytest.raises(MessageError, match="more than 2 levels"):
        flatten([[[1]]], max_depth=2)


@pytest.mark.parametrize("longest", ["x" * 1_000, "ü" * 500, "🌡" * 250])
def test_a_name_as_long_as_an_index_row_can_take_is_stored_and_a_longer_one_is_refused(longest):
    assert flatten({longest: 1}) == [(longest, 1, None)]

    with pytest.raises(MessageError, match="longer than 1,000 bytes") as refusal:
        flatten({longest + "x": 1})
    assert len(refusal.value.reason) < 150


def test_a_name_that_nesting_makes_too_long_is_refused():
    with pytest.raises(MessageError, match="longer than 1,000 bytes"):
        flatten({"x" * 600: {"y" * 600: 1}})


def test_a_long_list_under_a_long_name_is_refused_before_it_fills_the_memory():
    with pytest.raises(MessageError, match="longer than 1,000 bytes"):
        flatten({"x" * 1_000_000: [1] * 10_000})
