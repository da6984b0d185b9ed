"""Every system through the same Mosquitto, with the same messages, one after the other in one run.

A slow system is given fewer messages: its figures are a message, or a second, either way. What it has not stored when
its time is up is not counted as lost, only as not stored yet.
"""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.contestant import Contestant, Unavailable
from benchmarks.telemetry import Load
from benchmarks.trial import summary, through_broker

NAME = "side-by-side"
QUESTION = "What do others do with the same messages, through the same broker, into the same database?"


def measure(bench: Bench) -> dict[str, Any]:
    """Outcomes by system, and why some are missing."""
    found: dict[str, Any] = {}
    for name, system in bench.contestants.items():
        about = {
            "title": system.title,
            "rows_per_message": system.rows_per_message,
            "guarantees": system.guarantees,
        }
        try:
            found[name] = about | _measure(bench, system)
        except Unavailable as reason:
            found[name] = about | {"unavailable": str(reason)}
        except Exception as error:  # noqa: BLE001 - one of them that fails, however, must not take the others' figures
            found[name] = about | {"unavailable": f"it failed: {type(error).__name__}: {error}"}
    return {"systems": found}


def _measure(bench: Bench, system: Contestant) -> dict[str, Any]:
    bench.say(f"{system.name}: installing, if need be")
    version = system.install()
    messages = min(bench.scale.side_by_side_messages, system.most() or bench.scale.side_by_side_messages)

    def say(sentence: str) -> None:
        bench.say(f"{system.name}: {sentence}")

    limit_s = bench.scale.side_by_side_s
    outcome = through_broker(bench.servers, system, Load(messages), say=say, limit_s=limit_s)
    return {"version": version} | summary([outcome])
