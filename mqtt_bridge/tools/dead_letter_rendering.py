"""Dead letters as people read them: a list, a summary, one of them whole, and what became of those requeued.

Pure functions. Devices choose topics and payloads: nothing that a terminal would obey is shown.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from mqtt_bridge.dead_letters import Group, Kept
from mqtt_bridge.errors import MessageError
from mqtt_bridge.routes import Router
from mqtt_bridge.tools import explain as explaining
from mqtt_bridge.tools.dead_letter_office import Report
from mqtt_bridge.tools.explain import printable as printable
from mqtt_bridge.tools.status import span

SHOWN_BYTES = 4_096
"""How much of a payload is shown."""
_LONGEST_TOPIC = 48
_MOST_REASONS = 20


# -- lists


def listed(letters: Sequence[Kept], *, now: datetime, width: int | None) -> list[str]:
    """A line for each letter. Lines are cut at `width` characters; None shows everything."""
    rows = [
        (
            str(letter.id),
            span((now - letter.received_at).total_seconds()),
            letter.stage,
            size(letter.size_bytes),
            "yes" if letter.requeued_at else "no",
            _cut(letter.topic, _LONGEST_TOPIC if width else None),
            letter.error.partition("\n")[0],
        )
        for letter in letters
    ]
    return _aligned(("id", "age", "stage", "size", "requeued", "topic", "error"), rows, width=width)


def summarised(groups: Sequence[Group], *, now: datetime, width: int | None) -> list[str]:
    """A line for each group."""
    rows = [
        (
            f"{group.letters:,}",
            f"{group.requeued:,}",
            f"{group.topics:,}",
            span((now - group.newest_at).total_seconds()),
            str(group.newest_id),
            group.stage,
            group.error,
        )
        for group in groups
    ]
    return _aligned(("letters", "requeued", "topics", "newest", "its id", "stage", "error"), rows, width=width)


_NUMBERS = frozenset({"id", "age", "size", "letters", "requeued", "topics", "newest", "its id"})
"""Columns that stand at the right."""


def _aligned(names: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None) -> list[str]:
    table = [tuple(map(printable, row)) for row in (names, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [
            cell.rjust(size) if name in _NUMBERS else cell.ljust(size)
            for name, cell, size in zip(names, row, widths, strict=True)
        ]
        lines.append(_cut("  ".join(cells).rstrip(), width))
    return lines


def _cut(text: str, width: int | None) -> str:
    return text if width is None or len(text) <= width else f"{text[: width - 3]}..."


def size(count: int) -> str:
    """Bytes as people write them: `312 B`, `1.5 KiB`."""
    if count < 1024:
        return f"{count} B"
    return f"{count / 1024:,.1f} KiB" if count < 1 << 20 else f"{count / (1 << 20):,.1f} MiB"


# -- one of them


def as_json(letter: Kept) -> dict[str, Any]:
    """What is known about a letter, ready for JSON; the payload as text or base64 as on a tape, where it was read."""
    content = asdict(letter)
    payload: bytes | None = content.pop("payload")
    if payload is None:
        return content
    try:
        return content | {"payload": payload.decode()}
    except UnicodeDecodeError:
        return content | {"payload_b64": base64.b64encode(payload).decode()}


def explained(letter: Kept, router: Router) -> explaining.Explanation:
    """What today's routes would make of a letter."""
    explanation = explaining.explain(
        router,
        letter.topic,
        letter.payload or b"",
        qos=letter.qos,
        retain=letter.retain,
        at=letter.received_at,
    )
    try:
        letter.message()
    except MessageError as error:
        nothing: dict[str, Any] = {"outcome": "dead_lettered", "route": None, "table": None, "rows": []}
        return explanation | nothing | {"error": error.reason, "stage": error.stage}
    return explanation


def shown(letter: Kept, explanation: explaining.Explanation, *, now: datetime) -> list[str]:
    """Everything about one letter."""
    payload = letter.payload or b""
    return [
        f"dead letter {letter.id}",
        *(f"  {name:<13}{printable(text)}" for name, text in _facts(letter, now)),
        "",
        f"payload, {size(len(payload))}{f' (the first {size(SHOWN_BYTES)})' if len(payload) > SHOWN_BYTES else ''}:",
        *(f"  {line}" for line in payload_lines(payload)),
        "",
        "by today's routes:",
        *(f"  {line}" for line in explaining.render(explanation).splitlines()[1:]),
    ]


def _facts(letter: Kept, now: datetime) -> Iterator[tuple[str, str]]:
    yield "topic", letter.topic
    yield "received", _time(letter.received_at, now)
    yield "client id", letter.client_id
    yield "QoS", f"{letter.qos}{', retained' if letter.retain else ''}"
    for name, value in (letter.properties or {}).items():
        yield "property", f"{name} = {value}"
    yield "stage", f"{letter.stage}{f', route {letter.route}' if letter.route else ', no route'}"
    yield "error", letter.error
    if letter.sqlstate:
        yield "SQLSTATE", letter.sqlstate
    yield "requeued", _time(letter.requeued_at, now) if letter.requeued_at else "no"


def _time(moment: datetime, now: datetime) -> str:
    return f"{moment.isoformat().replace('+00:00', 'Z')} ({span((now - moment).total_seconds())} ago)"


def payload_lines(payload: bytes) -> list[str]:
    """The beginning of a payload: its lines where it is text, else a hex dump."""
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        return _hex_dump(payload[:SHOWN_BYTES])
    # Control characters are UTF-8 as well, but not text that anybody could read.
    if any(character < " " and character not in "\t\r\n" for character in text):
        return _hex_dump(payload[:SHOWN_BYTES])
    return [printable(line) for line in text[:SHOWN_BYTES].expandtabs().splitlines()] or ["(empty)"]


def _hex_dump(payload: bytes) -> list[str]:
    lines = []
    for offset in range(0, len(payload), 16):
        part = payload[offset : offset + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{offset:08x}  {part.hex(' ', 1):<47}  {text}")
    return lines


# -- what became of them


def requeued(report: Report, total: int, *, dry_run: bool) -> list[str]:
    """The account of a run: what was stored, what was not, and why."""
    if not total:
        return ["there is nothing to requeue"]
    verb, rows = ("would requeue", "to be stored") if dry_run else ("requeued", "stored")
    lines = [f"{verb} {_count(report.stored + report.ignored.total(), 'dead letter')} of {total:,}:"]
    lines += [f"  stored        {report.stored:,}, {_count(report.rows, 'row')} {rows}"]
    lines += [f"  ignored       {count:,} ({reason})" for reason, count in report.ignored.most_common()]
    if report.failing:
        lines += [f"  still failing {report.failing.total():,}, left as they are:", *_reasons(report)]
    if report.elsewhere:
        lines += [f"  skipped       {report.elsewhere:,}: requeued by another run, or deleted"]
    if rest := max(0, total - report.seen):
        lines += [f"  not reached   {rest:,}: run it again"]
    return lines


def _reasons(report: Report) -> Iterator[str]:
    for (stage, error), count in report.failing.most_common(_MOST_REASONS):
        example = report.examples[stage, error]
        yield f"    {count:,} {stage}: {printable(error)} (mqtt-bridge dead-letters show {example})"
    if len(report.failing) > _MOST_REASONS:
        yield f"    and {len(report.failing) - _MOST_REASONS:,} other reasons"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
