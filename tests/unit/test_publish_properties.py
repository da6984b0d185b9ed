"""The properties of a message: each type, and everything that is none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_bridge import publish_properties
from mqtt_bridge.publish_properties import decode, variable_length
from tests.packets import text, variable

EACH = {
    "payload format": (b"\x01\x01", {"PayloadFormatIndicator": 1}),
    "message expiry": (b"\x02\x00\x01\x51\x80", {"MessageExpiryInterval": 86_400}),
    "content type": (b"\x03" + text(b"text/plain"), {"ContentType": "text/plain"}),
    "response topic": (b"\x08" + text("antwört".encode()), {"ResponseTopic": "antwört"}),
    "correlation data": (b"\x09" + text(b"\x00\xff"), {"CorrelationData": "00ff"}),
    "no correlation data": (b"\x09" + text(b""), {"CorrelationData": ""}),
    "subscription identifier": (b"\x0b\xff\xff\xff\x7f", {"SubscriptionIdentifier": [268_435_455]}),
    "two of them": (b"\x0b\x01\x0b\x80\x01", {"SubscriptionIdentifier": [1, 128]}),
    "topic alias": (b"\x23\x01\x02", {"TopicAlias": 258}),
    "user property": (b"\x26" + text(b"a") + text(b"b"), {"UserProperty": [["a", "b"]]}),
    "the same one again": (2 * (b"\x26" + text(b"a") + text(b"")), {"UserProperty": [["a", ""], ["a", ""]]}),
    "byte order mark": (
        b"\x26" + text(b"\xef\xbb\xbfa") + text(b"\xef\xbb\xbf"),
        {"UserProperty": [["\ufeffa", "\ufeff"]]},
    ),
    "NUL": (b"\x26" + text(b"a\x00") + text(b"\x00"), {"UserProperty": [["a\x00", "\x00"]]}),
    "none": (b"", None),
}


@pytest.mark.parametrize("case", EACH)
def test_each_property_is_read_under_its_name_in_the_standard(case):
    content, expected = EACH[case]

    assert decode(content) == expected


def test_properties_stand_side_by_side():
    content = b"".join(content for content, _ in EACH.values())

    found = decode(content)

    assert found["UserProperty"] == [["a", "b"], ["a", ""], ["a", ""], ["\ufeffa", "\ufeff"], ["a\x00", "\x00"]]
    assert found["SubscriptionIdentifier"] == [268_435_455, 1, 128]
    assert list(found)[:4] == ["PayloadFormatIndicator", "MessageExpiryInterval", "ContentType", "ResponseTopic"]


UNREADABLE = {
    "unknown": b"\x7e\x01",
    "not of a PUBLISH": b"\x21\x00\x14",
    "number cut short": b"\x02\x00\x00",
    "no number": b"\x01",
    "text cut short": b"\x03\x00\x05abcd",
    "length of a text cut short": b"\x03\x00",
    "pair without its value": b"\x26" + text(b"a"),
    "not UTF-8": b"\x03" + text(b"\xff"),
    "a surrogate": b"\x26" + text(b"\xed\xa0\x80") + text(b""),
    "identifier cut short": b"\x0b\xff\xff",
    "identifier without end": b"\x0b\xff\xff\xff\xff\x01",
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_kept_as_it_came(case):
    content = b"\x01\x00" + UNREADABLE[case]

    assert decode(content) == {"undecodable": content.hex()}


@given(st.binary(max_size=300))
def test_any_bytes_become_something_that_json_can_hold(content):
    found = decode(content)

    assert (found is None) == (not content)
    assert json.loads(json.dumps(found)) == found


def test_long_properties_do_not_fill_the_memory():
    publish_properties._remembered.cache_clear()

    for number in range(100):
        decode(b"\x26" + text(b"key") + text(b"%0300d" % number))

    assert publish_properties._remembered.cache_info().currsize == 0


def test_properties_that_come_again_and_again_are_read_once():
    content = b"\x26" + text(b"once") + text(b"only")

    assert decode(content) is decode(bytes(bytearray(content)))


@given(st.integers(0, 268_435_455), st.binary(max_size=3))
def test_a_length_is_read_wherever_it_stands(value, before):
    data = before + variable(value) + b"\xff"

    assert variable_length(data, len(before)) == (value, len(data) - 1)


def test_a_length_of_more_than_four_bytes_is_none():
    with pytest.raises(OverflowError):
        variable_length(b"\x80\x80\x80\x80\x01", 0)
    with pytest.raises(IndexError):
        variable_length(b"\x80\x80\x80", 0)
