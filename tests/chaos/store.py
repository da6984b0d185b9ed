"""The database of a run: prepared so that the order of commits can be read, counted without being in the way.

`readings` gets a column of the harness's own, filled by a sequence, and the server notes when each transaction was
committed: together they give the order in which rows became visible. Binary COPY names its columns, so the bridge does
not notice; new weekly partitions take the column over.

Used by the run's thread alone.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import psycopg2

from mqtt_bridge import schema
from tests.chaos.publisher import END

SERVER_SETTINGS = {"track_commit_timestamp": "on"}

_NUMBER_THE_ROWS = """
CREATE SEQUENCE chaos_insertions;
ALTER TABLE readings ADD COLUMN insertion bigint NOT NULL DEFAULT nextval('chaos_insertions');
"""
_COUNT = "SELECT count(*) FILTER (WHERE device LIKE 'd%%'), count(*) FILTER (WHERE device = %s) FROM readings"
_IN_ORDER = "SELECT device, metric, value FROM readings ORDER BY pg_xact_commit_timestamp(xmin), insertion"

COUNTING_SHARE = 0.05
"""Of the time is spent counting at most; in between, the last count stands."""

Row = tuple[str, str, float | None]
"""Device, metric, value."""


class Store:
    """Counts and reads what is stored. Every method survives a server that is away."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._connection: psycopg2.extensions.connection | None = None
        self._counts = (0, 0)
        self._next_s = 0.0  # not counted again before

    def prepare(self) -> None:
        """Make the tables as the bridge does, and number the rows."""
        self._query(schema.ddl())
        self._query(_NUMBER_THE_ROWS)

    def close(self) -> None:
        """Idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def stored(self) -> int:
        """Rows of QoS 1 messages, without the last ones; as of a moment ago."""
        return self._count()[0]

    @property
    def ended(self) -> int:
        """Rows of the last messages; as of a moment ago."""
        return self._count()[1]

    def _count(self) -> tuple[int, int]:
        began_s = time.monotonic()
        if began_s >= self._next_s:
            try:
                self._counts = self._query(_COUNT, END)[0]
            except psycopg2.Error:
                self.close()  # the server is away: the last count stands
            took_s = time.monotonic() - began_s
            self._next_s = began_s + took_s / COUNTING_SHARE
        return self._counts

    def count_now(self) -> int:
        """All rows."""
        return int(self._query("SELECT count(*) FROM readings")[0][0])

    def rows_in_order(self) -> list[Row]:
        """All rows, in the order in which they were committed."""
        return self._query(_IN_ORDER)

    def dead_letters(self) -> Counter[str]:
        """Dead letters by their reason."""
        return Counter(dict(self._query("SELECT error, count(*) FROM mqtt_bridge.dead_letters GROUP BY 1")))

    def ledger_rows(self) -> int:
        """Rows of the ledger."""
        return int(self._query("SELECT count(*) FROM mqtt_bridge.ledger")[0][0])

    def server_version(self) -> str:
        """As 18.1."""
        return str(self._query("SHOW server_version")[0][0])

    def _query(self, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
        if self._connection is None or self._connection.closed:
            self._connection = psycopg2.connect(self.dsn, connect_timeout=5)
            self._connection.autocommit = True
        with self._connection.cursor() as cursor:
            cursor.execute(statement, arguments or None)
            return cursor.fetchall() if cursor.description else []
