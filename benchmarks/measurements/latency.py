"""From publishing to the row being visible to others, through Mosquitto, at a fixed rate.

Each message carries the moment at which it was handed to the socket, in microseconds, and the bridge stores it as the
row's time. About fifty messages a second, drawn at random, go to a probe device. A watcher on another connection asks
for that device's rows, over and over, and notes when it first sees each of them: what it notes is late by half the
pause between two answers on average, by one pause at most, and that pause is measured too. All on one clock.

Beside it runs what nothing can be faster than: a transaction that writes one empty record to the log, and commits.
(One that writes nothing at all does not wait for the disk.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from benchmarks.bench import Bench
from benchmarks.contestant import Stage
from benchmarks.contestants.bridge import Bridge
from benchmarks.cpu import Meter
from benchmarks.generator import Paced, Published
from benchmarks.servers import Servers, connect, scratch, server_pid
from benchmarks.telemetry import FILTER, PROBE, TOPIC
from mqtt_bridge.tools.embedded import Broker

NAME = "latency"
QUESTION = "How long from publishing until others can see the row?"

PROBES_PER_S = 50
POLL_S = 0.0003
COMMIT_EVERY_S = 0.02
WARM_UP_S = 2.0
"""Rows sent in this time are not counted: caches fill, the first partition is touched."""
PATIENCE_S = 30.0
"""How long the last rows may take."""
POINTS = 200
"""Points of a distribution that are kept, for the plot."""


def measure(bench: Bench) -> dict[str, Any]:
    """By rate."""
    rates = {}
    for rate in bench.scale.latency_rates:
        bench.say(f"{rate:,} messages a second for {bench.scale.latency_s:g} s")
        rates[str(rate)] = _at(bench.servers, rate, bench.scale.latency_s + WARM_UP_S, bench.say)
    return {"rates": rates}


def _at(servers: Servers, rate: int, duration_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    bridge = Bridge()
    share = min(1.0, PROBES_PER_S / rate)
    with (
        servers.database() as dsn,
        scratch() as directory,
        Broker() as broker,
        Paced(broker.port, rate=rate, duration_s=duration_s, probe_share=share) as paced,
    ):
        try:
            bridge.start(Stage(broker.host, broker.port, dsn, FILTER, directory, int(rate * duration_s), say))
            roles = {"system": bridge.pids(), "broker": [server_pid(broker)], "generator": [paced.pid]}
            with Commits(servers.postgres.dsn()) as commits, closing(connect(dsn)) as connection:
                meter = Meter(roles)
                watcher = Watcher(connection)
                paced.go()
                published = watcher.watch(paced)
                cpu = meter.read()
                stored = bridge.count(connection)
        finally:
            bridge.stop()
    seconds = published.acknowledged_s - published.began_s
    late = watcher.latencies_ms(since_s=watcher.began_at_s + WARM_UP_S)
    return {
        "messages": published.sent,
        "stored": stored,
        "exact": stored == published.sent and len(watcher.seen) == published.probes,
        "sent_per_s": published.sent / seconds,
        "latency_ms": quantiles(late) | {"samples": len(late), "distribution": distribution(late)},
        "commit_ms": quantiles(commits.took_ms) | {"samples": len(commits.took_ms)},
        "pause_of_the_watcher_ms": quantiles(watcher.pauses_ms),
        "latest_tick_of_the_generator_ms": published.late_ms,
        "cores": {role: used_s / seconds for role, used_s in cpu.items()},
        "cpu_us": {role: 1e6 * used_s / published.sent for role, used_s in cpu.items()},
    }


class Watcher:
    """Sees rows of the probe device as soon as they are visible."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.seen: dict[int, int] = {}
        """When each probe was sent, and when it was seen; microseconds since 1970."""
        self.pauses_ms: list[float] = []
        self.began_at_s = time.time()

    def watch(self, paced: Paced) -> Published:
        """Until everything was sent and every probe was seen."""
        # Prepared: planning anew takes longer than the answer. Rows may become visible out of their order, but hardly
        # later than a second after a younger one; whether all were seen is counted in the end.
        with self._connection.cursor() as cursor:
            cursor.execute("SET plan_cache_mode = force_generic_plan")
            cursor.execute(
                "PREPARE probe (text, timestamptz) AS SELECT (extract(epoch FROM time) * 1000000)::bigint"
                " FROM readings WHERE device = $1 AND metric = 'temperature' AND time > $2"
            )
            return self._watch(cursor, paced)

    def _watch(self, cursor: Any, paced: Paced) -> Published:
        device = TOPIC.split("/")[1] % PROBE
        newest_us = int(self.began_at_s * 1e6)
        last_s = time.perf_counter()
        deadline_s = None
        while True:
            cursor.execute("EXECUTE probe (%s, to_timestamp(%s))", (device, newest_us / 1e6 - 1.0))
            found = cursor.fetchall()
            now_us = time.time_ns() // 1000
            for (sent_us,) in found:
                if sent_us not in self.seen:
                    self.seen[sent_us] = now_us
                    newest_us = max(newest_us, sent_us)
            now_s = time.perf_counter()
            self.pauses_ms.append(1000 * (now_s - last_s))
            last_s = now_s
            published = paced.finished()
            if published is not None:
                deadline_s = deadline_s or time.monotonic() + PATIENCE_S
                if len(self.seen) >= published.probes or time.monotonic() > deadline_s:
                    return published
            time.sleep(POLL_S)

    def latencies_ms(self, *, since_s: float) -> list[float]:
        """Of every probe that was sent after this time (seconds since 1970)."""
        return [(seen - sent) / 1000 for sent, seen in self.seen.items() if sent >= since_s * 1e6]


class Commits:
    """Empty commits in a thread of their own, while others work; a context manager."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.took_ms: list[float] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="benchmarks-commits", daemon=True)

    def __enter__(self) -> Commits:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        with closing(connect(self._dsn)) as connection, connection.cursor() as cursor:
            while not self._end.wait(COMMIT_EVERY_S):
                cursor.execute("BEGIN; SELECT pg_logical_emit_message(true, 'bench', '')")
                began_s = time.perf_counter()
                cursor.execute("COMMIT")
                self.took_ms.append(1000 * (time.perf_counter() - began_s))


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The percentiles that are reported, by nearest rank."""
    return {f"p{100 * share:g}": _at_share(sorted(values), share) for share in (0.5, 0.9, 0.99, 0.999)}


def distribution(values: Sequence[float]) -> list[float]:
    """Points at equal steps of rank, the least first and the most last."""
    ordered = sorted(values)
    return [round(_at_share(ordered, number / (POINTS - 1)), 3) for number in range(POINTS)]


def _at_share(ordered: Sequence[float], share: float) -> float:
    if not ordered:
        raise ValueError("nothing was measured")
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
