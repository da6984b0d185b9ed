"""What a run consists of, and when which fault happens: pure functions of the parameters and their seed.

A fault is due at a count of messages, not at a time: it happens under load on a slow machine too. Only how long an
outage lasts is a time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "kill",
    "early_kill",
    "db_crash",
    "outage",
    "broker_restart",
    "cut_broker",
    "cut_db",
    "stall_broker",
    "stall_db",
    "freeze_db",
    "steal",
]
OF_THE_DATABASE: frozenset[Kind] = frozenset({"db_crash", "cut_db", "stall_db", "freeze_db"})
"""Faults that mean nothing while the database is away."""

MARGIN_S = 2.0
"""So long, at least, messages are published before an outage and after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """One run. Numbers of cuts and stalls are for each of the two links."""

    messages: int = 20_000
    rate: float = 400.0
    """Messages published per second; the backlog is published as fast as the broker takes it."""
    seed: int = 1
    kills: int = 15
    """kill -9 of the bridge, while it receives; with an outage, one of them is in its middle."""
    early_kills: int = 0
    """kill -9 of the bridge, and again while it starts."""
    db_crashes: int = 4
    """Immediate restarts of PostgreSQL: it goes through crash recovery."""
    outage: float = 0.0
    """Seconds without a database in the middle of the run, while all else goes on."""
    broker_restarts: int = 2
    """SIGTERM and start of the broker."""
    cuts: int = 10
    """RST."""
    stalls: int = 0
    """Silence, then RST."""
    stall_s: float = 4.0
    """The longest silence of a stall."""
    freezes: int = 0
    """One connection to the database goes silent, whoever has just said something on it; the others go on."""
    steals: int = 0
    """A second bridge takes over the client id for a moment."""
    db_delay_ms: float = 0.0
    """Added to every packet between bridge and database, each way: more is under way when a fault comes."""
    broker_delay_ms: float = 0.0
    """The same between bridge and broker: more PUBACKs are under way."""
    full_queue: bool = False
    """A queue of 100 messages, which is full most of the time."""
    payload: Literal["unique", "constant", "cyclic"] = "unique"
    """Of the messages: each its own, all the same, or the same whenever the broker's packet ids have wrapped."""
    qos0: float = 0.0
    """Share of the messages that are published with QoS 0."""
    protocol: Literal["5", "3.1.1"] = "5"
    receive: Literal["fast", "stock"] = "fast"
    """The client that reads: the bridge's own, or paho as it is."""
    backlog: bool = False
    """Everything is published while the bridge is down; faults come while it catches up."""
    workers: int = 2
    processes: int = 1
    """Of the bridge; with several, each kill hits one of them, or their supervisor."""
    spool: Literal["off", "outage", "always"] = "off"
    spool_max_mb: int = 1024
    without_ledger: bool = False

    @property
    def problem(self) -> str | None:
        """Why this cannot be run, None where it can."""
        if self.backlog and self.outage:
            return "an outage needs messages that are published meanwhile: not together with a backlog."
        enough = int((self.outage + 2 * MARGIN_S) * self.rate)
        if self.outage and self.messages < enough:
            return f"an outage of {self.outage:g} s at {self.rate:g}/s needs at least {enough} messages."
        if self.processes > 1 and (self.protocol != "5" or self.without_ledger):
            return "several processes need MQTT 5, and the ledger."
        if not 0.0 <= self.qos0 < 1.0:
            return "the share of QoS 0 is from 0 to below 1."
        return None


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, due when so many messages are published (of a backlog: stored)."""

    at: int
    kind: Kind
    seconds: float = 0.0
    """How long a stall is silent, an outage lasts, or a start goes on before it is killed."""


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
        "freeze_db": parameters.freezes,
        "steal": parameters.steals,
        "early_kill": parameters.early_kills,
    }
    faults = [Fault(_outage(parameters).start, "outage", parameters.outage)] if parameters.outage else []
    for kind, count in counts.items():
        for number in range(count):
            share = 0.03 + 0.94 * (number + dice.random()) / count
            if kind == "kill" and parameters.outage and number == count // 2:
                share = 0.5
            faults.append(Fault(_due(share, kind, parameters), kind, _seconds(kind, dice, parameters)))
    return sorted(faults, key=lambda fault: fault.at)


def _outage(parameters: Parameters) -> range:
    """The messages that are published meanwhile, where the publisher keeps its rate."""
    length = int(parameters.outage * parameters.rate)
    start = (parameters.messages - length) // 2
    return range(start, start + length)


def _due(share: float, kind: Kind, parameters: Parameters) -> int:
    if kind not in OF_THE_DATABASE:
        return int(share * parameters.messages)
    away = _outage(parameters)
    due = int(share * (parameters.messages - len(away)))
    return due if due < away.start else due + len(away)


def _seconds(kind: Kind, dice: random.Random, parameters: Parameters) -> float:
    if kind.startswith("stall"):
        return dice.uniform(parameters.stall_s / 4, parameters.stall_s)
    return dice.uniform(0.05, 2.0) if kind == "early_kill" else 0.0
