"""The large runs that docs/guarantees.md quotes, one after the other or several at a time, as one Markdown table.

    python -m tests.chaos.proofs                       # all of them: about two hours
    python -m tests.chaos.proofs --list
    python -m tests.chaos.proofs --only '20k*' --only backlog* --parallel 2 --json proofs.json
    python -m tests.chaos.proofs --only 'outage*' --minutes 2

Each run is a process with servers of its own, so runs do not disturb each other but by the load they are. One that
neither ends nor fails in several times the time it should take is killed. The exit code is 0 when every run showed
what it should: all stored exactly once, or without the ledger, that some are not.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from tests.chaos.schedule import Parameters

ROOT = Path(__file__).resolve().parents[2]
FAULTS: dict[str, Any] = {"kills": 15, "db_crashes": 4, "cuts": 10, "broker_restarts": 2}
FEW: dict[str, Any] = {"kills": 5, "db_crashes": 2, "cuts": 4, "broker_restarts": 2}
NONE: dict[str, Any] = {"kills": 0, "db_crashes": 0, "cuts": 0, "broker_restarts": 0}


@dataclass(frozen=True, slots=True)
class Proof:
    """A run, and what it has to show."""

    name: str
    title: str
    parameters: Parameters

    def shows(self, result: dict[str, Any]) -> bool:
        """Whether this result is what the run is made for."""
        if self.parameters.without_ledger:
            counts = result["comparison"]
            return bool(counts["duplicated"]) and not counts["lost"]
        return bool(result["good"])

    @property
    def timeout_s(self) -> float:
        """Much longer than it should take."""
        asked = self.parameters
        faults = asked.kills + asked.early_kills + asked.db_crashes + 2 * asked.cuts + asked.broker_restarts
        seconds = asked.messages / (1000.0 if asked.backlog else asked.rate)
        return 600 + 3 * seconds + 20 * (faults + 3 * (asked.stalls + asked.steals + asked.freezes))


def proofs(*, minutes: float) -> list[Proof]:
    """All of them. The outages last so many minutes."""
    return [*_under_all_faults(), *_identical(), *_outages(minutes), *_special(), *_several_processes()]


def _under_all_faults() -> Iterator[Proof]:
    for name, messages, rate in (("20k", 20_000, 400.0), ("100k", 100_000, 2500.0)):
        for protocol in ("5", "3.1.1"):
            for seed in (1, 2, 3):
                parameters = Parameters(messages=messages, rate=rate, protocol=protocol, seed=seed, **FAULTS)
                title = f"{messages:,} messages at {rate:,.0f}/s, MQTT {protocol}, seed {seed}"
                yield Proof(f"{name}-mqtt{protocol}-seed{seed}", title, parameters)
        parameters = Parameters(messages=messages, rate=rate, without_ledger=True, **FAULTS)
        title = f"{messages:,} messages at {rate:,.0f}/s **without the ledger**: it has to show duplicates"
        yield Proof(f"{name}-without-ledger", title, parameters)
    parameters = Parameters(**FAULTS, early_kills=10, db_delay_ms=10.0, broker_delay_ms=10.0)
    yield Proof("20k-slow-links", "20,000 messages at 400/s, 10 ms on each link", parameters)


def _identical() -> Iterator[Proof]:
    for payload in ("constant", "cyclic"):
        parameters = Parameters(messages=150_000, rate=3000.0, payload=payload, db_delay_ms=10.0, **FEW)
        title = f"150,000 {_KINDS[payload]} at 3,000/s, 10 ms to the database"
        yield Proof(f"150k-{payload}", title, parameters)
        for protocol in ("5", "3.1.1"):
            faults = FEW | {"kills": 10}
            parameters = Parameters(messages=200_000, payload=payload, protocol=protocol, backlog=True, **faults)
            title = f"backlog of 200,000 {_KINDS[payload]}, at full speed, MQTT {protocol}"
            yield Proof(f"backlog-{payload}-mqtt{protocol}", title, parameters)


_KINDS = {"constant": "identical messages", "cyclic": "messages that repeat as packet ids do"}


def _outages(minutes: float) -> Iterator[Proof]:
    seconds = 60 * minutes
    messages = int(500 * (seconds + 60))
    for spool in ("off", "outage"):
        for kills in (0, 1, 3):
            faults = NONE | {"kills": kills, "broker_restarts": 1 if kills > 1 else 0}
            parameters = Parameters(messages=messages, rate=500.0, outage=seconds, spool=spool, **faults)
            title = f"{minutes:g} minutes without a database at 500/s, spool {spool}, {_number(kills)} `kill -9`"
            yield Proof(f"outage-{spool}-kills{kills}", title, parameters)
    parameters = Parameters(
        messages=messages, rate=500.0, outage=seconds, spool="outage", qos0=0.2, **(NONE | {"cuts": 4})
    )
    title = f"{minutes:g} minutes without a database at 500/s, spool outage, a fifth QoS 0, no `kill -9`"
    yield Proof("outage-outage-qos0", title, parameters)


def _number(count: int) -> str:
    return str(count) if count else "no"


def _special() -> Iterator[Proof]:
    for protocol in ("5", "3.1.1"):
        parameters = Parameters(protocol=protocol, receive="stock", early_kills=5, **FAULTS)
        title = f"20,000 messages at 400/s, received by stock paho, MQTT {protocol}"
        yield Proof(f"stock-mqtt{protocol}", title, parameters)
    parameters = Parameters(messages=20_000, rate=1000.0, full_queue=True, early_kills=5, **FAULTS)
    yield Proof("full-queue", "20,000 messages at 1,000/s, a queue of 100 that is full", parameters)
    parameters = Parameters(messages=20_000, steals=10, **(NONE | {"broker_restarts": 1, "db_crashes": 2}))
    yield Proof("steals", "20,000 messages at 400/s, another bridge takes the client id over", parameters)
    parameters = Parameters(messages=20_000, stalls=6, stall_s=12.0, **(NONE | {"kills": 3}))
    yield Proof("stalls", "20,000 messages at 400/s, silent links", parameters)
    parameters = Parameters(messages=20_000, stalls=2, stall_s=100.0, **(NONE | {"kills": 1}))
    yield Proof("long-stalls", "20,000 messages at 400/s, links silent for longer than any time-out", parameters)
    parameters = Parameters(messages=60_000, freezes=3, **(NONE | {"kills": 1}))
    yield Proof("freezes", "60,000 messages at 400/s, single connections to the database silent for good", parameters)
    parameters = Parameters(messages=40_000, rate=400.0, qos0=0.3, **FAULTS)
    yield Proof("qos0", "40,000 messages at 400/s, a third of them QoS 0", parameters)
    for protocol in ("5", "3.1.1"):
        parameters = Parameters(protocol=protocol, spool="always", early_kills=5, **FAULTS)
        title = f"20,000 messages at 400/s, spool always, MQTT {protocol}"
        yield Proof(f"spool-always-mqtt{protocol}", title, parameters)
    parameters = Parameters(messages=100_000, rate=2500.0, payload="cyclic", spool="always", **FEW)
    yield Proof("spool-always-100k", "100,000 messages at 2,500/s that repeat, spool always", parameters)
    parameters = Parameters(messages=60_000, rate=1000.0, outage=30.0, spool="outage", early_kills=5, **FAULTS)
    yield Proof("spool-outage", "60,000 messages at 1,000/s, spool outage, 30 s without a database", parameters)


def _several_processes() -> Iterator[Proof]:
    for seed in (1, 2, 3):
        parameters = Parameters(processes=2, early_kills=5, seed=seed, **FAULTS)
        yield Proof(f"processes2-20k-seed{seed}", f"20,000 messages at 400/s, two processes, seed {seed}", parameters)
    parameters = Parameters(messages=100_000, rate=2500.0, processes=2, **FAULTS)
    yield Proof("processes2-100k", "100,000 messages at 2,500/s, two processes", parameters)
    parameters = Parameters(messages=100_000, rate=2500.0, processes=4, payload="cyclic", **FAULTS)
    yield Proof("processes4-100k-cyclic", "100,000 messages that repeat at 2,500/s, four processes", parameters)
    parameters = Parameters(processes=2, spool="always", early_kills=5, **FAULTS)
    yield Proof("processes2-spool-always", "20,000 messages at 400/s, two processes, spool always", parameters)
    parameters = Parameters(
        messages=60_000, rate=1000.0, processes=2, outage=30.0, spool="outage", early_kills=5, **FAULTS
    )
    title = "60,000 messages at 1,000/s, two processes, spool outage, 30 s without a database"
    yield Proof("processes2-spool-outage", title, parameters)
    parameters = Parameters(processes=2, steals=10, **(NONE | {"broker_restarts": 1, "db_crashes": 2}))
    yield Proof("processes2-steals", "20,000 messages at 400/s, two processes, another bridge takes over", parameters)
    faults = FEW | {"kills": 10}
    parameters = Parameters(messages=200_000, payload="cyclic", processes=2, backlog=True, **faults)
    yield Proof("processes2-backlog", "backlog of 200,000 that repeat, at full speed, two processes", parameters)


# -- running them


@dataclass(frozen=True, slots=True)
class Outcome:
    """A proof that was run."""

    proof: Proof
    result: dict[str, Any] | None
    """As the run's --json; None where it broke down."""
    failure: str = ""
    """Why it broke down."""

    @property
    def good(self) -> bool:
        """Whether it shows what it should."""
        return self.result is not None and self.proof.shows(self.result)


class Runner:
    """Runs proofs, each in a process of its own; any number of threads may call `run`."""

    def __init__(self, *, logs: Path | None = None) -> None:
        """`logs` is where each run writes what its bridges logged."""
        self._logs = logs
        self._processes: list[subprocess.Popen[str]] = []

    def run(self, proof: Proof) -> Outcome:
        """One run, from its start to its end."""
        arguments = [*options(proof.parameters), "--json"]
        if self._logs is not None:
            arguments += ["--log", str(self._logs / f"{proof.name}.log")]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        try:
            output, errors = process.communicate(timeout=proof.timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return Outcome(proof, None, f"not done after {proof.timeout_s:.0f} s")
        try:
            return Outcome(proof, json.loads(output))
        except ValueError:
            return Outcome(proof, None, errors.strip()[-4000:])

    def stop(self) -> None:
        """End what runs."""
        for process in self._processes:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """It takes everything down itself; where it cannot, the guardians of its servers do."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


def options(parameters: Parameters) -> Iterator[str]:
    """The command line of a run."""
    usual = Parameters()
    for field in fields(Parameters):
        value = getattr(parameters, field.name)
        if value != getattr(usual, field.name):
            yield f"--{field.name.replace('_', '-')}"
            if value is not True:
                yield str(value)


# -- the table

COLUMNS = (
    "Run",
    "Faults",
    "Published",
    "Stored",
    "Lost",
    "Stored twice",
    "Repeated by publisher",
    "Overtaken by",
    "Peak RSS",
    "Drained",
    "Seconds",
    "",
)


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown, for docs/guarantees.md."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(_row(outcome) for outcome in outcomes)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(outcome: Outcome) -> tuple[str, ...]:
    result, title = outcome.result, outcome.proof.title
    if result is None:
        return (title, *("" for _ in COLUMNS[2:]), "**broke down**")
    counts = result["comparison"]
    lost = f"{counts['lost']:,}"
    if counts["qos0_lost"] or outcome.proof.parameters.qos0:
        lost += f" (and {counts['qos0_lost']:,} of QoS 0)"
    return (
        title,
        _faults(result),
        f"{result['published']:,}",
        f"{counts['stored']:,}",
        lost,
        f"{counts['duplicated']:,}",
        f"{result['repeated_by_publisher']:,}",
        "" if counts["displacement"] is None else f"{counts['displacement']:,}",
        f"{result['peak_rss_bytes'] / 2**20:.0f} MiB",
        _drained(result["drained"]),
        f"{result['seconds']:.0f}",
        "" if outcome.good else f"**{'; '.join(result['problems']) or 'no duplicates'}**",
    )


_NAMES = {
    "kill": ("`kill -9`", "`kill -9`"),
    "early_kill": ("`kill -9` twice, the second while it starts", "`kill -9` twice, the second while it starts"),
    "db_crash": ("database crash", "database crashes"),
    "outage": ("outage", "outages"),
    "broker_restart": ("broker restart", "broker restarts"),
    "cut_broker": ("cut from the broker", "cuts from the broker"),
    "cut_db": ("cut from the database", "cuts from the database"),
    "stall_broker": ("silence of the broker", "silences of the broker"),
    "stall_db": ("silence of the database", "silences of the database"),
    "freeze_db": ("connection to the database frozen", "connections to the database frozen"),
    "steal": ("theft of the client id", "thefts of the client id"),
}


def _faults(result: dict[str, Any]) -> str:
    done = result["faults"]
    named = [f"{done[kind]} {names[done[kind] > 1]}" for kind, names in _NAMES.items() if done.get(kind)]
    return ", ".join(named) or "none"


def _drained(drained: dict[str, Any] | None) -> str:
    if drained is None:
        return ""
    return f"{drained['messages']:,} in {drained['seconds']:.0f} s, {drained['rate']:,.0f}/s"


# -- the command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; progress goes to standard error, the table to output."""
    asked = _parse(arguments)
    chosen = _chosen(proofs(minutes=asked.minutes), asked.only)
    if not chosen:
        print("No run has such a name; --list shows them.", file=sys.stderr)
        return 2
    if asked.list:
        print("\n".join(f"{proof.name:<28} {proof.title}" for proof in chosen))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if asked.logs:
        asked.logs.mkdir(parents=True, exist_ok=True)
    outcomes = _run(chosen, asked)
    _print(outcomes)
    return 0 if all(outcome.good for outcome in outcomes) else 1


def _run(chosen: Sequence[Proof], asked: argparse.Namespace) -> list[Outcome]:
    runner = Runner(logs=asked.logs)
    outcomes = []
    with ThreadPoolExecutor(asked.parallel) as threads:
        try:
            for outcome in threads.map(partial(_run_and_say, runner), chosen):
                outcomes.append(outcome)
                if asked.json:  # as far as it is known: the rest may take hours
                    asked.json.write_text(json.dumps([_as_json(outcome) for outcome in outcomes], indent=2) + "\n")
        except BaseException:  # Ctrl-C, SIGTERM
            threads.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            raise
    return outcomes


def _chosen(all_proofs: Sequence[Proof], patterns: Sequence[str]) -> list[Proof]:
    return [proof for proof in all_proofs if not patterns or any(fnmatch(proof.name, p) for p in patterns)]


def _run_and_say(runner: Runner, proof: Proof) -> Outcome:
    print(f"{proof.name}: begins", file=sys.stderr, flush=True)
    outcome = runner.run(proof)
    problems = "; ".join(outcome.result["problems"]) if outcome.result else outcome.failure
    verdict = "good" if outcome.good else problems or "it shows no duplicates"
    print(f"{proof.name}: {verdict}", file=sys.stderr, flush=True)
    return outcome


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.proof.name,
        "title": outcome.proof.title,
        "good": outcome.good,
        "failure": outcome.failure,
        "result": outcome.result,
    }


def _print(outcomes: Sequence[Outcome]) -> None:
    print(table(outcomes))
    machines = {json.dumps(outcome.result["machine"], sort_keys=True) for outcome in outcomes if outcome.result}
    for machine in map(json.loads, sorted(machines)):
        print(f"\n{', '.join(f'{name} {value}' for name, value in machine.items())}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.proofs",
        description="Runs the large chaos runs, and prints a table of what they have shown.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run these; * and ? are understood")
    parser.add_argument("--list", action="store_true", help="print their names, and run nothing")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="how long the outages last")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="so many at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--logs", type=Path, metavar="DIRECTORY", help="write there what the bridges logged")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
