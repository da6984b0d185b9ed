"""The bridge's memory while the database is away and devices go on publishing, and until it has caught up."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from benchmarks.bench import Bench
from benchmarks.contestant import Stage
from benchmarks.contestants.bridge import Bridge
from benchmarks.generator import Paced
from benchmarks.memory import MemorySampler
from benchmarks.servers import connect, scratch
from benchmarks.telemetry import FILTER
from benchmarks.trial import wait_until_stored
from mqtt_bridge.tools.embedded import Broker

NAME = "outage"
QUESTION = "Does memory stay flat while the database is away?"

SAMPLES = 600


def measure(bench: Bench) -> dict[str, Any]:
    """Memory over time, with when the database went and came back, and what was stored in the end."""
    scale, bridge, servers = bench.scale, Bridge(), bench.servers
    duration_s = scale.outage_s + 2 * scale.outage_margin_s
    messages = int(scale.outage_rate * duration_s)
    with (
        servers.database() as dsn,
        scratch() as directory,
        Broker() as broker,
        Paced(broker.port, rate=scale.outage_rate, duration_s=duration_s) as paced,
    ):
        try:
            bridge.start(Stage(broker.host, broker.port, dsn, FILTER, directory, messages, bench.say))
            with MemorySampler(bridge.pids, every_s=duration_s / SAMPLES) as memory:
                paced.go()
                _wait(bench, scale.outage_margin_s, "before the outage")
                memory.mark("away")
                servers.postgres.stop()
                _wait(bench, scale.outage_s, "the database is away")
                servers.postgres.start()
                memory.mark("back")
                began_s = time.monotonic()
                while (published := paced.finished(timeout_s=0.5)) is None:
                    bench.say("the database is back")
                with closing(connect(dsn)) as connection:
                    stored, ended_s = wait_until_stored(bridge, connection, messages, bench.say)
                memory.mark("caught up")
                time.sleep(min(5.0, scale.outage_margin_s))
        finally:
            servers.postgres.start()
            bridge.stop()
    return {
        "outage_s": scale.outage_s,
        "rate": scale.outage_rate,
        "messages": published.sent,
        "stored": stored,
        "all_stored_after_s": ended_s - began_s,
        "memory": memory.as_json(),
    }


def _wait(bench: Bench, seconds: float, what: str) -> None:
    """Let time pass; it is what is measured."""
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        bench.say(f"{what}, {left_s:,.0f} s to go")
        time.sleep(min(1.0, left_s))
