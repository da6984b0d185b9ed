"""JSON, at orjson's speed, and what devices send in its place.

orjson is strict and rounds integers beyond 64 bits. `exact` is the second, slower reading for the payloads that need
it: integers of any size, not-a-number and infinity in C's spelling (Tasmota sends `nan`), a byte order mark, NULs at
the end. It ends in bounded time with a document or a MessageError, whatever the bytes.
"""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

from mqtt_bridge.decoders.text import BLANK, parse_float, read
from mqtt_bridge.errors import MessageError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# Strings are matched too, and left as they are; an open one is taken to its end, so that time stays linear.
_STRING_OR_WORD = re.compile(
    r'"(?:[^"\\]++|\\.)*+"?|[+-]?\b(?:nan|inf(?:inity)?)\b',
    re.IGNORECASE | re.DOTALL,
)


def decode(payload: bytes) -> Any:
    """The document that the payload is."""
    try:
        return orjson.loads(payload)
    except orjson.JSONDecodeError:
        return exact(payload)


def begins_like_json(payload: bytes) -> bool:
    """Whether the payload begins as an object, a list or a string does."""
    return payload.removeprefix(_BYTE_ORDER_MARK).lstrip(b" \t\r\n")[:1] in (b"{", b"[", b'"')


def exact(payload: bytes) -> Any:
    """The document with every integer exact, None for a blank payload; MessageError with the parser's reason."""
    characters = read(payload).rstrip(BLANK)
    if not characters:
        return None
    try:
        document = json.loads(_STRING_OR_WORD.sub(_standard_spelling, characters), parse_float=parse_float)
        _check_surrogates(document, characters)
    except json.JSONDecodeError as error:
        raise MessageError(f"The payload is not JSON: {error}.") from error
    except UnicodeEncodeError as error:
        raise MessageError("The payload is not JSON: a \\u escape is half a character (a lone surrogate).") from error
    except RecursionError as error:
        raise MessageError("The payload is nested too deeply.") from error
    except ValueError as error:
        raise MessageError("The payload has an integer of more than 4,300 digits.") from error
    return document


def _standard_spelling(found: re.Match[str]) -> str:
    """`NaN` in place of any word for a number that is not finite; as long as the word, to keep positions true."""
    word = found[0]
    return word if word.startswith('"') else "NaN".rjust(len(word))


def _check_surrogates(document: Any, characters: str) -> None:
    if "\\u" in characters:
        json.dumps(document, ensure_ascii=False).encode()
