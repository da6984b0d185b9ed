"""What a run consists of, and when which fault happens: pure functions of the parameters and their seed.

A fault is due at a count of messages, not at a time: it happens under load on a slow machine too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kill", "db_crash", "broker_restart", "cut_broker", "cut_db", "stall_broker", "stall_db", "steal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """One run. Numbers of cuts and stalls are for each of the two links."""

    messages: int = 20_000
    rate: float = 400.0
    """Messages published per second; the backlog is published as fast as the broker takes it."""
    seed: int = 1
    kills: int = 15
    """kill -9 of the bridge."""
    db_crashes: int = 4
    """Immediate restarts of PostgreSQL: it goes through crash recovery."""
    broker_restarts: int = 2
    """SIGTERM and start of the broker."""
    cuts: int = 10
    """RST."""
    stalls: int = 0
    """Seconds of silence, then RST."""
    steals: int = 0
    """A second bridge takes over the client id for a moment."""
    db_delay_ms: float = 0.0
    """Added to every packet between bridge and database, each way: more is under way when a fault comes."""
    full_queue: bool = False
    """A queue of 100 messages, which is full most of the time."""
    payload: Literal["unique", "constant"] = "unique"
    protocol: Literal["5", "3.1.1"] = "5"
    backlog: bool = False
    """Everything is published while the bridge is down; faults come while it catches up."""
    workers: int = 2
    without_ledger: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, due when so many messages are published (of a backlog: stored)."""

    at: int
    kind: Kind
    seconds: float = 0.0
    """How long a stall is silent."""


def schedule(parameters: Parameters) -> list[Fault]:
    """The faults of a run in their order: each kind evenly spread, with jitter, in the midst of the messages."""
    dice = random.Random(parameters.seed)
    counts: dict[Kind, int] = {
        "kill": parameters.kills,
        "db_crash": parameters.db_crashes,
        "broker_restart": parameters.broker_restarts,
        "cut_broker": parameters.cuts,
        "cut_db": parameters.cuts,
        "stall_broker": parameters.stalls,
        "stall_db": parameters.stalls,
        "steal": parameters.steals,
    }
    faults = []
    for kind, count in counts.items():
        for number in range(count):
            share = 0.03 + 0.94 * (number + dice.random()) / count
            seconds = dice.uniform(1.0, 4.0) if kind.startswith("stall") else 0.0
            faults.append(Fault(int(share * parameters.messages), kind, seconds))
    return sorted(faults, key=lambda fault: fault.at)
