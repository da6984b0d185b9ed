"""What the project asks of itself, line by line, against what was measured. What was not measured is open, not met."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.contestants.bridge import Bridge
from benchmarks.results import Results, figures

MOST_CPU_US = 10.0
LEAST_PER_S = {"default": 40_000, "brin": 75_000, "none": 75_000}
LEAST_TIMES = {"pooled-inserts": 35.0, "connection-per-payload": 200.0}
"""How many times the rate of these systems, the bridge on the feed."""
LATENCY_RATE = "1000"
MOST_P50_MS = 10.0
MOST_P99_OF_COMMITS = 3.0
MOST_GROWTH = 1.25
"""Memory at its most in the second half of an outage, or of a backlog, against its most in the first."""
MOST_UNEVENNESS = 0.10

Answer = Literal["met", "missed", "open"]


@dataclass(frozen=True, slots=True)
class Line:
    """One demand."""

    demand: str
    answer: Answer
    measured: str
    """The figures, in words."""


def judge(results: Results) -> list[dict[str, Any]]:
    """Every line, for the results."""
    return [asdict(line) for rule in _RULES for line in rule(results)]


def _line(demand: str, met: bool, measured: str) -> Line:
    return Line(demand, "met" if met else "missed", measured)


def _open(demand: str, why: str = "not measured") -> Line:
    return Line(demand, "open", why)


def _full_load(results: Results) -> Iterator[Line]:
    cpu = f"at most {MOST_CPU_US:g} us of CPU a message in the bridge, on the feed, default index"
    found = figures(results, "full-load")
    if found is None:
        yield _open(cpu)
    else:
        us = found["indexes"]["default"]["cpu_us"]["system"]
        yield _line(cpu, us["median"] <= MOST_CPU_US, f"{us['median']:.1f} us ({us['least']:.1f} to {us['most']:.1f})")
    for index, least in LEAST_PER_S.items():
        demand = f"at least {least:,} messages/s on the feed, index {index}"
        if found is None:
            yield _open(demand)
            continue
        rate = found["indexes"][index]["per_s"]
        measured = f"{rate['median']:,.0f}/s ({rate['least']:,.0f} to {rate['most']:,.0f})"
        yield _line(demand, rate["median"] >= least, measured)


def _crash(results: Results) -> Iterator[Line]:
    demand = "killed in the middle of a full load, every message is stored once"
    found = figures(results, "crash")
    if found is None:
        yield _open(demand)
        return
    outcome = found["outcome"]
    measured = (
        f"{outcome['stored']:,} of {outcome['messages']:,} stored, {outcome['distinct']:,} different,"
        f" {found['kills']} kills, {outcome['notes']['redelivered']:,} redelivered"
    )
    yield _line(demand, outcome["exact"], measured)


def _others(results: Results) -> Iterator[Line]:
    demand = "less CPU a message than every other system, side by side through Mosquitto"
    found = figures(results, "side-by-side")
    systems = {} if found is None else {name: it for name, it in found["systems"].items() if "unavailable" not in it}
    if Bridge.name not in systems or len(systems) < 2:
        yield _open(demand, "no other system was measured" if found else "not measured")
        return
    cpu = {name: it["cpu_us"]["system"]["median"] for name, it in systems.items()}
    ours = cpu.pop(Bridge.name)
    nearest = min(cpu, key=lambda name: cpu[name])
    yield _line(
        demand, ours < cpu[nearest], f"{ours:.1f} us; next of {len(cpu)} others is {nearest} with {cpu[nearest]:.1f} us"
    )


def _times(results: Results) -> Iterator[Line]:
    found, ours = figures(results, "side-by-side"), figures(results, "full-load")
    for name, least in LEAST_TIMES.items():
        demand = f"at least {least:g} times the rate of {name} (the bridge on the feed)"
        other = None if found is None else found["systems"].get(name)
        if other is None or "unavailable" in other or ours is None:
            yield _open(demand)
            continue
        rate, theirs = ours["indexes"]["default"]["per_s"]["median"], other["per_s"]["median"]
        yield _line(demand, rate >= least * theirs, f"{rate / theirs:,.0f} times: {rate:,.0f}/s to {theirs:,.0f}/s")


def _latency(results: Results) -> Iterator[Line]:
    p50 = f"at 1,000 messages/s, half of the rows are visible within {MOST_P50_MS:g} ms"
    p99 = f"at 1,000 messages/s, p99 is at most {MOST_P99_OF_COMMITS:g} times that of an empty commit"
    found = figures(results, "latency")
    at = None if found is None else found["rates"].get(LATENCY_RATE)
    if at is None:
        yield from (_open(p50), _open(p99))
        return
    late, commit = at["latency_ms"], at["commit_ms"]
    yield _line(p50, late["p50"] <= MOST_P50_MS, f"{late['p50']:.1f} ms")
    yield _line(
        p99,
        late["p99"] <= MOST_P99_OF_COMMITS * commit["p99"],
        f"{late['p99']:.1f} ms, {late['p99'] / commit['p99']:.1f} times {commit['p99']:.1f} ms",
    )


def _memory(results: Results) -> Iterator[Line]:
    for name, begin, end, what in (
        ("outage", "away", "back", "an outage of the database"),
        ("backlog", "started", "drained", "a backlog"),
    ):
        demand = f"memory is flat through {what}"
        found = figures(results, name)
        if found is None:
            yield _open(demand)
            continue
        marks, samples = found["memory"]["marks"], found["memory"]["samples"]
        middle = (marks[begin] + marks[end]) / 2
        first = [mb for at, mb in samples if marks[begin] <= at < middle]
        second = [mb for at, mb in samples if middle <= at < marks[end]]
        size = f"{found['outage_s']:,.0f} s" if name == "outage" else f"{found['messages']:,} messages"
        if not first or not second:
            yield _open(demand, f"too few samples in {size}")
            continue
        measured = (
            f"{size}: {max(first):.0f} MB at most in the first half, {max(second):.0f} MB in the second;"
            f" {found['stored']:,} of {found['messages']:,} stored"
        )
        flat = max(second) <= MOST_GROWTH * max(first)
        yield _line(demand, flat and found["stored"] == found["messages"], measured)


def _processes(results: Results) -> Iterator[Line]:
    even = f"two processes share a load within {MOST_UNEVENNESS:.0%} of evenly"
    grows = "the total grows with two processes"
    found = figures(results, "curves")
    points = {} if found is None else {point["at"]: point for point in found["curves"].get("processes", ())}
    if 1 not in points or 2 not in points:
        yield from (_open(even), _open(grows))
        return
    skipped = points[2].get("skipped") or points[1].get("skipped")
    if skipped:
        yield from (_open(even, skipped), _open(grows, skipped))
        return
    one, two = points[1]["outcome"]["per_s"], points[2]["outcome"]["per_s"]
    yield _line(even, points[2]["unevenness"] <= MOST_UNEVENNESS, f"{points[2]['unevenness']:.1%} away from even")
    yield _line(grows, two > one, f"{one:,.0f}/s with one, {two:,.0f}/s with two")


_RULES: tuple[Callable[[Results], Iterator[Line]], ...] = (
    _full_load,
    _crash,
    _others,
    _times,
    _latency,
    _memory,
    _processes,
)
