"""The servers that a run needs: PostgreSQL with its defaults, Mosquitto with the project's mosquitto.conf.

One PostgreSQL for all measurements, a database of its own for each run, a checkpoint before each: what one run leaves
to be written is not paid for by the next. A Mosquitto of its own for each run, for its queues and its log would be.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Self

import psycopg2

from mqtt_bridge.tools.embedded import Broker, Postgres


class Servers:
    """A context manager; PostgreSQL is started when first asked for."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._postgres: Postgres | None = None
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def postgres(self) -> Postgres:
        """The server."""
        if self._postgres is None:
            self._postgres = self._stack.enter_context(Postgres())
        return self._postgres

    @property
    def postgres_pid(self) -> int:
        """Of its first process, the parent of all others."""
        return server_pid(self.postgres)

    @contextmanager
    def database(self) -> Iterator[str]:
        """An empty database, dropped afterwards; its URL."""
        name = f"bench_{next(self._numbers)}"
        dsn = self.postgres.create_database(name)
        try:
            with closing(connect(self.postgres.dsn())) as connection, connection.cursor() as cursor:
                cursor.execute("CHECKPOINT")
            yield dsn
        finally:
            if self.postgres.running:
                self.postgres.drop_database(name)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the files of one run, readable for every account."""
    with tempfile.TemporaryDirectory(prefix="mqtt-bridge-bench-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def server_pid(server: Postgres | Broker) -> int:
    """The process of an embedded server, as it has noted it itself."""
    return int((server.directory / "server.pid").read_text())


def connect(dsn: str) -> Any:
    """A connection of the harness: autocommit, and all its work in one backend, so that its CPU can be left out."""
    connection = psycopg2.connect(dsn, connect_timeout=10)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("SET max_parallel_workers_per_gather = 0; SET work_mem = '256MB'; SET jit = off")
    return connection
