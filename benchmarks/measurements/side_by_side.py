"""Every system through the same Mosquitto, with the same messages, one after the other in one run.

A slow system is given fewer messages, and one round: its figures are a message, or a second, either way. The fast ones
take turns in several rounds. What a system has not stored when its time is up is not counted as lost, only as not
stored yet.
"""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.contestant import Contestant, Unavailable
from benchmarks.telemetry import Load
from benchmarks.trial import Outcome, summary, through_broker

NAME = "side-by-side"
QUESTION = "What do others do with the same messages, through the same broker, into the same database?"


def measure(bench: Bench) -> dict[str, Any]:
    """Outcomes by system, and why some are missing."""
    versions: dict[str, str] = {}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in bench.contestants}
    missing: dict[str, str] = {}
    for number in range(1, bench.scale.side_by_side_rounds + 1):
        for name, system in bench.contestants.items():
            if name in missing or (number > 1 and system.most() is not None):
                continue
            try:
                bench.say(f"{name}: installing, if need be")
                versions[name] = system.install()
                outcomes[name].append(_trial(bench, system))
            except Unavailable as reason:
                missing[name] = str(reason)
            except Exception as error:  # noqa: BLE001 - one that fails, however, must not take the others' figures
                missing[name] = f"it failed: {type(error).__name__}: {error}"
    return {
        "systems": {
            name: _about(system)
            | ({"unavailable": missing[name]} if name in missing else summary(outcomes[name]))
            | {"version": versions.get(name)}
            for name, system in bench.contestants.items()
        }
    }


def _about(system: Contestant) -> dict[str, Any]:
    return {"title": system.title, "rows_per_message": system.rows_per_message, "guarantees": system.guarantees}


def _trial(bench: Bench, system: Contestant) -> Outcome:
    messages = min(bench.scale.side_by_side_messages, system.most() or bench.scale.side_by_side_messages)

    def say(sentence: str) -> None:
        bench.say(f"{system.name}: {sentence}")

    return through_broker(bench.servers, system, Load(messages), say=say, limit_s=bench.scale.side_by_side_s)
