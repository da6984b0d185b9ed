"""From bytes to values, in two steps: a decoder of `FORMATS` reads a payload, `values` makes rows of what it found.

A decoder is a function from the payload to a document: None, a bool, a number, a text, or lists and dicts of these.
It raises MessageError for bytes that it cannot read, and no other exception. Decoders keep no state; every worker
thread uses the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from mqtt_bridge.decoders import json, text

Decoder = Callable[[bytes], Any]


def auto(payload: bytes) -> Any:
    """JSON where the payload is JSON; an error where it only begins like JSON; else plain text."""
    try:
        return orjson.loads(payload)
    except orjson.JSONDecodeError:
        return json.exact(payload) if json.begins_like_json(payload) else text.decode(payload)


FORMATS: dict[str, Decoder] = {
    "auto": auto,
    "json": json.decode,
    "text": text.decode,
}
"""The decoders by the name that a route's `format` gives them."""
