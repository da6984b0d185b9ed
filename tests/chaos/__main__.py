"""`python -m tests.chaos`: the command line of a chaos run. Progress goes to standard error, the result to output."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tests.chaos.run import Run
from tests.chaos.schedule import Parameters

QUICK: dict[str, Any] = {
    "messages": 4000,
    "rate": 400.0,
    "kills": 3,
    "early_kills": 1,
    "db_crashes": 1,
    "cuts": 2,
    "broker_restarts": 1,
    "db_delay_ms": 20.0,  # so that even few faults meet batches that are under way
}
LINE_EVERY_S = 5.0
"""How often progress is printed where it cannot be rewritten in place."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit code: 0 when every message was stored exactly once and nothing unforeseen happened."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is taken down
    parameters = Parameters(**{field.name: getattr(options, field.name) for field in fields(Parameters)})
    if parameters.problem:
        _parser().error(parameters.problem)
    run = Run(parameters, show=_Progress())
    try:
        result = run.run()
    finally:
        if options.log:
            options.log.write_text(run.log)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(json.dumps(result.as_json(), indent=2) if options.json else result.table())
    return 0 if result.good else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Runs the bridge between a real broker and a real PostgreSQL under faults, and counts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    usual = Parameters()
    for name, explained in {
        "messages": "how many are published",
        "rate": "how many a second",
        "seed": "of the schedule of faults",
        "kills": "kill -9 of the bridge",
        "early-kills": "kill -9 of the bridge, and again while it starts",
        "db-crashes": "immediate restarts of PostgreSQL",
        "outage": "seconds without a database in the middle of the run",
        "broker-restarts": "SIGTERM and start of the broker",
        "cuts": "RST cuts, of each link",
        "stalls": "silence and then a cut, of each link",
        "stall-s": "seconds of the longest silence of a stall",
        "freezes": "one connection to the database goes silent, the others go on",
        "steals": "a second bridge takes over the client id for a moment",
        "db-delay-ms": "added to every packet between bridge and database",
        "broker-delay-ms": "added to every packet between bridge and broker",
        "qos0": "share of the messages with QoS 0: they may be lost, but not stored twice",
        "workers": "BRIDGE_WORKERS",
        "processes": "BRIDGE_PROCESSES: a kill hits one of them, or their supervisor",
        "spool-max-mb": "BRIDGE_SPOOL_MAX_MB",
    }.items():
        default = getattr(usual, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=type(default), default=default, metavar="N", help=explained)
    parser.add_argument(
        "--payload",
        choices=["unique", "constant", "cyclic"],
        default=usual.payload,
        help="each its own, all the same, or the same again whenever packet ids have wrapped",
    )
    parser.add_argument("--spool", choices=["off", "outage", "always"], default=usual.spool, help="BRIDGE_SPOOL")
    parser.add_argument("--protocol", choices=["5", "3.1.1"], default=usual.protocol, help="MQTT_PROTOCOL")
    parser.add_argument("--receive", choices=["fast", "stock"], default=usual.receive, help="MQTT_RECEIVE")
    for name, explained in {
        "full-queue": "a queue that is full most of the time",
        "backlog": "publish everything while the bridge is down; faults come while it catches up",
        "without-ledger": "switch the ledger off: duplicates have to appear",
        "quick": "a run of about 20 seconds; other options still count",
        "json": "print the result as JSON",
    }.items():
        parser.add_argument(f"--{name}", action="store_true", help=explained)
    parser.add_argument("--log", type=Path, metavar="FILE", help="write there what the bridge logged")
    return parser


class _Progress:
    """A line that is rewritten in place on a terminal, and printed now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._printed_s = 0.0

    def __call__(self, line: str) -> None:
        if self._terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            print(f"\r{line[:width]:<{width}}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._printed_s >= LINE_EVERY_S:
            self._printed_s = time.monotonic()
            print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
