"""The search for messages at fault, against servers that name the right one, a wrong one, or none."""

from __future__ import annotations

from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_bridge.errors import Failure, Verdict
from mqtt_bridge.isolation import CHUNK, Refusal, key_of, line_of, search

MOST = 400


class Server:
    """Stores runs of messages, all or none; refuses those that hold a message at fault."""

    def __init__(self, count, bad, suspects):
        self.count = count
        self.bad = frozenset(bad)
        self.suspects = suspects  # (start, stop, first message at fault) -> what is named
        self.stored = []
        self.tries = 0

    def store(self, start, stop):
        self.tries += 1
        assert 0 <= start < stop <= self.count
        if refusal := self.refusal(start, stop):
            return refusal
        self.stored.extend(range(start, stop))
        return None

    def refusal(self, start, stop):
        first = next((index for index in range(start, stop) if index in self.bad), None)
        if first is None:
            return None
        return Refusal(start, stop, Failure(Verdict.ROW, f"bad {first}"), self.suspects(start, stop, first))


def first(_start, _stop, bad):
    return bad


def none(_start, _stop, _bad):
    return None


def begin(start, _stop, _bad):
    return start


def end(_start, stop, _bad):
    """As PostgreSQL does for a row that does not fit into a page: it notices when it writes a thousand at once."""
    return stop - 1


def outside(_start, stop, _bad):
    return stop + 10


def late(_start, stop, bad):
    return min(bad + 1, stop - 1)


HONESTY = {f.__name__: f for f in (first, none, begin, end, outside, late)}

counts = st.integers(0, MOST)
bad_ones = st.one_of(
    st.sets(st.integers(0, MOST - 1), max_size=MOST),
    st.sets(st.integers(0, MOST - 1), max_size=5),
    st.tuples(counts, counts).map(lambda ends: set(range(*sorted(ends)))),
)


@given(count=counts, bad=bad_ones, honesty=st.sampled_from(sorted(HONESTY)), tried=st.booleans(), data=st.data())
def test_exactly_the_messages_at_fault_are_refused_and_all_others_stored_in_order(count, bad, honesty, tried, data):
    def whim(start, stop, bad):
        return data.draw(st.one_of(st.none(), st.just(bad), st.integers(start - 2, stop + 2)))

    server = Server(
        count, {index for index in bad if index < count}, data.draw(st.sampled_from([HONESTY[honesty], whim]))
    )
    seen = server.refusal(0, count) if tried else None

    refused = search(count, server.store, seen=seen)

    assert {index: failure.sentence for index, failure in refused.items()} == {n: f"bad {n}" for n in server.bad}
    assert server.stored == [index for index in range(count) if index not in server.bad]
    # A try that fails for each, at most one wrong way to narrow it down, halving, the message alone; chunks that grow.
    each = 4 + log2(max(count, 1)) + 1
    assert server.tries <= len(server.bad) * each + log2(max(count, 1)) + 2


@given(count=counts, bad=bad_ones, tried=st.booleans())
def test_with_a_server_that_names_the_right_one_four_tries_each_are_enough(count, bad, tried):
    server = Server(count, {index for index in bad if index < count}, first)
    seen = server.refusal(0, count) if tried else None

    search(count, server.store, seen=seen)

    assert server.tries <= 4 * len(server.bad) + log2(max(count / CHUNK, 1)) + 2


@given(count=counts, tried=st.booleans())
def test_when_every_message_is_at_fault_hardly_more_than_one_try_each_is_needed(count, tried):
    server = Server(count, range(count), first)
    seen = server.refusal(0, count) if tried else None

    refused = search(count, server.store, seen=seen)

    assert len(refused) == count
    assert server.tries <= count + log2(CHUNK) + 2


def test_a_clean_batch_is_one_try():
    server = Server(2000, (), none)

    assert search(2000, server.store) == {}

    assert server.tries == 1


def test_nothing_to_store_is_no_try():
    server = Server(0, (), none)

    assert search(0, server.store) == {}

    assert server.tries == 0


@given(count=counts, data=st.data())
def test_what_is_refused_together_but_not_alone_is_stored_in_the_end(count, data):
    """As with a trigger for each statement, or a lie: the search ends, and nobody innocent is refused."""
    stored = []

    def store(start, stop):
        assert 0 <= start < stop <= count
        if stop - start > 1 and data.draw(st.booleans()):
            return Refusal(start, stop, Failure(Verdict.ROW, "not so many"), data.draw(st.integers(start, stop)))
        stored.extend(range(start, stop))
        return None

    assert search(count, store) == {}

    assert stored == list(range(count))


# -- what the server says


@pytest.mark.parametrize(
    "context",
    [
        "COPY readings, line 17",
        "COPY readings, line 17, column value",
        'COPY readings, line 17, column pm25: "3.5"',
        "COPY readings, Zeile 17, Spalte value2",
        "COPY readings, línea 17",
        "COPY readings, ligne 17, colonne value",
        "readingsのCOPY、行 17、列 value",
        "readings 복사, 17번째 줄, value 열",
        "COPY readings, 行 17",
        "COPY readings, строка 17",
        "PL/pgSQL function refuse(readings) line 3 at RAISE\nCOPY readings, line 17",
        "COPY readings, line 4\nPL/pgSQL function copy_on() line 5 at EXECUTE\nCOPY readings, line 17",
    ],
)
def test_the_line_is_found_in_every_language(context):
    assert line_of(context, "readings") == 17
    assert line_of(context, "public.readings") == 17


@pytest.mark.parametrize(
    "context",
    [
        "",
        "PL/pgSQL function refuse() line 1 at RAISE",
        "COPY readings2, line 17",
        "COPY old_readings, line 17",
        "COPY readings, line 17\nSQL statement",
        "COPY readings",
        "COPY readings, line 0",
    ],
)
def test_where_no_line_of_this_table_is_named_none_is_found(context):
    assert line_of(context, "readings") is None


def test_a_table_with_digits_and_odd_characters_in_its_name_has_lines_as_well():
    assert line_of("COPY air 2.5 (µg), line 17, column pm25", "site.air 2.5 (µg)") == 17


@pytest.mark.parametrize(
    ("detail", "expected"),
    [
        ('Key (device)=(d1) is not present in table "devices".', (("device",), "d1")),
        ("Schlüssel (device)=(d 1) ist nicht in Tabelle »devices« vorhanden.", (("device",), "d 1")),
        ('Key (device)=(a (b)) is not present in table "devices".', (("device",), "a (b)")),
        ("Key (device, metric)=(d1, m) already exists.", (("device", "metric"), "d1, m")),
        ('Key (device)=() is not present in table "devices".', (("device",), "")),
        ('Key is not present in table "devices".', None),
        ("Failing row contains (2026-01-01, d1, m, -1, null).", None),
        ("", None),
    ],
)
def test_the_key_is_found_in_every_language(detail, expected):
    assert key_of(detail) == expected
