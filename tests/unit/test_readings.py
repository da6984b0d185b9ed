"""Rows of the narrow shape, packed and unpacked."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_bridge.readings import EPOCH_US, Readings

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ROWS = st.tuples(
    st.integers(-(2**62), 2**62),
    TEXTS,
    TEXTS,
    st.none() | st.floats(allow_nan=False) | st.integers(-(2**53), 2**53),
    st.none() | TEXTS,
)


@given(st.lists(ROWS, max_size=5))
def test_what_was_packed_is_unpacked_again(rows):
    packed = Readings.of(rows)

    assert list(packed) == rows
    assert len(packed) == len(rows)
    assert all(row in packed for row in rows)


def test_numbers_look_as_postgresql_shows_them():
    values = [21.0, 21.5, -3, 0.0, -0.0, 1e300, math.inf]

    shown = [value for _, _, _, value, _ in Readings.of([(EPOCH_US, "d", "m", value, None) for value in values])]

    assert list(map(str, shown)) == ["21", "21.5", "-3", "0", "-0.0", "1e+300", "inf"]


def test_only_a_row_that_is_there_is_found():
    assert (EPOCH_US, "d", "m", 1.0, None) not in Readings.of([(EPOCH_US, "d", "m", 2.0, None)])
    assert repr(Readings.of([(EPOCH_US, "d", "m", 2.0, None)])).startswith("Readings([(946684800000000, 'd'")


@pytest.mark.parametrize("metric", ["\ud800", None, 1])
def test_a_name_that_is_no_text_is_refused(metric):
    with pytest.raises((ValueError, AttributeError)):
        Readings.of([(EPOCH_US, "d", metric, 1.0, None)])
