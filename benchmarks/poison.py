"""What bad rows cost: `python -m benchmarks.poison`, against an embedded PostgreSQL that is made for it.

Three tables. The first: one batch of 2,000 messages through `Transactions.run` (prologue, rows, dead letters, COMMIT),
with a few bad rows, against the same batch without any, by several ways to find them. The second: a stream of such
batches, made before, through `Sink.store`, with one and two workers, against a stream without bad rows. The third: the
same from `Pipeline.receive` to the acknowledgement, which is what a user has of it: decoding takes its time as well.

All ways take turns in one run, so that a machine which is busy with something else slows them alike; the ratios are
what counts. A row is bad by a CHECK (the server names its line), by a foreign key (it names the key), or by a trigger
that fires after the last row (it names nothing).
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg2
import structlog
from psycopg2.extensions import cursor as Cursor

from mqtt_bridge import copying
from mqtt_bridge.acks import AckTracker
from mqtt_bridge.batches import Batches
from mqtt_bridge.connections import BridgeConnection, Connections
from mqtt_bridge.errors import ROW_BUILDING, Failure, classify
from mqtt_bridge.isolation import AT_FAULT
from mqtt_bridge.ledger import LAP, BatchKey, Claim, Entry, Ledger
from mqtt_bridge.model import READINGS_COLUMNS, Message, Row, Run, Table, Translated, Translation
from mqtt_bridge.pipeline import Limits, Pipeline
from mqtt_bridge.routes import Router, default_routes
from mqtt_bridge.sink import Sink
from mqtt_bridge.tools.embedded import Postgres
from mqtt_bridge.transactions import Batch, Transactions

SIZE = 2_000
NOW_US = 1_790_000_000_000_000
READINGS = Table("readings", READINGS_COLUMNS)

FAULTS = {
    "CHECK": "ALTER TABLE readings ADD CONSTRAINT fault CHECK (device <> 'bad')",
    "foreign key": "ALTER TABLE readings ADD CONSTRAINT fault FOREIGN KEY (device) REFERENCES devices",
    "trigger": "CREATE TRIGGER fault AFTER INSERT ON readings FOR EACH ROW EXECUTE FUNCTION refuse()",
}
"""What makes rows of the device `bad` bad."""
MENDED = "ALTER TABLE readings DROP CONSTRAINT IF EXISTS fault; DROP TRIGGER IF EXISTS fault ON readings"
TABLES = (
    "CREATE TABLE devices (device text PRIMARY KEY)",
    "INSERT INTO devices SELECT 'device-' || n FROM generate_series(0, 199) n",
    "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
    " IF NEW.device = 'bad' THEN RAISE EXCEPTION 'a bad device'; END IF; RETURN NULL; END $$",
)


# -- the ways


class Isolation(Transactions):
    """What the bridge does: `mqtt_bridge.isolation`."""


class Halving(Transactions):
    """What it did before: every part that fails is halved, a statement a round trip, encoded anew each time."""

    def isolate(
        self,
        connection: BridgeConnection,
        cursor: Cursor,
        translated: Sequence[Translated],
        *,
        error: Exception | None = None,
    ) -> list[tuple[Translated, Failure]]:
        """See `Transactions.isolate`."""
        refused: list[tuple[Translated, Failure]] = []
        self._store_part(connection, cursor, translated, refused)
        return refused

    def _store_part(
        self,
        connection: BridgeConnection,
        cursor: Cursor,
        part: Sequence[Translated],
        refused: list[tuple[Translated, Failure]],
    ) -> None:
        failure = self._try(connection, cursor, part)
        if failure is None:
            return
        if len(part) == 1:
            refused.append((part[0], failure))
            return
        middle = len(part) // 2
        self._store_part(connection, cursor, part[:middle], refused)
        self._store_part(connection, cursor, part[middle:], refused)

    def _try(self, connection: BridgeConnection, cursor: Cursor, part: Sequence[Translated]) -> Failure | None:
        cursor.execute("SAVEPOINT part")
        try:
            for copy, data in self._copies(connection, part, []):
                copying.send(cursor, copy, data)
            cursor.execute("RELEASE SAVEPOINT part")
            return None
        except (psycopg2.Error, *ROW_BUILDING) as error:
            failure = classify(error, connected=not connection.closed)
            if failure.verdict not in AT_FAULT:
                raise
        cursor.execute("ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part")
        return failure


class SavepointEach(Halving):
    """The simplest: a savepoint for every message."""

    def _store_part(
        self,
        connection: BridgeConnection,
        cursor: Cursor,
        part: Sequence[Translated],
        refused: list[tuple[Translated, Failure]],
    ) -> None:
        for item in part:
            if failure := self._try(connection, cursor, [item]):
                refused.append((item, failure))


WAYS: dict[str, type[Transactions]] = {"isolation": Isolation, "halving": Halving}


# -- batches


class BatchMaker:
    """Makes batches, each with a key of its own. Threads share one."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._numbers = itertools.count(1)

    def make(self, bad: frozenset[int]) -> Batch:
        """A batch in which the messages at these places are bad."""
        entry = Entry(BatchKey(self._claim.owner_epoch, next(self._numbers)), self._claim.session_epoch, 1, b"f" * SIZE)
        return Batch(entry, [_reading(number, bad=number in bad) for number in range(SIZE)], [])


def _reading(number: int, *, bad: bool) -> Translated:
    device = "bad" if bad else f"device-{number % 200}"
    message = Message(f"devices/{device}/telemetry".encode(), b'{"temperature": 21.5}', 1, False, NOW_US, number)
    row: Row = (NOW_US + number, device, "temperature", 21.5, None)
    return message, Translation("default", READINGS, [row])


def spread(count: int) -> frozenset[int]:
    """So many places, evenly."""
    return frozenset(SIZE * (2 * index + 1) // (2 * count) for index in range(count))


def clustered(count: int) -> frozenset[int]:
    """So many places, one after another from the middle on."""
    return frozenset(range(SIZE // 2, SIZE // 2 + count))


def at_the_end(count: int) -> frozenset[int]:
    """The last so many places."""
    return frozenset(range(SIZE - count, SIZE))


CASES: list[tuple[str, frozenset[int]]] = [
    ("1, in the middle", spread(1)),
    ("5, spread", spread(5)),
    ("20, spread", spread(20)),
    ("20, clustered", clustered(20)),
    ("20, at the end", at_the_end(20)),
    ("50, spread", spread(50)),
    ("50, clustered", clustered(50)),
    ("50, at the end", at_the_end(50)),
    ("1,000, every other", spread(1000)),
    ("2,000, all", frozenset(range(SIZE))),
]


# -- one batch


class House:
    """A database with the tables, and connections to it."""

    def __init__(self, dsn: str) -> None:
        self.connections = Connections(lambda: dsn, size=4)
        self.sink = Sink(self.connections, client_id="benchmark")
        self.claim = self.sink.open(create=True)
        self.batches = BatchMaker(self.claim)
        for statement in TABLES:
            self.sql(statement)

    def sql(self, statement: str) -> None:
        """Run one statement."""
        with self.connections.connection() as connection, connection.cursor() as cursor:
            cursor.execute(statement)

    def transactions(self, way: type[Transactions]) -> Transactions:
        """Transactions of this kind, as the owner of the client id."""
        made = way(client_id="benchmark", statement_timeout_s=30)
        made.owner_epoch = self.claim.owner_epoch
        return made

    def empty(self) -> None:
        """Every measurement begins with empty tables."""
        self.sql("TRUNCATE readings, mqtt_bridge.dead_letters, mqtt_bridge.ledger")

    @contextmanager
    def fault(self, name: str) -> Iterator[None]:
        """While rows of the device `bad` are refused."""
        self.empty()
        self.sql(FAULTS[name])
        try:
            yield
        finally:
            self.empty()
            self.sql(MENDED)

    def time_s(self, way: Transactions, bad: frozenset[int]) -> float:
        """Seconds that one batch takes."""
        batch = self.batches.make(bad)
        with self.connections.connection() as connection:
            began_s = time.perf_counter()
            stored = way.run(connection, batch)
            took_s = time.perf_counter() - began_s
        assert len(stored.refused) == len(bad)
        assert stored.rows.get("readings", 0) == SIZE - len(bad)
        return took_s


def compare(house: House, rounds: int) -> None:
    """The first table."""
    ways = {name: house.transactions(way) for name, way in WAYS.items()}
    for fault in FAULTS:
        print(f"\nOne batch of {SIZE:,}, bad rows by {fault}: milliseconds, and times the clean batch\n")
        print("| bad rows | " + " | ".join(ways) + " | halving / isolation |")
        print("| --- |" + " --- |" * (len(ways) + 1))
        with house.fault(fault):
            house.time_s(ways["isolation"], frozenset())  # the first is slower: catalogue, caches
            for label, bad in [("none", frozenset()), *CASES]:
                print(_line(label, _medians(house, ways, bad, rounds)), flush=True)


def _medians(
    house: House, ways: dict[str, Transactions], bad: frozenset[int], rounds: int
) -> dict[str, tuple[float, float]]:
    """(milliseconds, times the clean batch) by way; clean batches take turns with the others."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    clean: list[float] = []
    for _ in range(rounds):
        clean.append(house.time_s(ways["isolation"], frozenset()))
        for name, way in ways.items():
            seconds[name].append(house.time_s(way, bad))
    unit_s = statistics.median(clean)
    return {
        name: (statistics.median(all_s) * 1000, statistics.median(all_s) / unit_s) for name, all_s in seconds.items()
    }


def _line(label: str, figures: dict[str, tuple[float, float]]) -> str:
    cells = [f"{milliseconds:,.0f} ({times:.1f})" for milliseconds, times in figures.values()]
    return f"| {label} | {' | '.join(cells)} | {figures['halving'][0] / figures['isolation'][0]:.1f} |"


# -- a stream


def streams(house: House, rounds: int, batches: int) -> None:
    """The second table, and the third."""
    for title, rate in (("`Sink.store`", _rate_of_sink), ("the pipeline", _rate_of_pipeline)):
        print(f"\n1 % bad rows through {title}: messages a second, and part of a stream without\n")
        print("| bad rows by | workers | " + " | ".join(["none bad", *WAYS]) + " |")
        print("| --- | --- | --- |" + " --- |" * len(WAYS))
        for fault, workers in itertools.product(FAULTS, (1, 2)):
            with house.fault(fault):
                clean, *others = _rates(house, lambda bad: rate(house, bad, workers, batches), rounds)  # noqa: B023
            cells = [f"{clean:,.0f}", *(f"{found:,.0f} ({found / clean:.2f})" for found in others)]
            print(f"| {fault} | {workers} | {' | '.join(cells)} |", flush=True)


def _rates(house: House, rate: Callable[[frozenset[int]], float], rounds: int) -> list[float]:
    """Of a stream without bad rows, and of one with them for each way."""
    bad = spread(SIZE // 100)
    legs: list[tuple[type[Transactions], frozenset[int]]] = [
        (Isolation, frozenset()),
        *((w, bad) for w in WAYS.values()),
    ]
    rates: list[list[float]] = [[] for _ in legs]
    for _ in range(rounds):
        for (way, places), found in zip(legs, rates, strict=True):
            house.empty()
            house.sink._transactions = house.transactions(way)
            found.append(rate(places))
    return [statistics.median(found) for found in rates]


def _rate_of_sink(house: House, bad: frozenset[int], workers: int, batches: int) -> float:
    waiting = iter([house.batches.make(bad) for _ in range(batches)])
    lock = threading.Lock()

    def take() -> Batch | None:
        with lock:
            return next(waiting, None)

    began_s = time.perf_counter()
    _in_threads(workers, lambda: [house.sink.store(batch) for batch in iter(take, None)])
    return batches * SIZE / (time.perf_counter() - began_s)


def _rate_of_pipeline(house: House, bad: frozenset[int], workers: int, batches: int) -> float:
    ledger = Ledger()
    ledger.load(house.sink.open(create=False))  # fences the batches made for the table before
    pipeline = Pipeline(
        Batches(Router(default_routes("devices/{device}/telemetry"))),
        house.sink,
        ledger=ledger,
        acks=AckTracker(),
        limits=Limits(workers=workers),
        on_fatal=lambda error: print(f"it failed: {error}"),
    )
    pipeline.connected(session_present=False, send_acks=lambda _: None)
    messages = [_reading(number, bad=number in bad)[0] for number in range(SIZE)] * batches
    pipeline.start()
    began_s = time.perf_counter()
    for number, message in enumerate(messages):
        while pipeline.full:
            time.sleep(0.001)
        pipeline.receive(Run.of_one(message.topic, message.payload, 1, packet_id=number % LAP + 1))
    pipeline.drain(600)
    took_s = time.perf_counter() - began_s
    pipeline.stop()
    outcomes = pipeline.balance().outcomes
    assert (outcomes["stored"], outcomes["dead_lettered"]) == (len(messages) - len(bad) * batches, len(bad) * batches)
    return len(messages) / took_s


def _in_threads(count: int, work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(count) as threads:
        for future in [threads.submit(work) for _ in range(count)]:
            future.result()  # raises what has gone wrong: a figure would be of nothing


# -- the run


def machine(dsn: str) -> str:
    """What the figures were measured on."""
    with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("SHOW server_version")
        (version,) = cursor.fetchone() or ("?",)
    cpu = next(
        (line.partition(": ")[2] for line in _cpu_lines() if line.startswith("model name")), platform.processor()
    )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{cpu}, {os.cpu_count()} cores (load {load}); {platform.system()}, Python {platform.python_version()},"
        f" PostgreSQL {version} on the same machine"
    )


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    """Parse the options, start the server, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.poison", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="medians of so many (%(default)s)")
    parser.add_argument("--batches", type=int, default=20, help="batches of a stream (%(default)s)")
    parser.add_argument("--slow", action="store_true", help="a savepoint for every message as well")
    options = parser.parse_args()
    if options.slow:
        WAYS["savepoint each"] = SavepointEach
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with Postgres() as server:
        dsn = server.create_database("poison")
        print(f"Measured on {machine(dsn)}.")
        house = House(dsn)
        compare(house, options.rounds)
        streams(house, max(3, options.rounds // 2), options.batches)
        house.connections.close()


if __name__ == "__main__":
    main()
