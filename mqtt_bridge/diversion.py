"""Decides where a batch goes: to the database, or to the disk.

`BRIDGE_SPOOL=always` sends every batch to the spool. `outage` does so from the moment that the database has failed for
`OUTAGE_S`, or fails while the queue is crowded or the bridge shuts down, until the spool is empty again; a database
that is merely slow is waited for. `off` puts nothing there, and stores what is found there before anything else.

Invariants: while batches wait on the disk none overtakes them, but those that were on their way already; a batch whose
first try may have been committed goes to the disk under the same key; what the disk has no room for is held, and tried
again. An error of which nobody can tell whether the batch is on the disk ends the process: the next one will see.

Threads: the workers call `store`, the drainer waits for what comes and tells what goes. One condition is notified of
both; the spool has a lock of its own.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal, Protocol

import structlog

from mqtt_bridge.sink import Impatient, Stopped
from mqtt_bridge.spool import NoSpool, Spool
from mqtt_bridge.transactions import Batch, Stored

log = structlog.get_logger(__name__)

Mode = Literal["off", "outage", "always"]

OUTAGE_S = 10.0
"""A database that fails for so long is away: shorter gaps, such as a restart, are waited for."""
LINGER_S = 0.25
"""While batches go to the disk because the database is away, nobody waits for them: they may grow. Large ones are
drained much faster than many small ones."""
ROOM_AGAIN_S = 5.0
"""A full disk is asked again after this time: somebody else may have made room."""


class Store(Protocol):
    """What is needed of the sink."""

    def store(self, batch: Batch, *, patience_s: Callable[[], float]) -> Stored:
        """Commit `batch`; `Impatient` when the patience ends before."""

    @property
    def failing_s(self) -> float:
        """For how long the database has been failing."""


class Diversion:
    """Stores batches in the database, or in the spool while that is better."""

    def __init__(self, store: Store, spool: Spool | NoSpool, *, mode: Mode, crowded: Callable[[], bool]) -> None:
        """`crowded`: whether so much is held that no time is to be lost once the database fails."""
        self._store = store
        self._spool = spool
        self._mode = mode
        self._crowded = crowded
        self._changed = threading.Condition()
        self._stopped = False  # guarded by the condition's lock
        self._turns: Counter[int] = Counter()  # by thread, each writes its own
        self._hurried = False
        self._is_outage = False  # as far as it has been told; a race between two workers tells it twice, at worst

    # -- for the workers

    def store(self, batch: Batch) -> Stored | None:
        """Return when `batch` is durable: what the database did with it, or None when it is on the disk.

        Raises `Stopped` and `Fenced` as the sink does, and SpoolError when nobody can tell whether it is on the disk.
        """
        while True:
            self._turns[threading.get_ident()] += 1
            diverts = self.diverts
            if diverts and self._append(batch):
                return None
            if self._spool.messages:  # first in, first out: what is on the disk goes first
                self._wait(self._has_changed, ROOM_AGAIN_S)
                continue
            try:
                patience_s = self._patience_after_refusal() if diverts else self.patience_s
                return self._store.store(batch, patience_s=patience_s)
            except Impatient:
                continue

    def turns(self, thread: int) -> int:
        """How often a thread has tried to find a place for a batch: does it get on?"""
        return self._turns[thread]

    @property
    def diverts(self) -> bool:
        """Whether batches go to the disk at the moment."""
        if self._mode == "outage":
            return self._spool.messages > 0 or self.patience_s() <= 0
        return self._mode == "always"

    def patience_s(self) -> float:
        """How long a batch may still be tried before it goes to the disk."""
        if self._mode == "off":
            return math.inf
        if self._mode == "always":
            return 0.0
        failing_s = self._store.failing_s
        if not failing_s:
            return OUTAGE_S
        return 0.0 if self._hurried or self._crowded() else max(0.0, OUTAGE_S - failing_s)

    def _has_changed(self) -> bool:
        """Whether it may go better now for a batch that the disk had no room for, or that is waiting for its turn."""
        return not self._spool.messages or (self._mode != "off" and not self._spool.full)

    @staticmethod
    def _patience_after_refusal() -> Callable[[], float]:
        """The disk has no room: try the database for a while, then the disk again."""
        end_s = time.monotonic() + ROOM_AGAIN_S
        return lambda: end_s - time.monotonic()

    def _append(self, batch: Batch) -> bool:
        if not self._spool.append(batch.entry, batch.messages):
            return False
        self._note_outage()
        self._notify()
        return True

    def _note_outage(self) -> None:
        if self._mode == "outage" and not self._is_outage:
            self._is_outage = True
            log.warning("the database is away: messages go to the disk", consequence="they are acknowledged from there")

    @property
    def linger_s(self) -> float:
        """How long a batch may wait for more messages, beyond what is usual."""
        is_away = self._store.failing_s > 0 if self._mode == "always" else self._mode == "outage" and self.diverts
        return LINGER_S if is_away and not self._hurried else 0.0

    def hurry(self) -> None:
        """The bridge shuts down: if the database fails now, batches go to the disk at once."""
        self._hurried = True

    def stop(self) -> None:
        """End all waiting. Idempotent."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    # -- for the drainer

    def wait_for_batch(self) -> None:
        """Wait until there is something on the disk. `Stopped` by `stop`."""
        self._wait(lambda: self._spool.messages > 0)

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Whether the spool is empty, after waiting for it while the database takes what is drained."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._spool.messages, 0 if self._store.failing_s else timeout_s)

    def removed(self) -> None:
        """A batch was stored, and is out of the spool."""
        if not self._spool.messages and self._is_outage:
            self._is_outage = False
            log.info("the spool is empty: messages go to the database again")
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or condition(), timeout_s)
            if self._stopped:
                raise Stopped("the bridge stopped before the batch could be stored")
