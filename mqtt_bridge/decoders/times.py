"""The time of a message, from its payload: numbers since 1970 and RFC 3339 / ISO 8601 texts.

A time is an int, microseconds since 1970-01-01 UTC; finer fractions are cut off. A time that cannot be right (before
2000, or more than a day ahead of the arrival) is not used: wrong clocks must not spread rows over centuries of
partitions.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

from mqtt_bridge.decoders.text import parse_number
from mqtt_bridge.decoders.values import Repair

KEYS = ("time", "timestamp", "ts")
"""Where a payload's time is looked for, in this order, when its route does not say."""

EARLIEST_US = 946_684_800_000_000
"""2000-01-01 UTC."""
MAX_AHEAD_US = 86_400_000_000
"""A day, so that a local time without its zone passes."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_NAIVE = datetime(1970, 1, 1)
_MICROSECOND = timedelta(microseconds=1)
_MAX_TEXT = 64

# Numbers from here on are of that unit.
_MILLISECONDS, _MICROSECONDS = 10**11, 10**14

_LEAP_SECOND = re.compile(r"([T ][0-9]{2}:?[0-9]{2}:?)60")
_END_OF_DAY = re.compile(r"([T ])24(?=:?00(?::?00(?:[.,]0*)?)?(?:Z|[+-]|$))")
_ZONE_NAME = re.compile(r" ?(?:UTC|GMT)$")


def take(document: dict[str, Any], received_us: int, repairs: list[Repair]) -> int:
    """Remove the time from the top level of a document and return it; the arrival time where there is none.

    A time that cannot be used stays in the document, to be stored as a metric.
    """
    unusable = False
    for key in KEYS:
        if (value := document.get(key)) is not None:
            if type(value) is int and _MILLISECONDS <= value < _MICROSECONDS:  # what most devices send
                time_us: int | None = value * 1000
            else:
                time_us = parse(value)
            if time_us is not None and EARLIEST_US <= time_us <= received_us + MAX_AHEAD_US:
                del document[key]
                return time_us
            unusable = True
    if unusable:
        repairs.append("time_replaced")
    return received_us


def parse(value: Any) -> int | None:
    """Microseconds since 1970 for a number or text that means a time, plausible or not; else None."""
    kind = type(value)
    if kind is int or kind is float:
        return _from_number(value)
    if kind is not str or len(value) > _MAX_TEXT:
        return None
    # A fifth character "-" ends the year of a date. Texts without it may be numbers, which must not be read as dates.
    if value[4:5] != "-" and (number := parse_number(value.strip())) is not None:
        return _from_number(number)
    return _from_text(value)


def _from_number(number: int | float) -> int | None:
    """Seconds, milli-, micro- or nanoseconds: a plausible time lies in one unit's range only."""
    if not 0 <= number < 1e20:  # also false for NaN
        return None
    if number < _MILLISECONDS:
        return round(number * 1e6)
    if number < _MICROSECONDS:
        return round(number * 1e3)
    return int(number) if number < 1e17 else int(number) // 1000


def _from_text(text: str) -> int | None:
    try:
        return _microseconds(datetime.fromisoformat(text))
    except ValueError:
        return _from_unusual_text(text)


def _from_unusual_text(text: str) -> int | None:
    """What the standards allow and `fromisoformat` refuses: lower case, leap seconds, the hour 24; and `UTC`."""
    text = _ZONE_NAME.sub("Z", text.strip().upper())
    text, leap_seconds = _LEAP_SECOND.subn(r"\g<1>59", text, count=1)
    text, days = _END_OF_DAY.subn(r"\g<1>00", text, count=1)
    try:
        time_us = _microseconds(datetime.fromisoformat(text))
    except ValueError:
        return None
    return time_us + leap_seconds * 1_000_000 + days * 86_400_000_000


def _microseconds(moment: datetime) -> int:
    return (moment - (_EPOCH_NAIVE if moment.tzinfo is None else _EPOCH)) // _MICROSECOND
