"""The bytes of COPY ... (FORMAT binary), spelled out. That PostgreSQL reads them so is tested against PostgreSQL."""

from __future__ import annotations

import struct

import pytest

from mqtt_bridge.copying import HEADER, PACKERS, TRAILER, encode_readings, encoder
from mqtt_bridge.readings import EPOCH_US, Readings

NULL = bytes.fromhex("ffffffff")
READINGS_TYPES = ("timestamptz", "text", "text", "float8", "text")


@pytest.mark.parametrize(
    ("type_", "value", "packed"),
    [
        ("timestamptz", EPOCH_US, "00000008 0000000000000000"),
        ("timestamptz", EPOCH_US + 1, "00000008 0000000000000001"),
        ("timestamptz", EPOCH_US - 1, "00000008 ffffffffffffffff"),
        ("text", "", "00000000"),
        ("text", "ab", "00000002 6162"),
        ("text", "é€", "00000005 c3a9e282ac"),
        ("varchar", "ab", "00000002 6162"),
        ("float8", 1.5, "00000008 3ff8000000000000"),
        ("float8", 1, "00000008 3ff0000000000000"),
        ("float8", float("-inf"), "00000008 fff0000000000000"),
        ("int2", -2, "00000002 fffe"),
        ("bool", True, "00000001 01"),
        ("bool", False, "00000001 00"),
        ("bytea", b"\x00\xff", "00000002 00ff"),
        ("jsonb", {"a": 1}, "00000009 01 7b2261223a20317d"),
    ],
)
def test_a_field_is_its_length_and_its_bytes(type_, value, packed):
    assert PACKERS[type_](value) == bytes.fromhex(packed)


def test_every_packer_is_covered_here():
    cases = next(mark for mark in test_a_field_is_its_length_and_its_bytes.pytestmark if mark.name == "parametrize")

    assert {type_ for type_, *_ in cases.args[1]} == set(PACKERS)


def test_no_rows_are_a_header_and_a_trailer():
    assert encoder(["text"])([]) == b"PGCOPY\n\xff\r\n\x00" + bytes(8) + b"\xff\xff"
    assert encode_readings([]) == HEADER + TRAILER


def test_a_row_is_the_number_of_its_fields_and_then_each_of_them():
    data = encoder(["text", "int2"])([[("a", 1)], [(None, None)]])

    first = b"\x00\x02" + b"\x00\x00\x00\x01a" + b"\x00\x00\x00\x02\x00\x01"
    second = b"\x00\x02" + NULL + NULL
    assert data == HEADER + first + second + TRAILER


@pytest.mark.parametrize("row", [("a",), ("a", 1, 2)])
def test_a_row_of_another_length_is_refused(row):
    with pytest.raises(ValueError):
        encoder(["text", "int2"])([[row]])


def test_a_type_that_nobody_can_pack_is_refused_when_the_encoder_is_made():
    with pytest.raises(LookupError):
        encoder(["text", "polygon"])


@pytest.mark.parametrize(
    ("value", "value_text"),
    [(1.5, None), (None, "on"), (9_007_199_254_740_993, "9007199254740993"), (None, None), (0, None), (None, "")],
)
def test_the_encoder_for_readings_writes_the_same_bytes_as_the_general_one(value, value_text):
    rows = [(EPOCH_US + 5, "d", "m", value, value_text), (0, "é", "", value, value_text)]

    expected = encoder(READINGS_TYPES)([rows])
    assert encode_readings([rows]) == encode_readings([rows[:1], rows[1:]]) == expected
    assert encode_readings([Readings.of(rows[:1]), Readings.of(rows[1:])]) == expected


@pytest.mark.parametrize(
    "row",
    [
        (EPOCH_US, "d", "m", 10**400, None),
        (EPOCH_US, "d", "m", "1", None),
        (EPOCH_US, "d\ud800", "m", 1.0, None),
        (EPOCH_US, "d", "m", None, "\udfff"),
        (EPOCH_US + 2**63, "d", "m", 1.0, None),
        (EPOCH_US, "d", "m", 1.0),
    ],
    ids=["beyond a double", "no number", "lone surrogate", "lone surrogate in a text", "beyond all times", "too short"],
)
def test_what_cannot_be_encoded_raises_what_the_sink_takes_for_a_row_at_fault(row):
    with pytest.raises((ValueError, TypeError, OverflowError, struct.error)):
        encode_readings([[row]])
