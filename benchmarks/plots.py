"""The results as pictures, each for a light and for a dark page; SVG with text as paths, so that no font is missed.

The name of the result file stands in the metadata of each: a test sees that they are of the latest one. matplotlib is
in the extra `bench`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.contestants.bridge import Bridge
from benchmarks.results import Results, figures
from benchmarks.verdict import LATENCY_RATE

FOLDER = Path(__file__).with_name("plots")
WIDTH = 8.6


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours that are read well on the pages of GitHub; the ground is the page's own."""

    name: str
    text: str
    muted: str
    grid: str
    ours: str
    others: str
    third: str
    shade: str


THEMES = (
    Theme("light", "#1f2328", "#59636e", "#d1d9e0", "#0969da", "#afb8c1", "#bc4c00", "#ffebe9"),
    Theme("dark", "#e6edf3", "#9198a1", "#30363d", "#4493f8", "#656c76", "#db6d28", "#3c1618"),
)


def draw(results: Results, source: str, folder: Path = FOLDER) -> list[Path]:
    """Every plot of what was measured; the files. Those of what was not measured are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, paint in PLOTS.items():
        for theme in THEMES:
            path = folder / f"{name}-{theme.name}.svg"
            path.unlink(missing_ok=True)
            with mpl.rc_context(rc=_style(theme)):
                figure = paint(results, theme)
                if figure is not None:
                    metadata = {"Date": None, "Creator": "python -m benchmarks report", "Source": source}
                    figure.savefig(path, format="svg", transparent=True, metadata=metadata)
                    written.append(path)
    return written


def _style(theme: Theme) -> Any:
    return {
        "svg.fonttype": "path",
        "svg.hashsalt": "mqtt-bridge",
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.color": theme.text,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.grid,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.08,
        "figure.titlesize": 11,
        "figure.titleweight": "bold",
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titlecolor": theme.text,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "legend.frameon": False,
        "legend.labelcolor": theme.text,
    }


# -- bars


def _cpu(results: Results, theme: Theme) -> Figure | None:
    systems = _systems(results)
    values = {_labelled(name, it): it["cpu_us"]["system"]["median"] for name, it in systems.items()}
    title = "CPU of the system itself, microseconds a message (less is better; logarithmic scale)"
    return _bars(values, theme, title, lambda value: f"{value:.1f}" if value < 100 else f"{value:,.0f}")


def _throughput(results: Results, theme: Theme) -> Figure | None:
    values = {_labelled(name, it): it["per_s"]["median"] for name, it in _systems(results).items()}
    load = figures(results, "full-load")
    for index, it in {} if load is None else load["indexes"].items():
        named = {"default": "default index", "brin": "BRIN", "none": "no index"}[index]
        values[f"{Bridge.name}, fed directly, {named}"] = it["per_s"]["median"]
    title = "Messages stored a second, through Mosquitto or fed directly (more is better; logarithmic scale)"
    return _bars(values, theme, title, lambda value: f"{value:,.0f}", rising=False)


def _labelled(name: str, it: dict[str, Any]) -> str:
    """With what it makes of a message: a row is a good deal less work than four."""
    rows = it["rows_per_message"]
    return f"{name}, {rows} row{'s' if rows > 1 else ''}"


def _systems(results: Results) -> dict[str, Any]:
    found = figures(results, "side-by-side")
    return {} if found is None else {name: it for name, it in found["systems"].items() if "unavailable" not in it}


def _bars(
    values: dict[str, float], theme: Theme, title: str, text: Callable[[float], str], *, rising: bool = True
) -> Figure | None:
    """On a logarithmic scale, the best on top."""
    if not values:
        return None
    names = sorted(values, key=lambda name: values[name], reverse=rising)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(names)))
    axes = figure.subplots()
    colours = [theme.ours if name.startswith(Bridge.name) else theme.others for name in names]
    axes.barh(names, [values[name] for name in names], color=colours, height=0.66)
    axes.set_xscale("log")
    axes.set_xlim(min(values.values()) / 2.5, max(values.values()) * 2.2)
    for place, name in enumerate(names):
        axes.text(values[name] * 1.06, place, text(values[name]), va="center", color=theme.text)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(theme.text)
        label.set_fontweight("bold" if name.startswith(Bridge.name) else "normal")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.grid(visible=True)
    axes.xaxis.set_major_formatter(_plain())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    _title(figure, title)
    return figure


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.012, ha="left")


# -- lines


def _latency(results: Results, theme: Theme) -> Figure | None:
    found = figures(results, "latency")
    if found is None:
        return None
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    colours = itertools.cycle((theme.others, theme.third))
    for rate, at in found["rates"].items():
        colour = theme.ours if rate == LATENCY_RATE else next(colours)
        points = at["latency_ms"]["distribution"]
        shares = [100 * number / (len(points) - 1) for number in range(len(points))]
        label = f"{int(rate):,} messages/s: p50 {at['latency_ms']['p50']:.1f} ms, p99 {at['latency_ms']['p99']:.1f} ms"
        axes.plot(points, shares, color=colour, linewidth=1.8, label=label)
        axes.axvline(at["commit_ms"]["p99"], color=colour, linewidth=1.2, linestyle="--")
    axes.plot([], [], color=theme.muted, linewidth=1.2, linestyle="--", label="p99 of an empty commit in the same run")
    _log_axis(axes)
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 25, 50, 75, 99])
    axes.grid(visible=True)
    axes.set_xlabel("milliseconds from publishing to the row being visible")
    axes.set_ylabel("per cent of the rows")
    axes.legend(loc="lower right", fontsize=9)
    _title(figure, "Latency through Mosquitto")
    return figure


CURVES = {
    "devices": "topics",
    "readings": "readings a message",
    "size_bytes": "bytes of payload",
    "workers": "workers",
    "processes": "processes",
}


def _curves(results: Results, theme: Theme) -> Figure | None:
    found = figures(results, "curves")
    if found is None:
        return None
    curves = {name: [point for point in points if "skipped" not in point] for name, points in found["curves"].items()}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    columns = 3 if len(curves) > 2 else len(curves)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.5 * -(-len(curves) // columns)))
    grid = figure.subplots(-(-len(curves) // columns), columns, squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for number, (axes, (name, points)) in enumerate(zip(grid.flat, curves.items(), strict=False)):
        at = [point["at"] for point in points]
        for role, colour, label in (("system", theme.ours, "mqtt-bridge"), ("postgres", theme.third, "PostgreSQL")):
            cpu = [point["outcome"]["cpu_us"][role] for point in points]
            axes.plot(at, cpu, "o-", color=colour, markersize=3.5, linewidth=1.6, label=label)
        _log_axis(axes)
        axes.set_xticks(at)
        axes.set_yscale("log" if _is_wide(points) else "linear")
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_formatter(_plain())
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0)
        axes.grid(visible=True)
        axes.set_xlabel(CURVES[name])
        if number % columns == 0:
            axes.set_ylabel("CPU us/message")
        if number == 0:
            axes.legend(fontsize=8.5, loc="best")
    _title(figure, "What a message costs")
    return figure


def _is_wide(points: list[Any]) -> bool:
    values = [point["outcome"]["cpu_us"][role] for point in points for role in ("system", "postgres")]
    return bool(min(values) > 0 and max(values) / min(values) > 20)


def _memory(results: Results, theme: Theme) -> Figure | None:
    found = {name: it for name in ("outage", "backlog") if (it := figures(results, name)) is not None}
    if not found:
        return None
    figure = Figure(figsize=(WIDTH, 3.2))
    grid = figure.subplots(1, len(found), squeeze=False, sharey=True, width_ratios=[3, 2][: len(found)])
    for axes, (name, it) in zip(grid.flat, found.items(), strict=True):
        samples, marks = it["memory"]["samples"], it["memory"]["marks"]
        unit = 60 if samples[-1][0] > 180 else 1
        axes.plot([at / unit for at, _ in samples], [mb for _, mb in samples], color=theme.ours, linewidth=1.6)
        if name == "outage":
            axes.axvspan(marks["away"] / unit, marks["back"] / unit, color=theme.shade, linewidth=0)
            axes.axvline(marks["caught up"] / unit, color=theme.muted, linewidth=1, linestyle="--")
            axes.set_title(f"The database is away, {it['rate']:,} messages/s")
        else:
            axes.axvline(marks["drained"] / unit, color=theme.muted, linewidth=1, linestyle="--")
            axes.set_title(f"A backlog of {it['messages']:,} messages")
        axes.grid(visible=True)
        axes.set_xlabel("minutes (dashed: all is stored)" if unit == 60 else "seconds (dashed: all is stored)")
    grid.flat[0].set_ylabel("MB")
    grid.flat[0].set_ylim(0, 1.15 * max(mb for it in found.values() for _, mb in it["memory"]["samples"]))
    _title(figure, "Memory of the bridge")
    return figure


def _log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(_plain())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


def _plain() -> FuncFormatter:
    """1,000 and not 10 to the 3; above that 10k, which leaves room for its neighbours."""

    def text(value: float, _: object) -> str:
        return f"{value / 1000:g}k" if value >= 10_000 else f"{value:,.12g}"

    return FuncFormatter(text)


PLOTS: dict[str, Callable[[Results, Theme], Figure | None]] = {
    "cpu": _cpu,
    "throughput": _throughput,
    "latency": _latency,
    "curves": _curves,
    "memory": _memory,
}
