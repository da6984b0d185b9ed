"""All that comes through a real Mosquitto, which is the limit then: the CPU of each, side by side."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.contestants.bridge import Bridge
from benchmarks.telemetry import Load
from benchmarks.trial import summary, through_broker

NAME = "mosquitto"
QUESTION = "How many messages a second through a real Mosquitto, and who has no more CPU to give?"


def measure(bench: Bench) -> dict[str, Any]:
    """Medians of the rounds. The share is CPU time over time: 1 is one core, which is all that Mosquitto can use."""
    load = Load(bench.scale.broker_messages)
    outcomes = [through_broker(bench.servers, Bridge(), load, say=bench.say) for _ in range(bench.scale.rounds)]
    found = summary(outcomes)
    rate = found["per_s"]["median"]
    return found | {"cores": {role: cpu["median"] * rate / 1e6 for role, cpu in found["cpu_us"].items()}}
