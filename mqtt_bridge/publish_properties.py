"""The properties of a PUBLISH packet (MQTT 5, sections 2.2.2 and 3.3.2.3), as JSON can hold them.

They are a message's own affair: where they cannot be read their bytes are kept, and the message goes its way. paho
refuses the whole connection for one that it does not like (a byte order mark in a user property, say, which the
standard allows): the broker would deliver that message again and again, and nothing behind it would ever arrive.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from mqtt_bridge.model import Properties

TOPIC_ALIAS = "TopicAlias"
USER_PROPERTY = "UserProperty"
_LONGEST_REMEMBERED = 200
"""Bytes of properties that are remembered: most devices send the same ones over and over, and nobody can fill the
memory with them."""

_Value = tuple[Any, int]
"""What was read, and where the next property begins."""


def decode(content: bytes) -> Properties:
    """The properties by their names in the standard, without spaces; None where there are none.

    `CorrelationData` is in hexadecimal digits, `UserProperty` a list of pairs, `SubscriptionIdentifier` a list.
    Whoever gets them must not change them.
    """
    return _remembered(content) if len(content) <= _LONGEST_REMEMBERED else _decode(content)


def _decode(content: bytes) -> Properties:
    found: dict[str, Any] = {}
    position = 0
    try:
        while position < len(content):
            name, read = _KINDS[content[position]]
            value, position = read(content, position + 1)
            if name in _LISTS:
                found.setdefault(name, []).append(value)
            else:
                found[name] = value
    except (KeyError, IndexError, OverflowError, UnicodeDecodeError):
        return {"undecodable": content.hex()}
    return found or None


_remembered = lru_cache(maxsize=4096)(_decode)


def _number(size: int) -> Callable[[bytes, int], _Value]:
    def read(content: bytes, start: int) -> _Value:
        return int.from_bytes(_slice(content, start, size), "big"), start + size

    return read


def _variable(content: bytes, start: int) -> _Value:
    return variable_length(content, start)


def _binary(content: bytes, start: int) -> _Value:
    value, end = _counted(content, start)
    return value.hex(), end


def _text(content: bytes, start: int) -> _Value:
    value, end = _counted(content, start)
    return value.decode(), end


def _pair(content: bytes, start: int) -> _Value:
    name, middle = _text(content, start)
    value, end = _text(content, middle)
    return [name, value], end


def _counted(content: bytes, start: int) -> tuple[bytes, int]:
    length, begin = _number(2)(content, start)
    return _slice(content, begin, length), begin + length


def _slice(content: bytes, start: int, size: int) -> bytes:
    if start + size > len(content):
        raise IndexError("a property that is cut short")
    return content[start : start + size]


_KINDS: dict[int, tuple[str, Callable[[bytes, int], _Value]]] = {
    0x01: ("PayloadFormatIndicator", _number(1)),
    0x02: ("MessageExpiryInterval", _number(4)),
    0x03: ("ContentType", _text),
    0x08: ("ResponseTopic", _text),
    0x09: ("CorrelationData", _binary),
    0x0B: ("SubscriptionIdentifier", _variable),
    0x23: (TOPIC_ALIAS, _number(2)),
    0x26: (USER_PROPERTY, _pair),
}
_LISTS = frozenset({"SubscriptionIdentifier", USER_PROPERTY})


def variable_length(data: bytes, start: int) -> tuple[int, int]:
    """A variable byte integer (MQTT 5, section 1.5.5) and where it ends; IndexError when it is cut short.

    OverflowError is raised when it does not end after four bytes.
    """
    value = 0
    for shift in (0, 7, 14, 21):
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
    raise OverflowError("a length that does not end")
