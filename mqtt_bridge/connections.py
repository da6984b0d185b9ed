"""Connections to PostgreSQL: psycopg2's ThreadedConnectionPool, wrapped against its traps.

The pool of psycopg2 raises when it is exhausted, closes what exceeds `minconn`, connects eagerly in its constructor,
loses a slot when it is given back a connection that died in a transaction, and hands out connections that the server
has closed long ago. So: a semaphore waits for a free slot, minimum and maximum are the same, the pool is made at the
first use (the database may be away until then), and when one connection turns out to be dead the whole pool is
retired, since a restart of the server killed them all.

Connections are in autocommit mode: whoever borrows one says BEGIN and COMMIT. Any thread may borrow.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import psycopg2
from psycopg2 import extensions, pool

from mqtt_bridge.copying import Encoder
from mqtt_bridge.errors import SinkError
from mqtt_bridge.model import Table

CLOSE_S = 0.5
"""How long `close` waits for a connection that is being made."""


class BridgeConnection(extensions.connection):
    """A connection that remembers how to write into the tables it has seen."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.autocommit = True
        self.fresh = True
        """True until a statement has succeeded: a first failure after that may only mean that it had gone stale."""
        self.encoders: dict[Table, Encoder] = {}
        """By table, made for the types that its columns had then."""
        self.checks: dict[str, str] = {}
        """By table: SQL that fails where its columns are no longer those that the encoder was made for."""
        self.cursor_factory = _NotingCursor
        self.statement_s = time.monotonic()
        """Monotonic time at which the last statement was sent."""
        self.steps: Counter[int] = Counter()
        """Shared by the connections of a pool: see `Connections.steps`."""


class _NotingCursor(extensions.cursor):
    """Notes when a statement begins, so that a server which never answers can be told from one that has much to do."""

    def execute(self, *args: Any, **kwargs: Any) -> None:
        self._note()
        super().execute(*args, **kwargs)

    def copy_expert(self, *args: Any, **kwargs: Any) -> None:
        self._note()
        super().copy_expert(*args, **kwargs)

    def _note(self) -> None:
        connection = cast(BridgeConnection, self.connection)
        connection.statement_s = time.monotonic()
        connection.steps[threading.get_ident()] += 1


class Connections:
    """A pool of `size` connections, made lazily, that waits instead of raising."""

    def __init__(self, dsn: Callable[[], str], *, size: int, wait_s: float = 30.0) -> None:
        """`dsn` is asked again for every new pool, so that a rotated password is found. `wait_s`: for a free slot."""
        self._dsn = dsn
        self._size = size
        self._wait_s = wait_s
        self._free = threading.BoundedSemaphore(size)
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._pool: pool.ThreadedConnectionPool | None = None
        self._closed = False
        # Apart, since the other lock is held while a pool connects, and whoever cuts silent connections must not wait:
        self._lent_lock = threading.Lock()
        self._lent: dict[BridgeConnection, float] = {}  # and how long a statement on it may take
        self._steps: Counter[int] = Counter()  # by thread; each writes its own

    @property
    def size(self) -> int:
        """How many connections there are at most."""
        return self._size

    @property
    def in_use(self) -> int:
        """How many connections are lent out now."""
        return len(self._lent)

    def steps(self, thread: int) -> int:
        """How often a thread has asked for a connection or sent a statement: does it get on?"""
        return self._steps[thread]

    @contextmanager
    def connection(self, *, limit_s: float = 60.0) -> Iterator[BridgeConnection]:
        """Borrow a connection. One that comes back broken, or in a transaction, is closed and replaced.

        A statement that takes longer than `limit_s` is taken for one that is never answered, see `cut_silent`.
        Raises psycopg2.Error when no connection can be made, SinkError when none is free for too long.
        """
        self._steps[threading.get_ident()] += 1
        if not self._free.acquire(timeout=self._wait_s):
            raise SinkError(f"no database connection was free for {self._wait_s:g} s; raise DB_POOL_SIZE")
        try:
            owner = self._current()
            connection = self._take(owner, limit_s)
            try:
                yield connection
            finally:
                self._give_back(owner, connection)
        finally:
            self._free.release()

    def _current(self) -> pool.ThreadedConnectionPool:
        # The lock is held while the constructor connects: other borrowers would only make a second pool.
        with self._lock:
            if self._closed:
                raise SinkError("the connections are closed")
            if self._pool is None:
                self._pool = pool.ThreadedConnectionPool(
                    self._size, self._size, self._dsn(), connection_factory=BridgeConnection
                )
            return self._pool

    def _take(self, owner: pool.ThreadedConnectionPool, limit_s: float) -> BridgeConnection:
        connection = cast(BridgeConnection, owner.getconn())  # by the pool's connection_factory
        connection.steps = self._steps
        connection.statement_s = time.monotonic()
        with self._lent_lock:
            self._lent[connection] = limit_s
        return connection

    def _give_back(self, owner: pool.ThreadedConnectionPool, connection: BridgeConnection) -> None:
        _leave_transaction(connection)
        broken = connection.closed != 0
        with self._lent_lock:
            del self._lent[connection]
        with self._lock:
            if broken and self._pool is owner:
                self._pool = None  # the others died with it; those lent out are closed as they come back
            retired = self._pool is not owner
        owner.putconn(connection, close=broken or retired)

    def cut_silent(self, *, at_most_s: float = math.inf) -> int:
        """Shut the sockets of lent connections whose statement is overdue; returns how many.

        Overdue is what has waited for longer than was said when the connection was borrowed, or than `at_most_s`.

        A peer that is reachable but silent (a hung proxy, a stopped server) would block its borrower for ever. Cut
        off, the borrower fails at once, and finds out by the ledger what became of its batch.
        """
        now = time.monotonic()
        with self._lent_lock:
            # Decided under the lock: a connection that is cut is still the one that was lent.
            waits = [(lent, now - lent.statement_s, limit_s) for lent, limit_s in self._lent.items()]
            silent = [lent for lent, waited_s, limit_s in waits if waited_s > min(limit_s, at_most_s)]
            return sum(map(_shut, silent))

    def close(self) -> None:
        """Close every connection; those lent out are closed when they come back. Idempotent."""
        self._closed = True
        if not self._lock.acquire(timeout=CLOSE_S):
            return  # somebody is connecting: that connection is closed by its end
        owner, self._pool = self._pool, None
        self._lock.release()
        if owner is not None and not self._lent:
            owner.closeall()


def _shut(connection: BridgeConnection) -> bool:
    try:
        # A duplicate of the descriptor: libpq goes on owning its own, and sees the end of the stream.
        with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)
    except (OSError, psycopg2.Error):
        return False
    connection.statement_s = time.monotonic()  # not again before it has had the time to notice
    return True


def _leave_transaction(connection: BridgeConnection) -> None:
    """Make sure that no transaction stays open; close the connection where that fails."""
    if connection.closed:
        return
    if connection.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE:
        connection.fresh = False
        return
    with suppress(psycopg2.Error):
        if connection.info.transaction_status != extensions.TRANSACTION_STATUS_UNKNOWN:
            with connection.cursor() as cursor:
                cursor.execute("ROLLBACK")
            return
    connection.close()
