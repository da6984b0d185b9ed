"""All that the bridge can take, on the feed, into `readings` with its own index, with BRIN, and with none.

The reference takes its turn in every round, so that ratios to it are of the same minute.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import closing
from functools import partial
from typing import Any

from benchmarks.bench import Bench
from benchmarks.contestants.bridge import ROOT, Bridge
from benchmarks.servers import connect
from benchmarks.telemetry import Load
from benchmarks.trial import Outcome, on_feed, spread, summary

NAME = "full-load"
QUESTION = "How many messages a second, and at what CPU, when neither broker nor network is the limit?"

INDEXES: dict[str, tuple[str, ...]] = {
    "default": (),
    "brin": ("DROP INDEX readings_device_metric_time", "CREATE INDEX readings_time ON readings USING brin (time)"),
    "none": ("DROP INDEX readings_device_metric_time",),
}
"""What is done to the tables that the bridge makes."""


def measure(bench: Bench) -> dict[str, Any]:
    """Outcomes by index, those of the reference, and the ratios."""
    scale, reference = bench.scale, bench.reference()
    outcomes: dict[str, list[Outcome]] = {index: [] for index in INDEXES}
    references: list[Outcome] = []
    for number in range(1, scale.rounds + 1):
        for index in INDEXES:
            say = partial(_say, bench, f"round {number} of {scale.rounds}, index {index}")
            load = Load(scale.feed_messages)
            outcomes[index].append(
                on_feed(bench.servers, Bridge(), load, say=say, prepare=partial(with_index, index=index))
            )
        if reference is not None:
            say = partial(_say, bench, f"round {number} of {scale.rounds}, reference")
            references.append(on_feed(bench.servers, reference, Load(scale.reference_messages), say=say))
    return {
        "indexes": {index: summary(found) for index, found in outcomes.items()},
        "reference": summary(references) if references else None,
        "to_reference": {index: _ratios(found, references) for index, found in outcomes.items()},
    }


def with_index(dsn: str, *, index: str) -> None:
    """Make the bridge's tables by its own command, then change their index."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [sys.executable, "-m", "mqtt_bridge", "schema", "--apply"],
            cwd=directory,
            env={"DATABASE_URL": dsn, "PYTHONPATH": str(ROOT)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
    with closing(connect(dsn)) as connection, connection.cursor() as cursor:
        for statement in INDEXES[index]:
            cursor.execute(statement)


def _ratios(outcomes: list[Outcome], references: list[Outcome]) -> dict[str, Any] | None:
    """Round by round, so that both are of the same minute."""
    if not references:
        return None
    pairs = list(zip(outcomes, references, strict=True))
    return {
        "per_s": spread([ours.per_s / other.per_s for ours, other in pairs]),
        "cpu": spread([ours.cpu_us["system"] / other.cpu_us["system"] for ours, other in pairs]),
    }


def _say(bench: Bench, place: str, sentence: str) -> None:
    bench.say(f"{place}: {sentence}")
