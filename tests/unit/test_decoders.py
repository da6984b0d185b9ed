"""From payload bytes to a document: the formats `auto`, `json` and `text`."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_bridge.decoders import FORMATS
from mqtt_bridge.decoders.json import exact
from mqtt_bridge.errors import MessageError

auto, strict_json, text = FORMATS["auto"], FORMATS["json"], FORMATS["text"]


@pytest.mark.parametrize(
    ("payload", "document"),
    [
        (b'{"a": [1, 2.5, true, null, "x"]}', {"a": [1, 2.5, True, None, "x"]}),
        (b"21.5", 21.5),
        (b" 21.5\n", 21.5),
        (b"true", True),
        (b"null", None),
        (b'"on"', "on"),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        ("\ufeff{}".encode(), {}),
        (b'{"value":15}\0', {"value": 15}),
        (b'\r\n {"value":15} \r\n\0\0', {"value": 15}),
        ("\ufeff21.5".encode(), 21.5),
    ],
)
def test_what_is_json_is_read_as_json_also_with_a_byte_order_mark_or_nuls_at_its_end(payload, document):
    assert auto(payload) == document
    assert strict_json(payload.removesuffix(b"\0")) == document


@pytest.mark.parametrize(
    ("payload", "number"),
    [
        (b"+21.5", 21.5),
        (b"-.5", -0.5),
        (b"5.", 5.0),
        (b"001234.567", 1234.567),
        (b"21.5\0", 21.5),
        (b"\t21.5\r\n\0", 21.5),
        (b"1e3", 1000.0),
        (b"+18446744073709551617", 18446744073709551617),
    ],
)
def test_a_plain_number_need_not_be_a_json_number(payload, number):
    assert auto(payload) == number
    assert text(payload) == number


@pytest.mark.parametrize(
    "payload",
    [
        "1_000",
        "١٢",
        "0123",
        "-007",
        "21,5",
        "0x1F",
        "1e",
        "e5",
        ".",
        "+",
        "--1",
        "1 2",
        "21.5 C",
        "1.2.3",
        "٣.٥",
        "1e٣",
    ],
)
def test_what_python_or_an_optimist_takes_for_a_number_is_text(payload):
    assert auto(payload.encode()) == payload
    assert text(payload.encode()) == payload


@pytest.mark.parametrize(
    "payload", ["on", "OFF", "True", "FALSE", "yes", "NULL", "none", "2021-12-24 18:21:00", "größer"]
)
def test_any_other_word_is_text(payload):
    assert auto(payload.encode()) == payload


def test_white_space_around_plain_text_is_left_out_and_kept_inside_a_json_string():
    assert auto(b"  on the way\r\n") == "on the way"
    assert auto(b'"  on the way\\r\\n"') == "  on the way\r\n"


@pytest.mark.parametrize("payload", [b"", b" \r\n", b"\0", b" \0\n", b"null", b"None", b" None\n", "\ufeff".encode()])
def test_a_blank_payload_and_the_words_for_nothing_are_no_value(payload):
    assert auto(payload) is None
    assert text(payload) is None


@pytest.mark.parametrize("word", ["nan", "NaN", "NAN", "-nan", "inf", "Infinity", "-Infinity", "+INF", "iNfInItY"])
def test_not_a_number_and_infinity_are_recognised_in_every_spelling(word):
    assert math.isnan(auto(word.encode()))
    assert math.isnan(text(word.encode()))
    assert math.isnan(strict_json(f'{{"a": [{word}]}}'.encode())["a"][0])


def test_a_word_like_nan_inside_a_string_is_left_alone():
    document = strict_json(rb'{"a": nan, "nan": "nan, \"inf\" -nan", "b": [-inf]}')

    assert document["nan"] == 'nan, "inf" -nan'
    assert math.isnan(document["a"])
    assert math.isnan(document["b"][0])


def test_plain_true_and_false_are_values_as_in_json():
    assert text(b"true\n") is True
    assert text(b"false\0") is False


def test_the_text_format_reads_no_json():
    assert text(b'{"a": 1}') == '{"a": 1}'
    assert text(b'"on"') == '"on"'


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'{"a": 1', "Expecting ',' delimiter: line 1 column 8 (char 7)"),
        (b"{'a': True}", "line 1 column 2 (char 1)"),
        (b'{"a": nan, "b": }', "Expecting value: line 1 column 17 (char 16)"),
        (b"[1, 2", "line 1 column 6 (char 5)"),
        (b"[INFO] booted", "line 1 column 2 (char 1)"),
        (b'"on', "Unterminated string"),
        (b'{"a":1}{"a":2}', "Extra data"),
        (b'{"a":1}\0{"a":2}', "Extra data"),
        (b'{"a": 01}', "line 1 column 8 (char 7)"),
        (rb'"\ud83d"', "surrogate"),
        (rb'{"\udc00": 1}', "surrogate"),
        (b'{"a": "\xff"}', "byte 0xff at position 7"),
        (b"\x1f\x8b\x08\0", "byte 0x8b at position 1"),
        (b"\xff\xd8\xff", "byte 0xff at position 0"),
        (b"[" * 500_000, "too deeply"),
        (b"[" * 200_000 + b"]" * 200_000, "too deeply"),
        (b"[" + b"1" * 5_000 + b"]", "4,300 digits"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason_and_its_place(payload, reason):
    with pytest.raises(MessageError) as refusal:
        auto(payload)

    assert reason in refusal.value.reason
    assert len(refusal.value.reason) < 200
    assert refusal.value.stage == "decode"


def test_the_json_format_refuses_plain_text():
    with pytest.raises(MessageError, match="not JSON"):
        strict_json(b"on")


def test_the_exact_reading_keeps_integers_of_any_size():
    assert exact(b"[18446744073709551616, -9223372036854775809]") == [18446744073709551616, -9223372036854775809]
    assert exact(b"1" * 400) == int("1" * 400)


def test_the_exact_reading_gives_huge_numbers_as_integers_so_that_no_float_may_be_a_rounded_one():
    document = exact(b"[1e20, 1.5, 9223372036854775808.0]")

    assert [type(number) for number in document] == [int, float, int]
    assert document == [1e20, 1.5, 9223372036854775808]


def test_an_integer_of_more_digits_than_python_reads_is_plain_text():
    assert auto(b"1" * 5_000) == "1" * 5_000


def test_a_plain_text_of_megabytes_is_one_value():
    long_text = "lorem ipsum " * 300_000 + "."

    assert auto(long_text.encode()) == long_text


@pytest.mark.parametrize(
    "payload",
    [
        b'{"a":"' + rb"\"" * 1_000_000,
        b'"' * 1_000_000,
        b"{" * 2_000_000,
        b"[" + b"nan," * 500_000,
        b"[" + b"-" * 2_000_000,
        b"0" * 2_000_000,
        b"1." + b"1" * 2_000_000 + b"x",
        b"n" * 2_000_000,
        b"[" + b"1." * 1_000_000,
        b" " * 2_000_000 + b"{",
    ],
)
def test_megabytes_of_nonsense_take_bounded_time(payload):
    # Quadratic time would be hours, and end at the time limit.
    with contextlib.suppress(MessageError):
        auto(payload)


@given(st.binary())
@pytest.mark.parametrize("name", FORMATS)
def test_any_bytes_become_a_document_or_a_message_error(name, payload):
    with contextlib.suppress(MessageError):
        FORMATS[name](payload)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_both_json_readings_agree_on_what_both_can_hold(document):
    payload = json.dumps(document, ensure_ascii=False).encode()

    assert auto(payload) == document
    assert exact(payload) == document
