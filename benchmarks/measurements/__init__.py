"""What is measured: a module a question, with NAME, QUESTION and `measure(bench)`, which returns plain figures."""

from __future__ import annotations

from benchmarks.measurements import (
    backlog,
    crash,
    curves,
    full_load,
    latency,
    outage,
    side_by_side,
    through_mosquitto,
)

MEASUREMENTS = {
    module.NAME: module
    for module in (full_load, crash, through_mosquitto, latency, curves, side_by_side, backlog, outage)
}
"""In the order in which they are run."""
