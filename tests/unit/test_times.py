"""The time of a message, from its payload."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_bridge.decoders.times import EARLIEST_US, MAX_AHEAD_US, parse, take

SECOND = 1_000_000
DAY = 86_400 * SECOND
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def us(*moment):
    return (datetime(*moment, tzinfo=UTC) - EPOCH) // timedelta(microseconds=1)


NOON = us(2024, 4, 21, 12)
RECEIVED = us(2024, 4, 21, 12, 0, 5)


@pytest.mark.parametrize(
    "number",
    [
        NOON // SECOND,
        NOON / SECOND,
        NOON // 1_000,
        float(NOON // 1_000),
        NOON,
        float(NOON),
        NOON * 1_000,
        NOON * 1_000 + 999,
        str(NOON // SECOND),
        f" {NOON // SECOND}.0 ",
        str(NOON // 1_000),
        str(NOON),
        str(NOON * 1_000),
        "1.7137008e9",
    ],
)
def test_seconds_milli_micro_and_nanoseconds_are_told_apart_also_as_text(number):
    assert parse(number) == NOON


@pytest.mark.parametrize(
    ("number", "time_us"),
    [
        (1708326851.41, 1_708_326_851_410_000),
        ("1708326851.41", 1_708_326_851_410_000),
        (1708326851412.5, 1_708_326_851_412_500),
        (1676522982000000999, 1_676_522_982_000_000),
    ],
)
def test_fractions_are_kept_down_to_the_microsecond(number, time_us):
    assert parse(number) == time_us


@pytest.mark.parametrize(
    "text",
    [
        "2024-04-21T12:00:00Z",
        "2024-04-21T12:00:00",
        "2024-04-21 12:00:00",
        "2024-04-21t12:00:00z",
        "2024-04-21T12:00:00.000Z",
        "2024-04-21T12:00:00.000000999Z",
        "2024-04-21T12:00:00,000",
        "2024-04-21T14:00:00+02:00",
        "2024-04-21T14:00:00+0200",
        "2024-04-21T14:00:00+02",
        "2024-04-21T06:30:00-05:30",
        "2024-04-21T12:00:00-00:00",
        "2024-04-21T12:00",
        "20240421T120000Z",
        "20240421T120000",
        "20240421t120000z",
        " 2024-04-21T12:00:00Z\n",
        "2024-04-21 12:00:00 UTC",
        "2024-04-21 12:00:00GMT",
        "2024-W16-7T12:00:00Z",
        "2024-04-21T11:59:60Z",
        "20240421T115960Z",
    ],
)
def test_texts_of_rfc_3339_and_iso_8601_are_understood_and_naive_ones_are_utc(text):
    assert parse(text) == NOON


@pytest.mark.parametrize(
    ("text", "time_us"),
    [
        ("2016-12-31T23:59:60Z", us(2017, 1, 1)),
        ("2016-12-31t23:59:60.5z", us(2017, 1, 1) + SECOND // 2),
        ("2017-01-01T00:59:60+01:00", us(2017, 1, 1)),
        ("2024-04-21T24:00:00Z", us(2024, 4, 22)),
        ("2024-12-31 24:00:00", us(2025, 1, 1)),
        ("2024-02-28T24:00", us(2024, 2, 29)),
        ("2024-04-21T24:00:00.000+02:00", us(2024, 4, 21, 22)),
        ("2020-02-12T15:15:46.014773143Z", us(2020, 2, 12, 15, 15, 46, 14773)),
        ("2024-04-21", us(2024, 4, 21)),
        ("20240421", 20_240_421 * SECOND),  # a number: seconds since 1970, in August of that year
        ("1210101012345", 1_210_101_012_345_000),
    ],
)
def test_leap_seconds_the_hour_24_and_nanoseconds_are_understood(text, time_us):
    assert parse(text) == time_us


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        "",
        " ",
        "now",
        "12:00:00",
        "2024-13-01T00:00:00Z",
        "2024-04-21T24:00:01Z",
        "2024-04-21T24:30:00Z",
        "2024-04-21T25:00:00Z",
        "2024-04-21T12:00:61Z",
        "٢٠٢٤-٠٤-٢١",
        "0T00:10:11",
        "\ud800",
        "2024-04-21T12:00:00Z" + " " * 100,
        "9" * 5_000,
        {},
        [NOON],
        -1,
        -1.5,
        10**30,
        10**400,
        1e300,
        float("nan"),
        float("inf"),
        float("-inf"),
    ],
)
def test_what_means_no_time_is_none(value):
    assert parse(value) is None


@pytest.mark.parametrize("key", ["time", "timestamp", "ts"])
def test_the_time_is_taken_out_of_the_document(key):
    document, repairs = {"t": 21.5, key: NOON // SECOND}, []

    time_us = take(document, RECEIVED, repairs)

    assert time_us == NOON
    assert document == {"t": 21.5}
    assert repairs == []


def test_other_spellings_and_deeper_levels_are_no_time():
    document = {"Time": NOON, "TS": NOON, "params": {"ts": NOON}}

    assert take(document, RECEIVED, []) == RECEIVED
    assert len(document) == 3


@pytest.mark.parametrize("document", [{}, {"t": 1}, {"time": None}])
def test_without_a_time_the_arrival_time_holds_and_nothing_is_counted(document):
    repairs = []

    assert take(document, RECEIVED, repairs) == RECEIVED
    assert repairs == []


def test_the_first_usable_time_is_taken_and_the_others_remain_values():
    document, repairs = {"ts": NOON // SECOND, "timestamp": NOON // SECOND - 60, "time": "garbage"}, []

    time_us = take(document, RECEIVED, repairs)

    assert time_us == NOON - 60 * SECOND
    assert document == {"ts": NOON // SECOND, "time": "garbage"}
    assert repairs == []


@pytest.mark.parametrize(
    "value",
    [
        "",
        "garbage",
        True,
        0,
        1,
        -5,
        10**30,
        float("nan"),
        "1999-12-31T23:59:59Z",
        "4020-01-01T00:00:00Z",
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T24:00:00Z",
        "9999-12-31T23:59:59-23:59",
        {"h": 1},
    ],
)
def test_a_time_that_cannot_be_right_is_replaced_listed_once_and_kept_as_a_value(value):
    document, repairs = {"time": value, "ts": value}, []

    assert take(document, RECEIVED, repairs) == RECEIVED
    assert document == {"time": value, "ts": value}
    assert repairs == ["time_replaced"]


@pytest.mark.parametrize("time_us", [EARLIEST_US, RECEIVED, RECEIVED + MAX_AHEAD_US])
def test_the_plausible_range_begins_in_2000_and_ends_a_day_after_arrival(time_us):
    iso = (EPOCH + timedelta(microseconds=time_us)).isoformat()

    assert take({"ts": iso}, RECEIVED, []) == time_us


@pytest.mark.parametrize("time_us", [EARLIEST_US - 1, RECEIVED + MAX_AHEAD_US + 1])
def test_a_microsecond_outside_of_the_range_is_not_plausible(time_us):
    iso = (EPOCH + timedelta(microseconds=time_us)).isoformat()
    repairs = []

    assert take({"ts": iso}, RECEIVED, repairs) == RECEIVED
    assert repairs == ["time_replaced"]


@given(st.text(max_size=80) | st.integers() | st.floats() | st.booleans())
def test_anything_is_a_time_or_none(value):
    assert type(parse(value)) in (int, type(None))


@given(
    st.from_regex(
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}([.,][0-9]+)?([Zz]|[+-][0-9]{2}:?([0-9]{2})?)?"
    )
)
def test_anything_that_looks_like_a_time_is_one_or_none(value):
    assert type(parse(value)) in (int, type(None))


@given(st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2100, 1, 1), timezones=st.timezones()))
def test_every_moment_of_this_century_comes_back_from_its_text(moment):
    expected = (moment.astimezone(UTC) - EPOCH) // timedelta(microseconds=1)

    assert parse(moment.isoformat()) == expected


@given(st.integers(EARLIEST_US, us(2100, 1, 1)))
def test_every_moment_of_this_century_comes_back_from_its_numbers(time_us):
    assert parse(time_us) == parse(time_us * 1_000) == parse(time_us / 1e6) == parse(str(time_us / 1e6)) == time_us
    assert parse(time_us // 1_000) == time_us // 1_000 * 1_000
