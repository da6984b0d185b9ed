"""From a document to rows: numbers to `value`, texts to `value_text`, nested names joined by dots.

Invariant: PostgreSQL takes every row made here. Texts and names have no NUL, numbers are finite, and device and
metric are short enough for an index. What had to be left out or changed for that is listed as repairs; the caller
counts them once the whole message is through.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from mqtt_bridge import readings
from mqtt_bridge.decoders.text import HUGE
from mqtt_bridge.errors import MessageError
from mqtt_bridge.readings import EPOCH_US, Readings, pack_time

Repair = Literal["nan_skipped", "nul_removed", "time_replaced"]
"""One thing that was changed or left out in a message; named like its count in `Tally`."""

MAX_NAME_BYTES = 1_000
"""Longest device or metric: two of them and a time must fit into an index row, 2,704 bytes in PostgreSQL."""

_CERTAINLY_SHORT = MAX_NAME_BYTES // 4  # characters; UTF-8 takes four bytes for one at most
_EXACT = 2**53  # up to here a double holds every integer


class RoundedInteger(Exception):
    """The document holds a float so large that it may be a rounded integer: read the payload with `json.exact`."""


_NAMES_REMEMBERED = 10_000
_LONGEST_REMEMBERED = 200


class Narrow:
    """The narrow shape for one topic: a row for each value."""

    def __init__(self, device: str, metric: str, *, max_values: int, max_depth: int, names: dict[str, bytes]) -> None:
        """`metric`: of a payload that is a single value. `max_depth`: levels of objects and lists in a document.

        `names`: metrics that were seen before, packed; shared by all topics, and bounded here.
        """
        self._device = readings.name(device)
        self._metric = metric
        self._max_values = max_values
        self._max_depth = max_depth
        self._names = names

    def rows(self, document: Any, time_us: int, repairs: list[Repair]) -> Readings:
        """The rows of a document; MessageError when it has too many values, too many levels or too long a name."""
        rows: list[bytes] = []
        kind = type(document)
        if kind is dict and len(document) <= self._max_values:  # nearly always, and a call less
            self._add_items(document.items(), "", 1, rows, repairs)
            if len(rows) > self._max_values:
                raise self._too_many_values()
        elif kind is dict or kind is list:
            self._add_all(document, "", 1, rows, repairs)
        else:
            self._add_items(((self._metric, document),), "", 1, rows, repairs)
        head = pack_time(5, 8, time_us - EPOCH_US) + self._device
        return Readings(len(rows), head + head.join(rows) if rows else b"")

    def _add_all(self, node: Any, prefix: str, depth: int, rows: list[bytes], repairs: list[Repair]) -> None:
        # Both checks: the first keeps a long list from filling the memory, the second counts across the message.
        if len(node) > self._max_values:
            raise self._too_many_values()
        if depth > self._max_depth:
            raise MessageError(f"The payload has more than {self._max_depth:,} levels.")
        items = node.items() if type(node) is dict else zip(map(str, range(len(node))), node, strict=True)
        self._add_items(items, prefix, depth, rows, repairs)
        if len(rows) > self._max_values:
            raise self._too_many_values()

    def _add_items(
        self, items: Iterable[tuple[str, Any]], prefix: str, depth: int, rows: list[bytes], repairs: list[Repair]
    ) -> None:
        """The hot loop: one turn a value, which makes what tells its row from others: its metric and its value."""
        known, number = self._names.get, readings.number
        for key, value in items:
            kind = type(value)
            if (kind is float or kind is int) and -_EXACT <= value <= _EXACT:
                ending: bytes | None = number(8, value, -1)
            elif kind is dict or kind is list:
                self._add_all(value, f"{prefix}{key}.", depth + 1, rows, repairs)
                continue
            else:
                ending = _ending(value, repairs)
            if ending is not None:
                metric = prefix + key if prefix else key
                rows.append((known(metric) or self._name(metric, repairs)) + ending)

    def _name(self, metric: str, repairs: list[Repair]) -> bytes:
        """A metric as a field; one that needs no repair is remembered."""
        if "\0" in metric:
            metric = without_nul(metric, repairs)
        elif len(metric) <= _LONGEST_REMEMBERED:
            if len(self._names) >= _NAMES_REMEMBERED:
                self._names.clear()  # crude, but a name is packed again in a microsecond
            self._names[metric] = readings.name(metric)
        if not is_short_name(metric):
            raise MessageError(f"The metric {metric[:40]!r}... is longer than {MAX_NAME_BYTES:,} bytes.")
        return readings.name(metric)

    def _too_many_values(self) -> MessageError:
        return MessageError(f"The payload has more than {self._max_values:,} values.")


def without_nul(text: str, repairs: list[Repair]) -> str:
    """The text without the one character that PostgreSQL cannot store."""
    repairs.append("nul_removed")
    return text.replace("\0", "")


def is_short_name(name: str) -> bool:
    """Whether a device or metric fits into an index."""
    return len(name) <= _CERTAINLY_SHORT or len(name.encode()) <= MAX_NAME_BYTES


def _ending(value: Any, repairs: list[Repair]) -> bytes | None:
    """The value as the last two fields of a row; None where it is not stored."""
    kind = type(value)
    if value is None:
        return None
    if kind is str:
        return readings.ending(None, value if "\0" not in value else without_nul(value, repairs))
    if kind is bool:
        return readings.ending(int(value), None)
    if kind is int:
        return readings.ending(*_large_integer(value))
    return readings.ending(value, None) if _is_finite(value, repairs) else None


def _large_integer(value: int) -> tuple[float | None, str | None]:
    """`value` and `value_text` of an integer beyond 53 bits: the nearest double, and all digits where they differ."""
    try:
        nearest = float(value)
    except OverflowError:
        return None, str(value)
    return nearest, None if nearest == value else str(value)


def _is_finite(value: float, repairs: list[Repair]) -> bool:
    if not math.isfinite(value):
        repairs.append("nan_skipped")
        return False
    if abs(value) >= HUGE:
        raise RoundedInteger
    return True
