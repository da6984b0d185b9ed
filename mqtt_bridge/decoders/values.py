"""From a document to rows: numbers to `value`, texts to `value_text`, nested names joined by dots.

Invariant: PostgreSQL takes every row made here. Texts and names have no NUL, numbers are finite, and device and
metric are short enough for an index. What had to be left out or changed for that is listed as repairs; the caller
counts them once the whole message is through.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from mqtt_bridge.decoders.text import HUGE
from mqtt_bridge.errors import MessageError
from mqtt_bridge.model import Row

Repair = Literal["nan_skipped", "nul_removed", "time_replaced"]
"""One thing that was changed or left out in a message; named like its count in `Tally`."""

MAX_NAME_BYTES = 1_000
"""Longest device or metric: two of them and a time must fit into an index row, 2,704 bytes in PostgreSQL."""

_CERTAINLY_SHORT = MAX_NAME_BYTES // 4  # characters; UTF-8 takes four bytes for one at most
_EXACT = 2**53  # up to here a double holds every integer


class RoundedInteger(Exception):
    """The document holds a float so large that it may be a rounded integer: read the payload with `json.exact`."""


@dataclass(frozen=True, slots=True)
class Narrow:
    """The narrow shape for one topic: a row for each value."""

    device: str
    metric: str
    """Metric of a payload that is a single value."""
    max_values: int
    max_depth: int
    """Levels of objects and lists that a document may have."""

    def rows(self, document: Any, time_us: int, repairs: list[Repair]) -> list[Row]:
        """The rows of a document; MessageError when it has too many values, too many levels or too long a name."""
        rows: list[Row] = []
        kind = type(document)
        if kind is dict or kind is list:
            self._add_all(document, "", 1, rows, time_us, repairs)
        else:
            self._add_items(((self.metric, document),), "", 1, rows, time_us, repairs)
        return rows

    def _add_all(
        self, node: Any, prefix: str, depth: int, rows: list[Row], time_us: int, repairs: list[Repair]
    ) -> None:
        # Both checks: the first keeps a long list from filling the memory, the second counts across the message.
        if len(node) > self.max_values:
            raise self._too_many_values()
        if depth > self.max_depth:
            raise MessageError(f"The payload has more than {self.max_depth:,} levels.")
        items = node.items() if type(node) is dict else zip(map(str, range(len(node))), node, strict=True)
        self._add_items(items, prefix, depth, rows, time_us, repairs)
        if len(rows) > self.max_values:
            raise self._too_many_values()

    def _add_items(
        self,
        items: Iterable[tuple[str, Any]],
        prefix: str,
        depth: int,
        rows: list[Row],
        time_us: int,
        repairs: list[Repair],
    ) -> None:
        """The hot loop: one turn a value, no call and no object but the row for the common kinds."""
        device = self.device
        for key, value in items:
            metric = prefix + key
            if len(metric) > _CERTAINLY_SHORT or "\0" in metric:
                metric = _storable_metric(metric, repairs)
            kind = type(value)
            if (kind is float or kind is int) and -_EXACT <= value <= _EXACT:
                rows.append((time_us, device, metric, value, None))
            elif kind is str:
                text = value if "\0" not in value else without_nul(value, repairs)
                rows.append((time_us, device, metric, None, text))
            elif kind is dict or kind is list:
                self._add_all(value, metric + ".", depth + 1, rows, time_us, repairs)
            elif kind is bool:
                rows.append((time_us, device, metric, int(value), None))
            elif kind is int:
                rows.append((time_us, device, metric, *_large_integer(value)))
            elif value is not None and _is_finite(value, repairs):
                rows.append((time_us, device, metric, value, None))

    def _too_many_values(self) -> MessageError:
        return MessageError(f"The payload has more than {self.max_values:,} values.")


def without_nul(text: str, repairs: list[Repair]) -> str:
    """The text without the one character that PostgreSQL cannot store."""
    repairs.append("nul_removed")
    return text.replace("\0", "")


def is_short_name(name: str) -> bool:
    """Whether a device or metric fits into an index."""
    return len(name) <= _CERTAINLY_SHORT or len(name.encode()) <= MAX_NAME_BYTES


def _storable_metric(metric: str, repairs: list[Repair]) -> str:
    if "\0" in metric:
        metric = without_nul(metric, repairs)
    if not is_short_name(metric):
        raise MessageError(f"The metric {metric[:40]!r}... is longer than {MAX_NAME_BYTES:,} bytes.")
    return metric


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
