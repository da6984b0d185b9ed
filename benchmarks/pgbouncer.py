"""What PgBouncer costs: `python -m benchmarks.pgbouncer`, in front of an embedded PostgreSQL that is made for it.

The same batches go through `Sink.store` directly, and through PgBouncer in session and in transaction mode, in turns:
a stream of 2,000 messages with four rows a batch and two workers, for throughput; then batches of one message, one
after another, for the time that a transaction takes. All on one machine: over a network its own hop comes on top.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import structlog

from benchmarks.natural_keys import SIZE, rows_of
from benchmarks.poison import machine
from mqtt_bridge.connections import Connections
from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.model import READINGS_COLUMNS, Message, Row, Table, Translation
from mqtt_bridge.sink import Sink
from mqtt_bridge.tools.embedded import Postgres
from mqtt_bridge.transactions import Batch
from tests.pgbouncer import PgBouncer

READINGS = Table("readings", READINGS_COLUMNS)
SINGLE = 300


class Figures(NamedTuple):
    """Of one round."""

    messages_per_s: float
    pooler_us: float
    p50_ms: float
    p99_ms: float


class Way:
    """One way to the database, with a client id of its own."""

    def __init__(self, name: str, dsn: str, *, pooler: int | None) -> None:
        self.name = name
        self._pooler = pooler
        self._connections = Connections(lambda: dsn, size=4)
        self._sink = Sink(self._connections, client_id=name)
        self._claim = self._sink.open(create=True)
        self._numbers = 0
        self.rounds: list[Figures] = []

    def close(self) -> None:
        """Close its connections."""
        self._connections.close()

    def run(self, rows: Sequence[list[Row]]) -> None:
        """One round."""
        self._empty()
        batches = [self._batch(rows[start : start + SIZE]) for start in range(0, len(rows), SIZE)]
        began_s, cpu_s = time.perf_counter(), self._pooler_s()
        with ThreadPoolExecutor(2) as threads:
            for _ in threads.map(self._sink.store, batches):
                pass
        took_s, cpu_s = time.perf_counter() - began_s, self._pooler_s() - cpu_s
        times_ms = [self._time_ms(self._batch([one])) for one in rows[:SINGLE]]
        cuts = statistics.quantiles(times_ms, n=100)
        self.rounds.append(Figures(len(rows) / took_s, cpu_s / len(rows) * 1e6, cuts[49], cuts[98]))

    def _empty(self) -> None:
        with self._connections.connection() as connection, connection.cursor() as cursor:
            cursor.execute("TRUNCATE readings, mqtt_bridge.ledger")

    def _time_ms(self, batch: Batch) -> float:
        began_s = time.perf_counter()
        self._sink.store(batch)
        return (time.perf_counter() - began_s) * 1000

    def _batch(self, rows: Sequence[list[Row]]) -> Batch:
        self._numbers += 1
        key = BatchKey(self._claim.owner_epoch, self._numbers)
        translated = [
            (Message(b"devices/d/telemetry", b"{}", 1, False, 1, n), Translation("default", READINGS, found))
            for n, found in enumerate(rows)
        ]
        return Batch(Entry(key, self._claim.session_epoch, 1, b"f" * 8 * len(rows)), translated, [])

    def _pooler_s(self) -> float:
        if self._pooler is None:
            return 0.0
        fields = Path(f"/proc/{self._pooler}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _way(pooler: PgBouncer, name: str) -> Way:
    return Way(name, pooler.dsn("pooled"), pooler=pooler.pid)


def main() -> None:
    """Parse the options, start the servers, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pgbouncer", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many (%(default)s)")
    parser.add_argument("--batches", type=int, default=40, help="batches of a stream (%(default)s)")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    rows = [rows_of(number) for number in range(SIZE * options.batches)]
    with ExitStack() as stack:
        server = stack.enter_context(Postgres())
        dsn = server.create_database("pooled")
        session = stack.enter_context(PgBouncer(server, "session"))
        transaction = stack.enter_context(PgBouncer(server, "transaction"))
        ways = [
            Way("directly", dsn, pooler=None),
            _way(session, "PgBouncer, session mode"),
            _way(transaction, "PgBouncer, transaction mode"),
        ]
        print(f"Measured on {machine(dsn)}.\n")
        for _ in range(options.rounds):
            for way in ways:
                way.run(rows)
        for way in ways:
            way.close()
    heads = ("way", "messages/s", "PgBouncer, us a message", "one message alone: p50 ms", "p99 ms")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for way in ways:
        median = Figures(*(statistics.median(values) for values in zip(*way.rounds, strict=True)))
        print(
            f"| {way.name} | {median.messages_per_s:,.0f} | {median.pooler_us:.1f} | {median.p50_ms:.2f}"
            f" | {median.p99_ms:.1f} |"
        )


if __name__ == "__main__":
    main()
