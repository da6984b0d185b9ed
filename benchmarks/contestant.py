"""What a system offers, so that it can be measured beside others: the interface that `contestants/` implement.

A module of `benchmarks/contestants/` defines `CONTESTANTS`, a tuple of objects with the methods of `Contestant`; the
folder is searched for them, nothing else has to be edited. `REFERENCE` names the one that every run is compared with.

The course of a run, all of it on one thread:

    version = contestant.install()          # once; may take minutes, and may raise Unavailable
    contestant.start(stage)                 # returns when its subscription stands
    ... the harness publishes `stage.messages` messages, and reads the CPU of `pids()` before and after ...
    contestant.count(connection)            # polled until it is `stage.messages`, or no longer grows
    contestant.stop()                       # always, also after a failed start

A message is what `benchmarks.telemetry` makes: about 90 bytes, four readings and the time of the device,

    bench/device-0042/telemetry   {"temperature":21.53,"humidity":45.1,"battery":3.712,"rssi":-67,"ts":1760000000123}

QoS 1, not retained, over 1,000 topics; device and ts together are unique.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mqtt_bridge.tools.embedded.account import cache_directory

REFERENCE = "paho-copy"
"""Stock paho, decoded by orjson, four rows a message by binary COPY in batches, acknowledged after the commit: what
one gets by hand from the same parts. Ratios to it hold where absolute rates swing with the mood of the machine."""


class Unavailable(Exception):
    """This system cannot be measured here; the message says why, in a sentence that stands in the results."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a system is measured: a broker, a database of its own, a folder of its own."""

    broker_host: str
    broker_port: int
    dsn: str
    """A postgresql:// URL of an empty database, whose user may create everything. The contestant makes its tables."""
    topic_filter: str
    """What to subscribe to, at QoS 1: `bench/+/telemetry`. The second level is the device."""
    directory: Path
    """Empty, removed afterwards: configuration and logs. World-readable, for whoever drops root."""
    messages: int
    """How many messages there will be."""
    log: Callable[[str], None]
    """Takes a sentence for the person who watches."""


class Contestant(Protocol):
    """One system with one configuration. Made at import: it must cost nothing before `install`."""

    name: str
    """In lower case with hyphens, as `--only` and the results have it: `node-red`."""
    title: str
    """One line: what it is, and how it is configured."""
    rows_per_message: int
    """Rows stored for a message: 4 for a row a reading, 1 for a raw or wide row."""
    guarantees: str
    """What it promises: when it acknowledges, and what a crash loses or doubles. A few words."""

    def install(self) -> str:
        """Fetch what is missing, below `install_directory(name)`; the version. Idempotent. Raises Unavailable."""
        ...

    def start(self, stage: Stage) -> None:
        """Make its tables, start it, and return when it is subscribed. Raises Unavailable when it does not start."""
        ...

    def pids(self) -> list[int]:
        """Roots of the process trees that it consists of (not the broker, not PostgreSQL)."""
        ...

    def count(self, connection: Any) -> int:
        """Messages that the database holds. `connection` is of psycopg2, in autocommit, to `stage.dsn`."""
        ...

    def most(self) -> int | None:
        """Most messages that it is given side by side, so that a slow system does not hold up the run; None: any."""
        ...

    def stop(self) -> None:
        """End its processes. Idempotent, also when it never started. What it stored stays."""
        ...


def install_directory(name: str) -> Path:
    """A folder that outlives the run, for what `install` fetches. Readable for every account.

    MQTT_BRIDGE_BENCH_CACHE names another place for all of them.
    """
    given = os.environ.get("MQTT_BRIDGE_BENCH_CACHE")
    path = (Path(given) if given else cache_directory() / "bench") / name
    path.mkdir(parents=True, exist_ok=True)
    return path
