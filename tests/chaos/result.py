"""What came of a run: the comparison of what was published with what is stored, and how it is shown."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Any

from tests.acceptance.traffic import query
from tests.chaos.publisher import DEVICES, END
from tests.chaos.schedule import Parameters

EXPECTED_EXITS = frozenset({-9, 0, 3})
"""Killed, stopped, robbed of the client id."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Messages published against messages stored."""

    stored: int
    """Every copy counted."""
    lost: int
    duplicated: int
    """Copies beyond the first."""
    different: int
    """Stored, but never published like that; dead letters too."""
    examples: tuple[str, ...] = ()
    """Some of what is wrong, for whoever looks for the cause."""


def compare(database: str, published: int, *, constant: bool) -> Comparison:
    """Of identical messages only the number can be compared: one lost and one duplicated would balance."""
    rows = query(database, "SELECT device, metric, value FROM readings WHERE device <> %s", END)
    stored = Counter(rows)
    dead_letters = int(query(database, "SELECT count(*) FROM mqtt_bridge.dead_letters")[0][0])
    expected = _expected(published, constant=constant)
    lost, excess = expected - stored, stored - expected
    different = Counter({row: count for row, count in excess.items() if row not in expected})
    duplicated = excess - different
    examples = [f"{name} {row}" for name, rows in (("lost", lost), ("twice", duplicated)) for row in sorted(rows)[:20]]
    return Comparison(
        stored=stored.total(),
        lost=lost.total(),
        duplicated=duplicated.total(),
        different=different.total() + dead_letters,
        examples=tuple(examples),
    )


def _expected(published: int, *, constant: bool) -> Counter[tuple[Any, ...]]:
    if constant:
        return Counter({("d0", "seq", 0.0): published})
    return Counter((f"d{seq % DEVICES}", "seq", float(seq)) for seq in range(published))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run."""

    parameters: Parameters
    published: int
    repeated_by_publisher: int
    """A publisher's own repetition is a new message to everybody: it explains so many duplicates at most."""
    comparison: Comparison
    settled: bool
    """False where the last message was not stored although it was waited for."""
    faults: dict[str, int]
    """Really done."""
    missed: dict[str, int]
    """Not done, since the bridge had not recovered from the fault before within the time allowed."""
    recognised: int
    """Redeliveries that the bridge was seen to have recognised, at least."""
    commits_in_doubt: int
    """Commits whose answer was lost, and which had happened."""
    tracebacks: int
    ledger_rows: int
    largest_rss_bytes: int
    seconds: float
    exits: dict[int, int]
    """Exit codes of the bridges' processes, and how often."""

    @property
    def exact(self) -> bool:
        """Whether everything is stored exactly once."""
        counts = self.comparison
        return not (counts.lost or counts.duplicated or counts.different)

    @property
    def good(self) -> bool:
        """The same, and nothing unforeseen happened on the way."""
        return self.exact and self.settled and not self.tracebacks and self.exits.keys() <= EXPECTED_EXITS

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self) | {"exact": self.exact, "good": self.good}

    def table(self) -> str:
        """Everything, for people."""
        lines = [
            ("parameters", _listed(_as_options(self.parameters))),
            ("faults done", _listed(self.faults)),
            ("faults missed", _listed(self.missed)),
            ("published", f"{self.published:,} ({self.repeated_by_publisher} in flight at a cut of the publisher)"),
            ("stored", f"{self.comparison.stored:,}"),
            ("lost", f"{self.comparison.lost:,}"),
            ("duplicated", f"{self.comparison.duplicated:,}"),
            ("different", f"{self.comparison.different:,}"),
            ("redeliveries recognised", f"{self.recognised:,} at least"),
            ("commits in doubt", f"{self.commits_in_doubt} had happened"),
            ("ledger rows left", str(self.ledger_rows)),
            ("largest RSS", f"{self.largest_rss_bytes / 2**20:.0f} MiB"),
            ("exit codes", _listed(self.exits)),
            ("tracebacks", str(self.tracebacks)),
            ("seconds", f"{self.seconds:.1f}"),
            ("verdict", self._verdict()),
        ]
        return "\n".join([*(f"{name:<24} {value}" for name, value in lines), *self.comparison.examples])

    def _verdict(self) -> str:
        if self.good:
            return "every message exactly once"
        if self.exact:
            return "every message exactly once, but look at the exit codes and the log"
        return "NOT exactly once" if self.settled else "NOT exactly once; it was still not done at the end"


def _as_options(parameters: Parameters) -> dict[str, object]:
    return {field.name: getattr(parameters, field.name) for field in fields(parameters)}


def _listed(values: dict[Any, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not False) or "none"
