"""What natural keys cost: `python -m benchmarks.natural_keys`, against an embedded PostgreSQL that is made for it.

A stream of batches of 2,000 messages with four rows each, made before, goes through `Sink.store`: into a table without
a key, and into tables whose primary key begins with the device or with the time. Then the same stream once more, so
that every row is there already; and streams in which some messages are. `no memory` is the bridge without
`natural_keys.Conflicts`: every batch tries COPY first.

All legs take turns in one run, so that a machine which is busy with something else slows them alike: ratios count. The
processor time is that of all of PostgreSQL's processes, also of those that write behind.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import structlog

from benchmarks.poison import machine
from mqtt_bridge.connections import Connections
from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.model import READINGS_COLUMNS, Message, Row, Table, Translated, Translation
from mqtt_bridge.natural_keys import Conflicts
from mqtt_bridge.sink import Sink
from mqtt_bridge.tools.embedded import Postgres
from mqtt_bridge.transactions import Batch

SIZE = 2_000
DEVICES = 1_000
METRICS = ("battery", "humidity", "pressure", "temperature")
NOW_US = 1_790_000_000_000_000
KEY = ("device", "metric", "time")

INDEXES = {
    "none": "",
    "by device": "CREATE INDEX ON {} (device, metric, time DESC)",
    "device first": "ALTER TABLE {} ADD PRIMARY KEY (device, metric, time)",
    "time first": "ALTER TABLE {} ADD PRIMARY KEY (time, device, metric)",
}


class Leg(NamedTuple):
    """One line of the table."""

    name: str
    index: str
    table: Table
    there: float = 0.0
    """This part of the messages is in the table before it begins."""
    memory: bool = True
    """Whether conflicts are remembered."""


def _legs() -> list[Leg]:
    plain = Table("plain", READINGS_COLUMNS)
    nothing = Table("keyed", READINGS_COLUMNS, key=KEY)
    update = nothing._replace(on_conflict="update")
    return [
        Leg("no key, no index", "none", plain),
        Leg("no key, index (device, metric, time)", "by device", plain),
        Leg("key, time first, all new", "time first", nothing),
        Leg("key, device first, all new", "device first", nothing),
        Leg("device first, all there already", "device first", nothing, 1.0),
        Leg("device first, all there already, update", "device first", update, 1.0),
        *(
            Leg(
                f"time first, {part:g} % there already{', no memory' * (not memory)}",
                "time first",
                nothing,
                part / 100,
                memory,
            )
            for part in (100.0, 1.0, 0.1, 0.01)
            for memory in (True, False)
        ),
    ]


class House:
    """A database with a table for each leg, and a sink on it."""

    def __init__(self, server: Postgres, *, workers: int, batches: int) -> None:
        self._pid = _postmaster(server)
        dsn = server.create_database("keys")
        self._connections = Connections(lambda: dsn, size=workers + 2)
        self._sink = Sink(self._connections, client_id="benchmark")
        self._claim = self._sink.open(create=True)
        self._workers = workers
        self._rows = [rows_of(number) for number in range(SIZE * batches)]
        self._numbers = 0

    def close(self) -> None:
        """Close its connections."""
        self._connections.close()

    def run(self, leg: Leg) -> tuple[float, float, float]:
        """(messages a second, microseconds of the server a message, bytes of table and index a row)."""
        self._prepare(leg)
        batches = self._batches(leg.table, self._rows)
        self._sink._transactions._conflicts = Conflicts() if leg.memory else _Forgetful()
        began_s, cpu_s = time.perf_counter(), _processor_s(self._pid)
        self._store(batches)
        took_s, cpu_s = time.perf_counter() - began_s, _processor_s(self._pid) - cpu_s
        count = self._sql(f"SELECT count(*) FROM {leg.table.name}") or 0  # noqa: S608  a name of ours
        size_bytes = self._sql(f"SELECT pg_total_relation_size('{leg.table.name}')") or 0
        assert count == len(self._rows) * len(METRICS), f"{leg.name}: {count} rows"
        return len(self._rows) / took_s, cpu_s / len(self._rows) * 1e6, size_bytes / count

    def _prepare(self, leg: Leg) -> None:
        name = leg.table.name
        self._sql(f"DROP TABLE IF EXISTS {name}")
        self._sql(f"CREATE TABLE {name} (LIKE readings)")
        if leg.index != "none":
            self._sql(INDEXES[leg.index].format(name))
        if leg.there:
            chosen = random.Random(leg.there).sample(self._rows, int(len(self._rows) * leg.there))
            self._store(self._batches(leg.table._replace(key=()), sorted(chosen)))
        self._sql("TRUNCATE mqtt_bridge.ledger")
        self._sql("CHECKPOINT")

    def _batches(self, table: Table, rows: Sequence[list[Row]]) -> list[Batch]:
        return [self._batch(table, rows[start : start + SIZE]) for start in range(0, len(rows), SIZE)]

    def _batch(self, table: Table, rows: Sequence[list[Row]]) -> Batch:
        self._numbers += 1
        key = BatchKey(self._claim.owner_epoch, self._numbers)
        entry = Entry(key, self._claim.session_epoch, 1, b"f" * 8 * len(rows))
        translated: list[Translated] = [
            (Message(b"devices/d/telemetry", b"{}", 1, False, NOW_US, n), Translation("default", table, found))
            for n, found in enumerate(rows)
        ]
        return Batch(entry, translated, [])

    def _store(self, batches: Sequence[Batch]) -> None:
        with ThreadPoolExecutor(self._workers) as threads:
            for _ in threads.map(self._sink.store, batches):
                pass

    def _sql(self, statement: str) -> int | None:
        with self._connections.connection() as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return (cursor.fetchone() or (None,))[0] if cursor.description else None


class _Forgetful(Conflicts):
    def met(self, tables: Iterable[Table]) -> None:
        pass


def rows_of(number: int) -> list[Row]:
    """What the message of this number means."""
    device, time_us = f"device-{number % DEVICES}", NOW_US + number * 10_000
    return [(time_us, device, metric, 21.5 + number % 7, None) for metric in METRICS]


def _postmaster(server: Postgres) -> int:
    return int((server.directory / "data" / "postmaster.pid").read_text().splitlines()[0])


def _processor_s(postmaster: int) -> float:
    """Of the server and all of its children, those that have ended included."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if path.parent.name == str(postmaster):
            ticks += sum(map(int, fields[11:15]))
        elif fields[1] == str(postmaster):
            ticks += sum(map(int, fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Parse the options, start the server, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.natural_keys", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many (%(default)s)")
    parser.add_argument("--batches", type=int, default=40, help="batches of a stream (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="threads (%(default)s)")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    legs = _legs()
    figures: dict[str, list[tuple[float, float, float]]] = {leg.name: [] for leg in legs}
    with Postgres() as server:
        house = House(server, workers=options.workers, batches=options.batches)
        print(f"Measured on {machine(server.dsn('keys'))}.\n")
        for _ in range(options.rounds):
            for leg in legs:
                figures[leg.name].append(house.run(leg))
        house.close()
    unit = statistics.median(rate for rate, *_ in figures[legs[1].name])
    heads = ("table", "messages/s", "of the second line", "server, us a message", "bytes a row, with index")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for name, found in figures.items():
        rate, cpu_us, size_bytes = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"| {name} | {rate:,.0f} | {rate / unit:.2f} | {cpu_us:.0f} | {size_bytes:.0f} |")


if __name__ == "__main__":
    main()
