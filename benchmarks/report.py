"""The results as Markdown: the part of the README, and all of them. No figure is written by hand.

Both stand in documents between `generated` comments; `tests/unit/test_docs.py` compares them with the committed file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contestant import REFERENCE
from benchmarks.contestants.bridge import Bridge
from benchmarks.measurements import MEASUREMENTS
from benchmarks.results import Results, figures, latest, read
from benchmarks.telemetry import DEVICES, READINGS, Load

Lines = list[str]

NOTHING_YET = ["Nothing is measured yet: `make bench`, then `make bench BENCH_ARGS=report`."]
INDEXES = {
    "default": "`(device, metric, time)`, the default",
    "brin": "BRIN on time",
    "none": "none",
}
PICTURES = {
    "cpu": ("side-by-side",),
    "throughput": ("side-by-side", "full-load"),
    "latency": ("latency",),
    "curves": ("curves",),
    "memory": ("outage", "backlog"),
}
"""What each plot is drawn of."""
CURVES = {
    "devices": "Topics",
    "readings": "Readings a message",
    "size_bytes": "Bytes of payload (one reading and a text)",
    "workers": "`BRIDGE_WORKERS`",
    "processes": "`BRIDGE_PROCESSES`",
}


def how_fast(path: Path | None = None) -> Lines:
    """What the README says."""
    path = path or latest()
    if path is None:
        return NOTHING_YET
    results = read(path)
    lines = [
        *_measured_on(results, path),
        "",
        *_section("Through Mosquitto, beside others, one after the other in one run:", _systems(results)),
        *_picture(results, "cpu", "CPU time a message, by system"),
        *_section(
            "On a feed that is faster than any broker, so that the bridge and PostgreSQL are the limit:",
            _full_load(results),
        ),
        *_section("From publishing to the row being visible to others, through Mosquitto:", _latency(results)),
        *_picture(results, "memory", "Memory while the database is away"),
        "[benchmarks/README.md](benchmarks/README.md) says how it was measured and with which bias;",
        "[benchmarks/RESULTS.md](benchmarks/RESULTS.md) has everything, and what of it falls short.",
    ]
    return _without_double_blanks(lines)


def everything(path: Path | None = None) -> Lines:
    """What benchmarks/RESULTS.md says."""
    path = path or latest()
    if path is None:
        return NOTHING_YET
    results = read(path)
    parts: list[tuple[str, Lines]] = [
        ("What the project asks of itself", _verdict(results)),
        (
            "Side by side",
            [*_systems(results), "", *_unavailable(results), "", *_picture(results, "throughput", "Rates")],
        ),
        ("Full load", [*_full_load(results), "", *_to_reference(results)]),
        ("Killed in the middle", _crash(results)),
        ("Through Mosquitto", _through_mosquitto(results)),
        ("Latency", [*_latency(results), "", *_picture(results, "latency", "Latency"), *_watcher(results)]),
        ("What the cost depends on", [*_curves(results), "", *_picture(results, "curves", "Cost of a message")]),
        ("Memory", _memory(results)),
    ]
    lines = [*_measured_on(results, path), "", *_when(results)]
    for title, content in parts:
        if any(content):
            lines += ["", f"## {title}", "", *content]
    return _without_double_blanks(lines)


# -- parts


def _measured_on(results: Results, path: Path) -> Lines:
    machine, packages = results["machine"], results["machine"]["packages"]
    state = f"commit {results['commit']}" + (" with changes" if results["dirty"] else "")
    return [
        f"Measured on {path.name[:10]}, {state}: {machine['cpu']}, {machine['cores']} cores shared by broker, database",
        f"and bridge, {machine['memory_gb']:g} GB; {machine['kernel']}, {machine['python']},"
        f" PostgreSQL {machine['postgres']['server_version']} with its defaults,",
        f"Mosquitto {machine['mosquitto']}, paho-mqtt {packages['paho-mqtt']}."
        f" Messages of {Load(1).payload_bytes} bytes, {READINGS} readings, {DEVICES:,} topics, QoS 1.",
        *_meanwhile(results),
    ]


def _meanwhile(results: Results) -> Lines:
    """What the machine did besides: figures of a busy one say little."""
    others = [part["others_cores"] for part in results["measurements"].values()]
    return [f"Others kept {max(others):.1f} cores busy meanwhile, at most."] if others else []


def _systems(results: Results) -> Lines:
    """By CPU, the least first."""
    found = figures(results, "side-by-side")
    systems = {} if found is None else {n: it for n, it in found["systems"].items() if "unavailable" not in it}
    ordered = sorted(systems, key=lambda name: _median(systems[name]["cpu_us"]["system"]))
    rows = []
    for name in ordered:
        it = systems[name]
        shown = f"**{name}**" if name == Bridge.name else name
        rows.append(
            (
                shown,
                _rounded(_median(it["per_s"])),
                _us(it["cpu_us"]["system"]),
                _us(it["cpu_us"]["postgres"]),
                str(it["rows_per_message"]),
                _held(it["trials"]),
                it["guarantees"],
            )
        )
    header = ("System", "Messages/s", "CPU us/message", "PostgreSQL us/message", "Rows", "Held of sent", "Promises")
    return _table(header, rows)


def _held(trials: list[dict[str, Any]]) -> str:
    stored, messages = (sum(trial[name] for trial in trials) for name in ("stored", "messages"))
    return f"all of {messages:,}" if stored == messages else f"{stored:,} of {messages:,}"


def _unavailable(results: Results) -> Lines:
    found = figures(results, "side-by-side")
    systems = {} if found is None else found["systems"]
    return [f"* {name} was not measured: {it['unavailable']}" for name, it in systems.items() if "unavailable" in it]


def _full_load(results: Results) -> Lines:
    found = figures(results, "full-load")
    if found is None:
        return []
    rows = [
        (
            INDEXES[index],
            _spread(it["per_s"]),
            _rounded(_median(it["rows_per_s"])),
            _us(it["cpu_us"]["system"]),
            _us(it["cpu_us"]["postgres"]),
        )
        for index, it in found["indexes"].items()
    ]
    header = ("Index of `readings`", "Messages/s (least to most)", "Rows/s", "CPU us/message", "PostgreSQL us/message")
    return _table(header, rows)


def _to_reference(results: Results) -> Lines:
    found = figures(results, "full-load")
    if found is None or found["reference"] is None:
        return []
    reference = found["reference"]
    rows = [
        (INDEXES[index], f"{_median(it['per_s']):.1f}", f"{_median(it['cpu']):.2f}")
        for index, it in found["to_reference"].items()
    ]
    return [
        f"`{REFERENCE}` in the same rounds, on the same feed: {_rounded(_median(reference['per_s']))} messages/s,"
        f" {_us(reference['cpu_us']['system'])} us. Ratios to it, medians of the rounds:",
        "",
        *_table(("Index", "Rate, times", "CPU, times"), rows),
    ]


def _crash(results: Results) -> Lines:
    found = figures(results, "crash")
    if found is None:
        return []
    outcome = found["outcome"]
    return [
        f"{outcome['messages']:,} messages on the feed, {found['kills']} times `kill -9`:"
        f" {outcome['notes']['redelivered']:,} messages were delivered again; the database holds"
        f" {outcome['stored']:,}, of which {outcome['distinct']:,} are different, in {outcome['rows']:,} rows.",
    ]


def _through_mosquitto(results: Results) -> Lines:
    found = figures(results, "mosquitto")
    if found is None:
        return []
    names = {"system": "mqtt-bridge", "broker": "Mosquitto", "postgres": "PostgreSQL", "generator": "publisher"}
    rows = [(names[role], _us(cpu), f"{found['cores'][role]:.2f}") for role, cpu in found["cpu_us"].items()]
    return [
        f"{_spread(found['per_s'])} messages/s.",
        "",
        *_table(("Process", "CPU us/message", "Cores at that rate"), rows),
    ]


def _latency(results: Results) -> Lines:
    found = figures(results, "latency")
    if found is None:
        return []
    rows = [
        (
            f"{int(rate):,}",
            f"{at['latency_ms']['p50']:.1f} ms",
            f"{at['latency_ms']['p99']:.1f} ms",
            f"{at['commit_ms']['p50']:.1f} ms",
            f"{at['commit_ms']['p99']:.1f} ms",
            f"{at['cores']['system']:.0%}",
        )
        for rate, at in found["rates"].items()
    ]
    header = ("Messages/s", "p50", "p99", "empty commit p50", "empty commit p99", "CPU of the bridge, of a core")
    return _table(header, rows)


def _watcher(results: Results) -> Lines:
    found = figures(results, "latency")
    if found is None:
        return []
    pauses = [at["pause_of_the_watcher_ms"] for at in found["rates"].values()]
    ticks = [at["latest_tick_of_the_generator_ms"] for at in found["rates"].values()]
    return [
        "Whoever watches looks every"
        f" {max(pause['p50'] for pause in pauses):.2f} ms (p99 {max(pause['p99'] for pause in pauses):.1f} ms):"
        " that much a row may be seen too late."
        f" The publisher was late by {max(ticks):.1f} ms at most; each message carries the time at which it left.",
    ]


def _curves(results: Results) -> Lines:
    found = figures(results, "curves")
    lines: Lines = []
    for name, points in {} if found is None else found["curves"].items():
        rows = [
            (f"{point['at']:,}", "-", "-", "-", point["skipped"])
            if "skipped" in point
            else (
                f"{point['at']:,}",
                _rounded(point["outcome"]["per_s"]),
                f"{point['outcome']['cpu_us']['system']:.1f}",
                f"{point['outcome']['cpu_us']['postgres']:.1f}",
                _remark(name, point),
            )
            for point in points
        ]
        lines += ["", *_table((CURVES[name], "Messages/s", "CPU us/message", "PostgreSQL us/message", ""), rows)]
    return lines[1:]


def _remark(curve: str, point: dict[str, Any]) -> str:
    if curve == "processes":
        return f"{point['unevenness']:.1%} from even"
    return "" if point["outcome"]["exact"] else "not all were stored once"


def _memory(results: Results) -> Lines:
    lines: Lines = []
    if (found := figures(results, "outage")) is not None:
        most = found["memory"]["most_mb"]
        lines += [
            f"* The database is away for {found['outage_s']:,.0f} s at {found['rate']:,} messages/s:"
            f" {most['start']:.0f} MB before, {most['away']:.0f} MB during, {most['back']:.0f} MB after;"
            f" {found['stored']:,} of {found['messages']:,} messages stored.",
        ]
    if (found := figures(results, "backlog")) is not None:
        most = found["memory"]["most_mb"]
        lines += [
            f"* A backlog of {found['messages']:,} messages in Mosquitto: {most['started']:.0f} MB at most,"
            f" worked off at {_rounded(found['per_s'])} messages/s, {found['stored']:,} stored.",
        ]
    return [*lines, "", *_picture(results, "memory", "Memory over time")] if lines else []


def _verdict(results: Results) -> Lines:
    rows = [(line["demand"], line["answer"], line["measured"]) for line in results["verdict"]]
    return _table(("Demand", "", "Measured"), rows)


def _when(results: Results) -> Lines:
    """How busy the machine was otherwise tells how far a figure may be trusted."""
    made = [
        f"{name} {it['measured_at'][11:16]} ({it['others_cores']:.1f})"
        for name in MEASUREMENTS
        if (it := results["measurements"].get(name))
    ]
    return [f"When each part ended (UTC), and how many cores others kept busy meanwhile: {', '.join(made)}."]


# -- Markdown


def _section(title: str, content: Lines) -> Lines:
    return [title, "", *content, ""] if content else []


def _picture(results: Results, name: str, text: str) -> Lines:
    """A picture for each theme, where there is something to draw; `placed` says where it is, seen from the document."""
    return [f"PICTURE {name} {text}", ""] if any(figures(results, part) for part in PICTURES[name]) else []


def placed(lines: Iterable[str], *, folder: str) -> Lines:
    """With pictures, seen from the document; `folder` is `benchmarks/` for the README of the project."""
    return list(_placed(lines, folder))


def _placed(lines: Iterable[str], folder: str) -> Iterator[str]:
    for line in lines:
        if not line.startswith("PICTURE "):
            yield line
            continue
        _, name, text = line.split(" ", 2)
        dark, light = (f"{folder}plots/{name}-{theme}.svg" for theme in ("dark", "light"))
        yield "<picture>"
        yield f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        yield f'  <img alt="{text}" src="{light}">'
        yield "</picture>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Lines:
    if not rows:
        return []
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _without_double_blanks(lines: Sequence[str]) -> Lines:
    kept = [line for line, before in zip(lines, ["", *lines], strict=False) if line or before]
    return kept[:-1] if kept and not kept[-1] else kept


def _median(spread: dict[str, float]) -> float:
    return spread["median"]


def _us(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f}" if spread["median"] < 100 else _rounded(spread["median"])


def _rounded(value: float) -> str:
    """Three digits, for no more are certain."""
    digits = len(str(int(value)))
    return f"{round(value, min(0, 3 - digits)):,.0f}" if digits > 1 else f"{value:.1f}"


def _spread(spread: dict[str, float]) -> str:
    return f"{_rounded(spread['median'])} ({_rounded(spread['least'])} to {_rounded(spread['most'])})"
