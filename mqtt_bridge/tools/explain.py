"""What the bridge would do with a message: which route takes it and the rows it becomes, or why it becomes none.

Runs the very code that stores messages and needs neither broker nor database. An explanation is a dict ready for
JSON, in this form:

    {"topic", "outcome": "stored|dead_lettered|ignored", "route", "table", "rows": [{"time", "device", "metric",
    "value", "value_text"}], "error", "stage": "route|decode|None"}

A `time` of None stands for the arrival time. An ignored message has the reason in `error` and no `stage`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from mqtt_bridge.errors import BridgeError, MessageError
from mqtt_bridge.model import Message, Row, Table, Tally
from mqtt_bridge.routes import Router

Explanation = dict[str, Any]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def explain(
    router: Router, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False, at: datetime | None = None
) -> Explanation:
    """What becomes of one message that arrives at the given time (aware; default: now)."""
    received_us = ((at or datetime.now(UTC)) - _EPOCH) // _MICROSECOND
    # A topic that is no Unicode becomes bytes that are no UTF-8, and a dead letter, as from a broker.
    message = Message(topic.encode(errors="surrogatepass"), payload, qos, retain, received_us)
    try:
        translation = router.translate(message, Tally())
    except MessageError as error:
        return _explanation(topic, "dead_lettered", route=error.route, error=error.reason, stage=error.stage)
    if translation.ignored:
        route = None if translation.ignored == "no_route" else translation.route
        return _explanation(topic, "ignored", route=route, error=translation.ignored)
    # Arrived a moment earlier, it would have other times where they are those of the arrival.
    earlier = router.translate(message._replace(received_us=received_us - 1), Tally())
    rows = [
        _named(translation.table, row, arrival=row != other)
        for row, other in zip(translation.rows, earlier.rows, strict=True)
    ]
    return _explanation(topic, "stored", route=translation.route, table=translation.table.name, rows=rows)


def explain_tape(router: Router, lines: Iterable[str]) -> Iterator[Explanation]:
    """What becomes of each message of a tape; BridgeError names the line that is not one."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield explain(router, **_taped(line, number))


def render(explanation: Explanation) -> str:
    """An explanation as a person reads it: a sentence, and the rows as a table."""
    lines = [explanation["topic"], f"  {_sentence(explanation)}"]
    if explanation["rows"]:
        lines += ["", *(f"    {line}" for line in _aligned(explanation["rows"]))]
    return "\n".join(map(printable, lines))


def _explanation(
    topic: str,
    outcome: str,
    *,
    route: str | None,
    table: str | None = None,
    rows: list[dict[str, Any]] | None = None,
    error: str | None = None,
    stage: str | None = None,
) -> Explanation:
    return {
        "topic": topic,
        "outcome": outcome,
        "route": route,
        "table": table,
        "rows": rows or [],
        "error": error,
        "stage": stage,
    }


def _named(table: Table, row: Row, *, arrival: bool) -> dict[str, Any]:
    """A row by column name; `arrival`: its time is that of the arrival."""
    named = dict(zip(table.columns, row, strict=True))
    named["time"] = None if arrival else _rfc_3339(named["time"])
    return named


def _rfc_3339(time_us: int) -> str:
    text = (_EPOCH + time_us * _MICROSECOND).isoformat().removesuffix("+00:00")
    return (text.rstrip("0") if "." in text else text) + "Z"


def _taped(line: str, number: int) -> dict[str, Any]:
    """The arguments of `explain` from one line of a tape."""
    try:
        taped = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BridgeError(f"Line {number} of the tape is not JSON: {error}.") from error
    if not isinstance(taped, dict) or not isinstance(taped.get("topic"), str):
        raise BridgeError(f'Line {number} of the tape is not a message: it must be an object with a text "topic".')
    return {
        "topic": taped["topic"],
        "payload": _taped_payload(taped, number),
        "qos": taped.get("qos", 0),
        "retain": taped.get("retain", False),
    }


def _taped_payload(taped: dict[str, Any], number: int) -> bytes:
    text, encoded = taped.get("payload"), taped.get("payload_b64")
    try:
        if isinstance(text, str) and encoded is None:
            return text.encode()
        if isinstance(encoded, str) and text is None:
            return base64.b64decode(encoded, validate=True)
    except UnicodeEncodeError as error:
        raise BridgeError(f'Line {number} of the tape has a "payload" that is not Unicode: {error.reason}.') from error
    except (binascii.Error, ValueError) as error:
        raise BridgeError(f'Line {number} of the tape has a "payload_b64" that is not base64: {error}.') from error
    raise BridgeError(f'Line {number} of the tape must have either "payload" or "payload_b64", as text.')


def _sentence(explanation: Explanation) -> str:
    by = f" by route {explanation['route']}" if explanation["route"] else ""
    if explanation["outcome"] == "ignored":
        return f"is ignored{by}: {explanation['error']}."
    if explanation["outcome"] == "dead_lettered":
        return f"becomes a dead letter{by}, stage {explanation['stage']}. {explanation['error']}"
    count = len(explanation["rows"])
    return f"is stored{by} in {explanation['table']}, {count} {'row' if count == 1 else 'rows'}:"


def _aligned(rows: list[dict[str, Any]]) -> list[str]:
    """The rows under their column names, in columns."""
    table = [list(rows[0]), *([_cell(name, row[name]) for name in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "(arrival)" if name == "time" else "-"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def printable(text: str) -> str:
    """Without what a terminal would obey or an encoder refuse: devices choose these texts."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
