"""What came of a run, and how it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from tests.chaos.comparison import Comparison
from tests.chaos.drain import Drained
from tests.chaos.machine import Machine
from tests.chaos.schedule import Parameters

EXPECTED_EXITS = frozenset({-9, 0, 3})
"""Killed, stopped, robbed of the client id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run."""

    parameters: Parameters
    machine: Machine
    published: int
    """The last messages not counted."""
    published_per_s: float
    """What the publisher reached, its pauses included."""
    repeated_by_publisher: int
    """A publisher's own repetition is a new message to everybody: it explains so many duplicates at most."""
    comparison: Comparison
    reach: int | None
    """How far a message may be overtaken by a later one of its device: as many as all workers have in their hands at
    most, with batches of the usual size. None where a worker may be held up while the others go on."""
    settled: bool
    """False where the last message was not stored although it was waited for."""
    left_at_broker: int | None
    """What the broker would deliver to the bridge's session once more; None where it had no such session."""
    left_in_spool: int
    """What waits in the spool, or was set aside in it, when the bridge has left."""
    account_problems: tuple[str, ...]
    """Where the account did not balance, or the last process counted something else than there was."""
    faults: dict[str, int]
    """Really done."""
    missed: dict[str, int]
    """Not done, since the bridge had not recovered from the fault before within the time allowed."""
    skipped: dict[str, int]
    """Not done, since there was nothing to hit: the database was away, or all of a backlog stored."""
    recognised: int
    """Redeliveries that the bridge was seen to have recognised, at least."""
    commits_in_doubt: int
    """Commits whose answer was lost, and which had happened."""
    dropped_by_broker: int
    """Times that the broker said it drops messages for want of room."""
    tracebacks: int
    ledger_rows: int
    drained: Drained | None
    """After the outage, or of the backlog; None where there was neither."""
    spool_messages: int
    """The most that the spool held, as far as it was looked at."""
    spool_bytes: int
    peak_rss_bytes: int
    final_rss_bytes: int
    """When everything was settled."""
    cpu_s: float
    """Of all processes of the bridge."""
    seconds: float
    exits: dict[int, int]
    """Exit codes of the bridges' processes, and how often."""

    @property
    def exact(self) -> bool:
        """Whether everything is stored exactly once, and nothing is left that would be stored again."""
        counts = self.comparison
        return not (counts.lost or counts.duplicated or counts.different or self.left_at_broker or self.left_in_spool)

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong; empty where the run proves what it should."""
        found = {
            "messages are lost": self.comparison.lost,
            "messages are stored twice": self.comparison.duplicated,
            "what is stored was not published like that": self.comparison.different,
            "it was still not done at the end": not self.settled,
            "the broker would deliver messages again": self.left_at_broker,
            "the broker has no session of the bridge": self.left_at_broker is None,
            "messages are left in the spool": self.left_in_spool,
            "the account is wrong": self.account_problems,
            "faults were missed": self.missed,
            "the bridge has logged tracebacks": self.tracebacks,
            "the bridge has ended with unforeseen exit codes": self.exits.keys() - EXPECTED_EXITS,
            "a device's messages changed places further than batches reach": self._out_of_reach,
        }
        return tuple(problem for problem, is_there in found.items() if is_there)

    @property
    def _out_of_reach(self) -> bool:
        return self.reach is not None and (self.comparison.displacement or 0) > self.reach

    @property
    def good(self) -> bool:
        """Whether everything is stored exactly once, and nothing unforeseen happened on the way."""
        return not self.problems

    @property
    def cpu_us_per_message(self) -> float:
        """CPU microseconds of the bridge for each message published, its starts included."""
        return self.cpu_s * 1e6 / max(1, self.published)

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        derived = ("exact", "good", "problems", "cpu_us_per_message")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def table(self) -> str:
        """Everything, for people."""
        counts = self.comparison
        lines = [
            ("machine", str(self.machine)),
            ("parameters", _listed(_as_options(self.parameters))),
            ("faults done", _listed(self.faults)),
            ("faults missed", _listed(self.missed)),
            ("faults skipped", _listed(self.skipped)),
            ("published", f"{self.published:,} at {self.published_per_s:,.0f}/s"),
            ("repeated by publisher", f"{self.repeated_by_publisher} in flight at a cut of the publisher"),
            ("stored", f"{counts.stored:,}"),
            ("lost", f"{counts.lost:,}"),
            ("duplicated", f"{counts.duplicated:,}"),
            ("different", f"{counts.different:,}"),
            ("QoS 0 lost", f"{counts.qos0_lost:,}"),
            ("left at the broker", "no session" if self.left_at_broker is None else f"{self.left_at_broker}"),
            ("left in the spool", f"{self.left_in_spool}"),
            ("overtaken", self._shown_displacement()),
            ("redeliveries recognised", f"{self.recognised:,} at least"),
            ("commits in doubt", f"{self.commits_in_doubt} had happened"),
            ("dropped by the broker", f"{self.dropped_by_broker} times"),
            ("ledger rows left", str(self.ledger_rows)),
            ("drained", self._shown_drain()),
            ("largest spool", f"{self.spool_messages:,} messages, {self.spool_bytes / 2**20:.1f} MiB"),
            ("RSS", f"{self.peak_rss_bytes / 2**20:.0f} MiB peak, {self.final_rss_bytes / 2**20:.0f} MiB at the end"),
            ("CPU", f"{self.cpu_s:.1f} s, {self.cpu_us_per_message:.0f} us a message"),
            ("exit codes", _listed(self.exits)),
            ("tracebacks", str(self.tracebacks)),
            ("seconds", f"{self.seconds:.1f}"),
            ("verdict", "; ".join(self.problems) or "every message exactly once"),
        ]
        table = [f"{name:<24} {value}" for name, value in lines]
        return "\n".join([*table, *self.account_problems[:20], *counts.examples])

    def _shown_displacement(self) -> str:
        if self.comparison.displacement is None:
            return "unknown"
        allowed = "any number is" if self.reach is None else f"{self.reach:,} are"
        return f"by {self.comparison.displacement:,} messages at most, {allowed} allowed"

    def _shown_drain(self) -> str:
        drained = self.drained
        if drained is None:
            return "-"
        return (
            f"{drained.messages:,} messages in {drained.seconds:.1f} s, the first after {drained.first_s:.1f} s, "
            f"then {drained.rate:,.0f}/s"
        )


def _as_options(parameters: Parameters) -> dict[str, object]:
    return {field.name: getattr(parameters, field.name) for field in fields(parameters)}


def _listed(values: dict[Any, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not False) or "none"
