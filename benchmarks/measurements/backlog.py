"""The bridge's memory while it works off what was published when it was away: a million messages in Mosquitto."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from benchmarks.bench import Bench
from benchmarks.contestant import Stage
from benchmarks.contestants.bridge import Bridge
from benchmarks.generator import Flood
from benchmarks.memory import MemorySampler
from benchmarks.servers import connect, scratch
from benchmarks.telemetry import FILTER, Load
from benchmarks.trial import wait_until_stored
from mqtt_bridge.tools.embedded import Broker

NAME = "backlog"
QUESTION = "How much memory does a backlog take, and how long?"

SAMPLES = 400
IDLE_S = 2.0


def measure(bench: Bench) -> dict[str, Any]:
    """Memory over time, from the start of the bridge to a while after the last message was stored."""
    load, bridge, servers = Load(bench.scale.backlog_messages), Bridge(), bench.servers
    with servers.database() as dsn, scratch() as directory, Broker() as broker, Flood(broker.port, load) as flood:
        try:
            bridge.start(Stage(broker.host, broker.port, dsn, FILTER, directory, load.messages, bench.say))
            time.sleep(IDLE_S)  # nothing is waited for: what it takes when idle is to be seen
            bridge.stop()
            flood.go()
            while (published := flood.finished(timeout_s=0.5)) is None:
                bench.say(f"publishing {load.messages:,} messages while the bridge is away")
            with MemorySampler(bridge.pids, every_s=max(0.05, load.messages / 25_000 / SAMPLES)) as memory:
                memory.mark("started")
                began_s = time.monotonic()
                bridge.launch()
                with closing(connect(dsn)) as connection:
                    stored, ended_s = wait_until_stored(bridge, connection, load.messages, bench.say)
                memory.mark("drained")
                time.sleep(IDLE_S)
        finally:
            bridge.stop()
    return {
        "messages": published.sent,
        "stored": stored,
        "seconds": ended_s - began_s,
        "per_s": stored / (ended_s - began_s),
        "memory": memory.as_json(),
    }
