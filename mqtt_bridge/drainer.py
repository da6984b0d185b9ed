"""From the spool into the database: the oldest batches first, each under its own key.

A batch is translated when it is drained, by the routes of today. It leaves the spool when its transaction is committed,
and its ledger row stays until it has left: a crash between the two makes the next process find the row, and not store
the batch again. Small batches share a transaction, or a database that is far away would never catch up. Where that
finds a key committed before, by a try of which nobody had heard, each batch is tried alone: its own key knows.

Invariants: first in, first out; a batch leaves the disk only after its commit was seen.

Threads: `mqtt-bridge-drainer` does all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import structlog

from mqtt_bridge.batches import Batches, Work
from mqtt_bridge.complaints import Complaint
from mqtt_bridge.diversion import Diversion
from mqtt_bridge.errors import Fenced
from mqtt_bridge.ledger import Entry
from mqtt_bridge.ownership import AlreadyCommitted
from mqtt_bridge.sink import Stopped
from mqtt_bridge.spool import NoSpool, Spool, Spooled, SpoolError
from mqtt_bridge.transactions import Batch, Stored

log = structlog.get_logger(__name__)
T = TypeVar("T")

TOGETHER_MESSAGES = 2000
TOGETHER_BYTES = 256 << 10
"""Batches of so many messages, or of so many bytes of payload, are enough for one transaction."""
DISK_AGAIN_S = 5.0
"""A disk that cannot be read, or not written to, is tried again after this time."""


class Store(Protocol):
    """What is needed of the sink."""

    def store(self, batch: Batch) -> Stored:
        """Return when `batch` is durable; `Stopped` or `Fenced` when it never will be.

        `AlreadyCommitted` where it has several keys, and one of them is known already.
        """


class Drainer:
    """Empties the spool for as long as the bridge runs."""

    def __init__(
        self,
        spool: Spool | NoSpool,
        diversion: Diversion,
        store: Store,
        batches: Batches,
        *,
        on_drained: Callable[[Sequence[Entry], Work, Stored], None],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        """`on_drained` settles batches that are committed and out of the spool."""
        self._spool = spool
        self._diversion = diversion
        self._store = store
        self._batches = batches
        self._on_drained = on_drained
        self._on_fatal = on_fatal
        self._complaint = Complaint()
        self._stop = threading.Event()
        self.turns = 0
        """Grows with every batch, and with every try at a disk that fails: does it get on?"""
        self._thread = threading.Thread(target=self._run, name="mqtt-bridge-drainer", daemon=True)

    def start(self) -> None:
        """Start the thread. Idempotent."""
        if self._thread.ident is None:
            self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread, after `Diversion.stop` and `Sink.stop`; False when it hangs. Safe when never started."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def ident(self) -> int | None:
        """The thread's number; None when it was never started."""
        return self._thread.ident

    @property
    def alive(self) -> bool:
        """Whether the thread runs, as it should from `start` to `stop`."""
        return self._thread.is_alive()

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._diversion.wait_for_batch()
                self._drain()
        except Stopped:
            log.debug("the drainer has stopped; what is in the spool stays there")
        except Fenced as error:
            self._on_fatal(error)
        except BaseException as error:
            log.critical("the drainer has died; what is in the spool stays there", exc_info=True)
            self._on_fatal(error)

    def _drain(self) -> None:
        """Store some of the oldest batches, together if that is possible."""
        together = self._from_disk(self._take_some)
        try:
            self._store_together(together)
        except AlreadyCommitted:
            for spooled in together:
                self._store_together([spooled])

    def _take_some(self) -> list[Spooled]:
        taken: list[Spooled] = []
        messages = size_bytes = 0
        for spooled in self._spool.oldest():
            taken.append(spooled)
            messages += len(spooled.messages)
            size_bytes += sum(len(message.payload) for message in spooled.messages)
            if messages >= TOGETHER_MESSAGES or size_bytes >= TOGETHER_BYTES:
                break
        return taken

    def _store_together(self, together: Sequence[Spooled]) -> None:
        if not together:
            return
        work = self._batches.whole([message for spooled in together for message in spooled.messages])
        entries = [spooled.entry for spooled in together]
        stored = self._store.store(work.batch(*entries))
        self._from_disk(lambda: self._spool.remove(*(spooled.sequence for spooled in together)))
        self._on_drained(entries, work, stored)
        self._diversion.removed()

    def _from_disk(self, action: Callable[[], T]) -> T:
        """Run `action` until the disk lets it: the batch in hand is committed already, or untouched."""
        while True:
            self.turns += 1
            try:
                return action()
            except SpoolError as error:
                if self._complaint.is_news(str(error)):
                    log.error(f"{error}", consequence="nothing can be drained until the disk is well")
            if self._stop.wait(DISK_AGAIN_S):
                raise Stopped("the bridge stopped while the disk was failing")
