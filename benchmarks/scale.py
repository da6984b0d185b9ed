"""How large a run is: at its defaults, as a smoke test, and as a test of the benchmarks themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of all measurements."""

    name: str
    rounds: int
    """Medians are of so many."""
    feed_messages: int
    reference_messages: int
    """For the reference on the feed, which is several times slower."""
    broker_messages: int
    side_by_side_messages: int
    side_by_side_rounds: int
    """For the fast systems."""
    side_by_side_s: float
    """Longest that one system is given."""
    latency_rates: tuple[int, ...]
    latency_s: float
    curve_messages: int
    curve_rows: int
    """Where a message is large or has many readings, there are fewer of them: so many rows, and no more."""
    curve_bytes: int
    curves: dict[str, tuple[int, ...]]
    backlog_messages: int
    outage_s: float
    outage_rate: int
    outage_margin_s: float
    """Before and after the outage."""

    def changed(self, **sizes: Any) -> Scale:
        """The same with some sizes of the caller's own."""
        return replace(self, **sizes)


FULL = Scale(
    name="full",
    rounds=5,
    feed_messages=500_000,
    reference_messages=50_000,
    broker_messages=200_000,
    side_by_side_messages=200_000,
    side_by_side_rounds=3,
    side_by_side_s=90.0,
    latency_rates=(100, 1_000, 5_000),
    latency_s=30.0,
    curve_messages=200_000,
    curve_rows=800_000,
    curve_bytes=100_000_000,
    curves={
        "devices": (10, 100, 1_000, 10_000, 100_000),
        "readings": (1, 4, 10, 30, 100),
        "size_bytes": (50, 200, 1_000, 10_000, 100_000),
        "workers": (1, 2, 4, 8),
        "processes": (1, 2, 4),
    },
    backlog_messages=1_000_000,
    outage_s=600.0,
    outage_rate=500,
    outage_margin_s=30.0,
)

QUICK = replace(
    FULL,
    name="quick",
    rounds=1,
    feed_messages=60_000,
    reference_messages=10_000,
    broker_messages=30_000,
    side_by_side_messages=20_000,
    side_by_side_rounds=1,
    side_by_side_s=20.0,
    latency_rates=(1_000,),
    latency_s=4.0,
    curve_messages=20_000,
    curve_rows=80_000,
    curve_bytes=10_000_000,
    curves={
        "devices": (10, 10_000),
        "readings": (1, 30),
        "size_bytes": (50, 10_000),
        "workers": (1, 4),
        "processes": (1, 2),
    },
    backlog_messages=50_000,
    outage_s=6.0,
    outage_margin_s=2.0,
)

TINY = replace(
    QUICK,
    name="tiny",
    feed_messages=3_000,
    reference_messages=1_000,
    broker_messages=2_000,
    side_by_side_messages=1_000,
    latency_s=1.0,
    curve_messages=1_000,
    curve_rows=4_000,
    curve_bytes=1_000_000,
    curves={"devices": (10,), "readings": (30,), "size_bytes": (10_000,), "workers": (1,), "processes": (2,)},
    backlog_messages=2_000,
    outage_s=2.0,
    outage_margin_s=0.5,
)

SCALES = {scale.name: scale for scale in (FULL, QUICK, TINY)}
