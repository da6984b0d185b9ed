"""One trial: one system, one load, one empty database. What counts is what that database holds at the end.

On the feed, where nothing but the system and PostgreSQL is the limit; or through Mosquitto, as in life. CPU time is
that of whole process trees, from just before the first message to when the last one is seen in the database; the
backend of the harness's own connection is left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.contestant import Contestant, Stage, Unavailable
from benchmarks.contestants.bridge import Bridge
from benchmarks.cpu import Meter
from benchmarks.feed import Feed
from benchmarks.generator import Flood
from benchmarks.servers import Servers, connect, scratch, server_pid
from benchmarks.telemetry import FILTER, Load
from mqtt_bridge.tools.embedded import Broker

POLL_S = 0.1
STUCK_S = 15.0
"""After so long without a further message in the database, no more is expected."""
LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trial."""

    system: str
    messages: int
    """Sent to it."""
    stored: int
    """Held by the database at the end."""
    rows_per_message: int
    """What it makes of a message."""
    rows: int | None
    """Rows of `readings`; None where the system is another."""
    distinct: int | None
    """Different messages among them."""
    seconds: float
    """From the first message sent to the last one stored."""
    per_s: float
    """Messages stored a second."""
    cpu_us: dict[str, float]
    """CPU time a stored message, user and system, by role."""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether the database holds every message once, row by row."""
        return (
            self.stored == self.messages
            and self.distinct in (None, self.messages)
            and self.rows in (None, self.messages * self.rows_per_message)
        )

    def as_json(self) -> dict[str, Any]:
        """For the results."""
        return asdict(self) | {"exact": self.exact}


Prepare = Callable[[str], None]
"""Is given the database before the system starts: to make tables otherwise than it would."""


def on_feed(
    servers: Servers,
    system: Contestant,
    load: Load,
    *,
    say: Callable[[str], None],
    prepare: Prepare | None = None,
    during: Callable[[Feed], None] | None = None,
) -> Outcome:
    """The whole load as fast as the system acknowledges; `during` is called once it flows, and may do harm."""
    with servers.database() as dsn, scratch() as directory, Feed(load) as feed:
        with _started(system, Stage(feed.host, feed.port, dsn, FILTER, directory, load.messages, say), prepare):
            with closing(connect(dsn)) as connection:
                roles = {system.name: system.pids(), "feed": [feed.pid], "postgres": [servers.postgres_pid]}
                meter = Meter(roles, without=[_backend(connection)])
                feed.go()
                if during is not None:
                    during(feed)
                _wait_for_acknowledgements(feed, load.messages, say)
                stored, ended_s = wait_until_stored(system, connection, load.messages, say)
                cpu, progress = meter.read(), feed.progress()
                if during is not None:
                    cpu.pop(system.name)  # of several processes, which were killed: nobody has counted it
                if stored == load.messages and progress.acknowledged_s is not None:
                    ended_s = min(ended_s, progress.acknowledged_s)  # seen at the first look: it was there before
                assert progress.began_s is not None
                notes = {
                    "sessions": progress.sessions,
                    "redelivered": progress.redelivered,
                    "acks_out_of_order": progress.out_of_order,
                }
                return _outcome(system, load, connection, stored, ended_s - progress.began_s, cpu, notes)


def through_broker(
    servers: Servers, system: Contestant, load: Load, *, say: Callable[[str], None], limit_s: float = LIMIT_S
) -> Outcome:
    """The whole load as fast as Mosquitto takes it, and what it queues."""
    with servers.database() as dsn, scratch() as directory, Broker() as broker, Flood(broker.port, load) as flood:
        with _started(system, Stage(broker.host, broker.port, dsn, FILTER, directory, load.messages, say), None):
            with closing(connect(dsn)) as connection:
                roles = {
                    system.name: system.pids(),
                    "broker": [server_pid(broker)],
                    "generator": [flood.pid],
                    "postgres": [servers.postgres_pid],
                }
                meter = Meter(roles, without=[_backend(connection)])
                flood.go()
                stored, ended_s = wait_until_stored(system, connection, load.messages, say, limit_s, flood)
                cpu = meter.read()
                published = flood.finished(timeout_s=60)
                if published is None:
                    raise RuntimeError("the generator did not finish: the broker did not acknowledge everything")
                notes = {"published_per_s": published.sent / (published.acknowledged_s - published.began_s)}
                return _outcome(system, load, connection, stored, ended_s - published.began_s, cpu, notes)


@contextmanager
def _started(system: Contestant, stage: Stage, prepare: Prepare | None) -> Iterator[None]:
    """The system on its stage, ended whatever happens."""
    try:
        if prepare is not None:
            prepare(stage.dsn)
        system.start(stage)
        yield
    finally:
        system.stop()


def _backend(connection: Any) -> int:
    return int(connection.info.backend_pid)


def _wait_for_acknowledgements(feed: Feed, messages: int, say: Callable[[str], None]) -> None:
    """Asking the feed costs it little, but not nothing: not often."""
    last, since_s = -1, time.monotonic()
    while (done := feed.progress().acknowledged) < messages:
        say(f"{done:,} of {messages:,} messages acknowledged")
        if done != last:
            last, since_s = done, time.monotonic()
        elif time.monotonic() - since_s > STUCK_S * 4:
            raise Unavailable(f"it stopped acknowledging after {done:,} of {messages:,} messages")
        time.sleep(POLL_S)


def wait_until_stored(
    system: Contestant,
    connection: Any,
    messages: int,
    say: Callable[[str], None],
    limit_s: float = LIMIT_S,
    flood: Flood | None = None,
) -> tuple[int, float]:
    """How many messages the database holds in the end, and since when.

    It looks in pauses that are five times as long as a look, which takes a while among millions of rows. Between the
    last two looks the rate is taken to be what it was between the last two before.
    """
    began_s = seen_s = time.monotonic()
    stored, per_s = -1, 0.0
    while True:
        asked_s = time.monotonic()
        found = system.count(connection)
        now_s = time.monotonic()
        if found != stored:
            complete_s = seen_s + (messages - stored) / per_s if per_s else now_s
            per_s = (found - stored) / (now_s - seen_s) if stored > 0 else 0.0
            stored, seen_s = found, min(now_s, complete_s) if found >= messages else now_s
        say(f"{stored:,} of {messages:,} messages stored")
        sending = flood is not None and flood.finished() is None
        stuck = now_s - seen_s > STUCK_S and not sending
        if stored >= messages or stuck or now_s - began_s > limit_s:
            return stored, seen_s
        time.sleep(max(POLL_S, 5 * (now_s - asked_s)))


def _outcome(
    system: Contestant,
    load: Load,
    connection: Any,
    stored: int,
    seconds: float,
    cpu: dict[str, float],
    notes: dict[str, Any],
) -> Outcome:
    rows, distinct = _readings(connection) if isinstance(system, Bridge) else (None, None)
    return Outcome(
        system=system.name,
        messages=load.messages,
        stored=stored,
        rows_per_message=load.rows_per_message if isinstance(system, Bridge) else system.rows_per_message,
        rows=rows,
        distinct=distinct,
        seconds=seconds,
        per_s=stored / seconds,
        cpu_us={("system" if name == system.name else name): 1e6 * s / max(stored, 1) for name, s in cpu.items()},
        notes=notes,
    )


def _readings(connection: Any) -> tuple[int, int]:
    """Rows of `readings`, and different messages among them."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM readings")
        (rows,) = cursor.fetchone()
        cursor.execute(
            "SELECT count(*) FROM (SELECT DISTINCT device, time FROM readings WHERE metric = 'temperature') m"
        )
        (distinct,) = cursor.fetchone()
    return rows, distinct


# -- of several trials


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Medians, with the least and the most."""
    return {
        "per_s": spread([outcome.per_s for outcome in outcomes]),
        "rows_per_s": spread([outcome.per_s * outcome.rows_per_message for outcome in outcomes]),
        "cpu_us": {role: spread([outcome.cpu_us[role] for outcome in outcomes]) for role in outcomes[0].cpu_us},
        "exact": all(outcome.exact for outcome in outcomes),
        "trials": [outcome.as_json() for outcome in outcomes],
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, least and most of a figure; None where there is none."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)} if values else None
