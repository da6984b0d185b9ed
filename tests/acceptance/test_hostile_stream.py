"""Whatever a device sends costs that message at most: it is stored, ignored for a reason, or a dead letter."""

from __future__ import annotations

import gzip
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from tests.acceptance.traffic import Publisher, query, wait_until_stored
from tests.scripted_broker import ScriptedBroker
from tests.waiting import wait_until

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Stored:
    """The rows that a payload becomes: metric to (value, value_text)."""

    rows: dict[str, tuple[float | None, str | None]]


@dataclass(frozen=True)
class Dead:
    """The reason why a payload becomes a dead letter, as a regular expression."""

    reason: str
    stage: str = "decode"


@dataclass(frozen=True)
class Ignored:
    """A payload without any value."""


Fate = Stored | Dead | Ignored


def nested(levels: int) -> bytes:
    return b"[" * levels + b"1" + b"]" * levels


def value(number: float) -> tuple[float, None]:
    return number, None


THIRTY_DIGITS = "123456789012345678901234567890"

HOSTILE: dict[str, tuple[bytes, Fate]] = {
    "empty": (b"", Ignored()),
    "null": (b"null", Ignored()),
    "object-without-values": (b'{"a": {}, "b": [], "c": null}', Ignored()),
    "text-of-1-MB": (b"x" * MEGABYTE, Stored({"telemetry": (None, "x" * MEGABYTE)})),
    "list-of-1-MB": (json.dumps(list(range(150_000))).encode(), Dead("more than 10,000 values")),
    "64-levels": (nested(64), Stored({".".join("0" * 64): value(1)})),
    "65-levels": (nested(65), Dead("more than 64 levels")),
    "5000-levels": (nested(5000), Dead("levels|too deeply")),
    "500000-levels": (b"[" * 500_000, Dead("not JSON|too deeply")),
    "100000-keys": (json.dumps({f"k{n}": n for n in range(100_000)}).encode(), Dead("more than 10,000 values")),
    "not-utf8": (b'{"a": "\xff\xfe"}', Dead("not UTF-8")),
    "half-a-character": ("{'a': 'ü'}".encode()[:-3], Dead("not JSON|not UTF-8")),
    "nul-bytes": (b"\0" * 1000, Ignored()),
    "nul-in-text": (b"a\0b", Stored({"telemetry": (None, "ab")})),
    "nul-in-name-and-value": (b'{"n\\u0000ame": "a\\u0000b"}', Stored({"name": (None, "ab")})),
    "nan": (b'{"a": NaN, "b": 1}', Stored({"b": value(1)})),
    "infinity": (b'{"a": Infinity, "b": -Infinity, "c": 1e999, "d": 2}', Stored({"d": value(2)})),
    "only-nan": (b"NaN", Ignored()),
    "integer-of-30-digits": (
        f'{{"a": {THIRTY_DIGITS}}}'.encode(),
        Stored({"a": (float(THIRTY_DIGITS), THIRTY_DIGITS)}),
    ),
    "integer-of-5000-digits": (b'{"a": ' + b"9" * 5000 + b"}", Dead("more than 4,300 digits")),
    "integer-of-4000-digits": (b'{"a": ' + b"9" * 4000 + b"}", Stored({"a": (None, "9" * 4000)})),
    "5000-digits-as-text": (b"9" * 5000, Stored({"telemetry": (None, "9" * 5000)})),
    "duplicate-keys": (b'{"a": 1, "a": 2}', Stored({"a": value(2)})),
    "lone-surrogate": (b'{"a": "\\ud800"}', Dead("lone surrogate")),
    "lone-surrogate-in-name": (b'{"\\udfff": 1}', Dead("lone surrogate")),
    "gzip": (gzip.compress(b'{"a": 1}' * 100, mtime=0), Dead("not UTF-8")),
    "year-4020": (
        b'{"ts": "4020-01-01T00:00:00Z", "a": 1}',
        Stored({"ts": (None, "4020-01-01T00:00:00Z"), "a": value(1)}),
    ),
    "year-4020-in-seconds": (b'{"ts": 64692000000, "a": 1}', Stored({"ts": value(64692000000), "a": value(1)})),
    "time-that-is-huge": (b'{"ts": 1e300, "a": 1}', Stored({"ts": (1e300, None), "a": value(1)})),
    "time-that-is-a-list": (b'{"ts": [1], "a": 1}', Stored({"ts.0": value(1), "a": value(1)})),
    "metric-of-5000-characters": (json.dumps({"m" * 5000: 1}).encode(), Dead("longer than 1,000 bytes")),
    "metric-of-1000-characters": (json.dumps({"m" * 1000: 1}).encode(), Stored({"m" * 1000: value(1)})),
    "open-string": (b'{"a": "' + b"x" * 1000, Dead("not JSON")),
    "trailing-rubbish": (b'{"a": 1} and more', Dead("not JSON")),
    "quotes-and-backslashes": (rb'{"a": "\\N\t\"\\."}', Stored({"a": (None, '\\N\t"\\.')})),
    "sql": (b"'); DROP TABLE readings; --", Stored({"telemetry": (None, "'); DROP TABLE readings; --")})),
}


@pytest.mark.parametrize("receive", ["fast", "stock"])
def test_a_hostile_stream_costs_no_good_message(make_bridge, database, broker, site, receive):
    bridge = make_bridge(database, broker, MQTT_RECEIVE=receive).start().wait_until_ready()
    long_device = "d" * 65_000

    with Publisher(broker, site) as publisher:
        for device, (payload, _) in HOSTILE.items():
            publisher.publish(5)
            publisher.send(f"{site}/{device}/telemetry", payload)
        publisher.send(f"{site}/{long_device}/telemetry", b'{"a": 1}')
        publisher.send(f"{site}/{long_device}/telemetry", b"\xff")
        publisher.publish(5)
        publisher.settle()
    count = len(publisher.published) + len(HOSTILE) + 2
    messages = bridge.wait_for_outcomes(count)

    assert wait_until_stored(database, publisher.published).exact
    for device, (payload, fate) in HOSTILE.items():
        assert fate_of(database, f"{site}/{device}/telemetry", device, payload, fate) == fate, device
    letters = query(database, "SELECT topic, payload, stage FROM mqtt_bridge.dead_letters WHERE length(topic) > 65000")
    # Each may be in a batch of its own, and these are stored side by side.
    assert sorted((topic, bytes(payload), stage) for topic, payload, stage in letters) == [
        (f"{site}/{long_device}/telemetry", b'{"a": 1}', "route"),
        (f"{site}/{long_device}/telemetry", b"\xff", "route"),
    ]
    assert messages == {
        "received": count,
        "stored": len(publisher.published) + count_of(Stored),
        "dead_lettered": count_of(Dead) + 2,
        "ignored": count_of(Ignored),
        "duplicate": 0,
        "spooled": 0,
        "dropped": 0,
        "in_flight": 0,
    }
    assert bridge.healthz() == 200
    assert bridge.readyz() == (200, [])


def count_of(kind: type) -> int:
    return sum(isinstance(fate, kind) for _, fate in HOSTILE.values())


def fate_of(database: str, topic: str, device: str, payload: bytes, expected: Fate) -> Fate:
    """What became of one payload, as the database says."""
    rows = query(database, "SELECT metric, value, value_text FROM readings WHERE device = %s", device)
    if rows:
        assert len({metric for metric, _, _ in rows}) == len(rows)
        return Stored({metric: (value, text) for metric, value, text in rows})
    letters = query(database, "SELECT payload, error, stage, qos FROM mqtt_bridge.dead_letters WHERE topic = %s", topic)
    if not letters:
        return Ignored()
    [(kept, error, stage, qos)] = letters
    assert (bytes(kept), qos) == (payload, 1)
    assert isinstance(expected, Dead), error
    assert re.search(expected.reason, error), error
    return Dead(expected.reason, stage)


def test_a_time_in_the_year_4020_is_replaced_by_the_arrival(make_bridge, database, broker, site):
    bridge = make_bridge(database, broker).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.send(f"{site}/clock/telemetry", b'{"ts": "4020-01-01T00:00:00Z", "a": 1}')
        publisher.settle()
    bridge.wait_for_outcomes(1)

    [(time,)] = query(database, "SELECT DISTINCT time FROM readings WHERE device = 'clock'")
    assert abs(datetime.now(UTC) - time) < timedelta(minutes=5)
    assert b"mqtt_bridge_" in bridge.get("/metrics")[1]


def _user_property(name: bytes, content: bytes) -> bytes:
    """MQTT 5, section 3.3.2.3.7."""
    return b"\x26" + struct.pack("!H", len(name)) + name + struct.pack("!H", len(content)) + content


IMPOSSIBLE_TOPICS = {
    b"%s/\xff\xfe/telemetry": "not UTF-8",
    b"%s/a\0b/telemetry": "NUL",
    b"%s/\xed\xa0\x80/telemetry": "not UTF-8",  # a surrogate
}


@pytest.mark.parametrize("receive", ["fast", "stock"])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_topics_that_no_broker_should_let_through_are_dead_letters(make_bridge, database, site, protocol, receive):
    good = f"{site}/good/telemetry".encode()
    with ScriptedBroker() as broker:
        options = {"MQTT_PROTOCOL": protocol, "MQTT_RECEIVE": receive}
        bridge = make_bridge(database, broker, **options).start().wait_until_ready()

        mids = iter(range(1, 100))
        for topic in IMPOSSIBLE_TOPICS:
            broker.publish(good, b'{"a": 1}', mid=next(mids))
            broker.publish(topic % site.encode(), b"\x00payload\xff", mid=next(mids))
        broker.publish(f"elsewhere/{site}".encode(), b"1", mid=next(mids))
        broker.publish(good, b'{"a": 1}', mid=next(mids))
        count = next(mids) - 1

        assert broker.wait_for_pubacks(count) == list(range(1, count + 1))
        messages = bridge.wait_for_outcomes(count)
        assert bridge.healthz() == 200
        assert len(broker.record.connects) == 1

    assert (messages["stored"], messages["dead_lettered"]) == (4, 4)
    letters = query(database, "SELECT topic, payload, error, stage FROM mqtt_bridge.dead_letters ORDER BY id")
    assert [stage for _, _, _, stage in letters] == ["route"] * 4
    for (_, payload, error, _), reason in zip(letters, IMPOSSIBLE_TOPICS.values(), strict=False):
        assert bytes(payload) == b"\x00payload\xff"
        assert reason in error
    assert letters[-1][0] == f"elsewhere/{site}"


POISON: dict[str, Callable[[ScriptedBroker, bytes], None]] = {
    "NUL in a property": lambda broker, topic: broker.publish(
        topic, b"\xff", mid=2, properties=_user_property(b"a\0b", b"c\0d")
    ),
    "a surrogate in a property": lambda broker, topic: broker.publish(
        topic, b"\xff", mid=2, properties=_user_property(b"a", b"\xed\xa0\x80")
    ),
    "a property that is not UTF-8": lambda broker, topic: broker.publish(
        topic, b"\xff", mid=2, properties=_user_property(b"a", b"\xff")
    ),
    "correlation data that is not text": lambda broker, topic: broker.publish(
        topic, b"\xff", mid=2, properties=b"\x09\x00\x02\xff\x00"
    ),
    "many properties": lambda broker, topic: broker.publish(
        topic, b"\xff", mid=2, properties=_user_property(b"a" * 100, b"b" * 1000) * 50
    ),
}


@pytest.mark.parametrize("poison", POISON)
def test_properties_that_no_broker_should_let_through_stop_nothing(make_bridge, database, site, poison):
    topic = f"{site}/d/telemetry".encode()
    with ScriptedBroker() as broker:
        bridge = make_bridge(database, broker).start().wait_until_ready()

        broker.publish(topic, b'{"a": 1}', mid=1)
        POISON[poison](broker, topic)
        broker.publish(topic, b'{"a": 1}', mid=3)

        assert broker.wait_for_pubacks(3) == [1, 2, 3]
        messages = bridge.wait_for_outcomes(3)

    assert (messages["stored"], messages["dead_lettered"]) == (2, 1)
    assert len(broker.record.connects) == 1


def test_a_row_that_a_trigger_refuses_costs_its_message_only(make_bridge, database, broker, site):
    bridge = make_bridge(database, broker, BRIDGE_BATCH_WAIT_MS=200).start().wait_until_ready()
    query(database, "ALTER TABLE readings ADD CONSTRAINT sane CHECK (metric <> 'forbidden')")

    with Publisher(broker, site) as publisher:
        for _ in range(10):
            publisher.publish(20)
            publisher.send(f"{site}/rogue/telemetry", b'{"a": 1, "forbidden": 2}')
        publisher.settle()
    messages = bridge.wait_for_outcomes(210)

    assert wait_until_stored(database, publisher.published).exact
    assert (messages["stored"], messages["dead_lettered"]) == (200, 10)
    letters = query(database, "SELECT payload, stage, sqlstate, error FROM mqtt_bridge.dead_letters")
    assert {(bytes(payload), stage, code) for payload, stage, code, _ in letters} == {
        (b'{"a": 1, "forbidden": 2}', "store", "23514")
    }
    assert len(letters) == 10
    assert all("sane" in error for *_, error in letters)
    assert query(database, "SELECT count(*) FROM readings WHERE device = 'rogue'") == [(0,)]
    wait_until(lambda: bridge.readyz()[0] == 200, what="it to be ready")
