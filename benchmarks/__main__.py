"""`python -m benchmarks`: measures, judges, and reports."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import click
import structlog

from benchmarks import documents, machine, results, verdict
from benchmarks.bench import Bench
from benchmarks.contestant import Contestant
from benchmarks.contestants import all_contestants
from benchmarks.cpu import Others
from benchmarks.live_line import LiveLine
from benchmarks.measurements import MEASUREMENTS
from benchmarks.scale import SCALES
from benchmarks.servers import Servers

QUICK_FOLDER = machine.ROOT / "build" / "benchmarks"


@click.group(invoke_without_command=True)
@click.option("--quick", is_flag=True, help="Small sizes: whether it runs at all; no figures to quote.")
@click.option("--tiny", is_flag=True, hidden=True, help="Smaller still, for the tests of the benchmarks.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this measurement; may be given several times.")
@click.option("--contestant", multiple=True, metavar="NAME", help="Only these systems side by side.")
@click.option("--rounds", type=click.IntRange(1), help="Medians are of so many rounds (5).")
@click.option("--outage-minutes", type=click.FloatRange(min=0.01), help="How long the database is away (10).")
@click.option("--cores", type=click.IntRange(1), help="Only so many cores for everything, servers included.")
@click.option("--list", "listing", is_flag=True, help="Name the measurements and the systems, and end.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the result file.")
@click.pass_context
def main(
    context: click.Context,
    quick: bool,
    tiny: bool,
    only: tuple[str, ...],
    contestant: tuple[str, ...],
    rounds: int | None,
    outage_minutes: float | None,
    cores: int | None,
    listing: bool,
    out: Path | None,
) -> None:
    """Measure mqtt-bridge, alone and beside others, and judge it by what the project asks of itself.

    All servers are started for it and taken away again. Measurements of one commit go into one file, each replaced
    when it is made again: a run that was broken off is continued with --only.

    \b
    Examples:
      python -m benchmarks                                # everything, in half an hour
      python -m benchmarks --quick                        # whether it runs, in some minutes
      python -m benchmarks --only full-load --rounds 3
      python -m benchmarks --only side-by-side --contestant mqtt-bridge --contestant paho-copy
      python -m benchmarks report                         # tables, plots, and the part of the README
      python -m benchmarks profile                        # where the time goes
    """
    if context.invoked_subcommand is not None:
        return
    contestants = all_contestants()
    if listing:
        _list(contestants)
        return
    scale = SCALES["tiny" if tiny else "quick" if quick else "full"]
    bench_parts = {"rounds": rounds, "outage_s": None if outage_minutes is None else 60 * outage_minutes}
    scale = scale.changed(**{name: value for name, value in bench_parts.items() if value is not None})
    chosen = _chosen(only, MEASUREMENTS, "--only")
    systems = _chosen(contestant, contestants, "--contestant")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # and so of all that is started from here
    folder = out or (results.FOLDER if scale.name == "full" else QUICK_FOLDER)
    line = LiveLine()
    with Servers() as servers:
        commit, dirty = machine.commit()
        described = machine.describe(servers)
        begun = results.fresh(commit=commit, dirty=dirty, scale=scale.name, cores=cores, machine=described)
        path, found = results.open_or_begin(folder, begun)
        bench = Bench(servers, scale, {name: contestants[name] for name in systems}, line.say)
        for name in chosen:
            line.part(name)
            began_s, others = time.monotonic(), Others()
            figures = MEASUREMENTS[name].measure(bench)
            found["measurements"][name] = {
                "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - began_s, 1),
                "others_cores": round(others.cores(), 2),
                "figures": figures,
            }
            found["verdict"] = verdict.judge(found)
            results.write(path, found)
            line.done(f"measured, while others kept {others.cores():.1f} cores busy")
    _print_verdict(found)
    click.echo(f"Written to {path}")


@main.command()
@click.option("--results", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Of this file.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write RESULTS.md and plots there only.")
def report(path: Path | None, out: Path | None) -> None:
    """Write tables and plots from the latest results: benchmarks/RESULTS.md, benchmarks/plots, and the README.

    \b
    Examples:
      python -m benchmarks report
      python -m benchmarks report --results build/benchmarks/2026-10-01-quick-0123456789.json --out build/report
    """
    path = path or results.latest()
    if path is None:
        raise click.ClickException(f"there are no results in {results.FOLDER}: run python -m benchmarks first.")
    if out is None and path.parent != results.FOLDER:
        raise click.UsageError("the documents of the project are of results in benchmarks/results: give --out.")
    for written in documents.write(path, out):
        click.echo(f"Written: {written}")


@main.command()
@click.option("--seconds", type=click.IntRange(1), default=10, show_default=True, help="Of each of two recordings.")
@click.option("--gil", is_flag=True, help="Only threads that hold the interpreter's lock.")
@click.option("--native", is_flag=True, help="Also what runs in C.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=QUICK_FOLDER, help="Folder.")
def profile(seconds: int, gil: bool, native: bool, out: Path) -> None:
    """Record the bridge under full load on the feed: a flame graph, and where most time is spent.

    \b
    Examples:
      python -m benchmarks profile
      python -m benchmarks profile --seconds 20 --gil --out /tmp/profile
    """
    from benchmarks.profile import record

    click.echo(record(out, seconds=seconds, gil=gil, native=native))
    click.echo(f"Written: {out / 'profile.svg'} and {out / 'profile.txt'}")


def _list(contestants: Mapping[str, Contestant]) -> None:
    click.echo("Measurements (--only):")
    for name, module in MEASUREMENTS.items():
        click.echo(f"  {name:<14}{module.QUESTION}")
    click.echo("Systems (--contestant):")
    for name, system in contestants.items():
        click.echo(f"  {name:<24}{system.title}")


def _chosen(asked: tuple[str, ...], known: Mapping[str, object], option: str) -> list[str]:
    """What was asked for, in the order in which it is run; everything where nothing was."""
    if unknown := sorted(set(asked) - known.keys()):
        raise click.BadParameter(f"there is no {', '.join(unknown)}; one of {', '.join(known)}.", param_hint=option)
    return [name for name in known if not asked or name in asked]


def _print_verdict(found: results.Results) -> None:
    width = max(len(line["demand"]) for line in found["verdict"])
    for line in found["verdict"]:
        click.echo(f"{line['answer']:<7} {line['demand']:<{width}}  {line['measured']}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
