"""Plain text, as devices publish that send one value a topic: a number, true or false, or just text.

Python's own `float` takes more for a number than devices mean by one (`1_000`, `infinity`, Arabic digits), hence the
pattern here. A decimal comma makes a text, and so do leading zeros without a fraction: `0123` is more likely a name
than a quantity, and a number would lose the zero.
"""

from __future__ import annotations

import math
import re

from mqtt_bridge.errors import MessageError

HUGE = 2**63
"""From here on documents hold whole numbers as int only: JSON's fast parser rounds such integers to a float
(`values.RoundedInteger`), and a float this large is whole anyway."""

WHITE_SPACE = " \t\r\n"
BLANK = WHITE_SPACE + "\0"
"""Not part of a value when around it: `echo` adds a line feed, C programs send the NUL that ends their string."""

_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)|[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf(?:inity)?)", re.IGNORECASE)

# `None` is what ESPHome and Python programs send for "no value".
_WORDS = {"": None, "null": None, "None": None, "true": True, "false": False}


def decode(payload: bytes) -> bool | int | float | str | None:
    """The one value that the payload is, without white space around it (as Telegraf's `value` format reads it)."""
    characters = read(payload)
    bare = characters.strip(BLANK)
    if bare in _WORDS:
        return _WORDS[bare]
    if _NOT_FINITE.fullmatch(bare):
        return math.nan
    number = parse_number(bare)
    return characters.strip(WHITE_SPACE) if number is None else number


def read(payload: bytes) -> str:
    """The characters of a payload, without a byte order mark; MessageError when they are not UTF-8."""
    try:
        return payload.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found = f"byte 0x{payload[error.start]:02x} at position {error.start}"
        raise MessageError(f"The payload is neither JSON nor text: it is not UTF-8 ({found}).") from error


def parse_number(characters: str) -> int | float | None:
    """The number that the characters spell, infinity where a double cannot hold it; None when they spell none."""
    if not _NUMBER.fullmatch(characters):
        return None
    if not _INTEGER.fullmatch(characters):
        return parse_float(characters)
    try:
        return int(characters)
    except ValueError:  # beyond Python's limit of 4,300 digits
        return None


def parse_float(characters: str) -> int | float:
    """A double, as an int where it is `HUGE`."""
    value = float(characters)
    return int(value) if HUGE <= abs(value) < math.inf else value
