"""What the cost of a message depends on: how many topics there are, how much is in it, how many share the work.

One trial a point, on the feed; what is changed is one thing, all else is as in the full load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.bench import Bench
from benchmarks.contestants.bridge import Bridge, Refused
from benchmarks.telemetry import Load
from benchmarks.trial import on_feed

NAME = "curves"
QUESTION = "What does a message cost with more topics, readings, bytes, workers, processes?"


def measure(bench: Bench) -> dict[str, Any]:
    """By curve, its points in order."""
    make: dict[str, Callable[[int], tuple[Load, Bridge]]] = {
        "devices": lambda n: (Load(bench.scale.curve_messages, devices=n), Bridge()),
        "readings": lambda n: (_readings(bench, n), Bridge()),
        "size_bytes": lambda n: (_sized(bench, n), Bridge()),
        "workers": lambda n: (Load(bench.scale.curve_messages), Bridge(BRIDGE_WORKERS=n)),
        "processes": lambda n: (Load(bench.scale.curve_messages), _processes(n)),
    }
    return {
        "curves": {
            name: [_point(bench, name, value, *make[name](value)) for value in values]
            for name, values in bench.scale.curves.items()
        }
    }


def _readings(bench: Bench, readings: int) -> Load:
    return Load(min(bench.scale.curve_messages, bench.scale.curve_rows // readings), readings=readings)


def _sized(bench: Bench, size_bytes: int) -> Load:
    """One reading, and a text that brings the payload to its size."""
    messages = min(bench.scale.curve_messages, bench.scale.curve_bytes // size_bytes)
    return Load(messages, readings=1, size_bytes=size_bytes)


def _processes(count: int) -> Bridge:
    """Several share a subscription, and the feed gives each message to whoever has room for it."""
    return Bridge() if count == 1 else Bridge(BRIDGE_PROCESSES=count, MQTT_SHARED_GROUP="bench")


def _point(bench: Bench, curve: str, value: int, load: Load, bridge: Bridge) -> dict[str, Any]:
    try:
        outcome = on_feed(bench.servers, bridge, load, say=partial(_say, bench, f"{curve} {value:,}"))
    except Refused as reason:
        return {"at": value, "skipped": f"the program refuses it: {reason}"}
    sessions = list(outcome.notes["sessions"].values())
    return {
        "at": value,
        "payload_bytes": load.payload_bytes,
        "rows_per_message": load.rows_per_message,
        "unevenness": _unevenness(sessions),
        "outcome": outcome.as_json(),
    }


def _unevenness(shares: Sequence[int]) -> float:
    """How far the session that had most, or least, is from an even share; 0 is even."""
    even = sum(shares) / len(shares)
    return max(abs(share - even) for share in shares) / even


def _say(bench: Bench, place: str, sentence: str) -> None:
    bench.say(f"{place}: {sentence}")
