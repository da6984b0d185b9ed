"""Batches into PostgreSQL, however long it takes.

`store` returns when the batch is durable, and not before: it retries for as long as the process runs, or as its caller
has patience. What an error means is decided in `errors`; what is done about it here, by tenacity. One try is in
`transactions`.

Invariant: a batch is tried under one key until its fate is known, so a COMMIT whose answer was lost is never repeated.

Threads: `store` is called by the workers and the drainer, `open` by the main thread, all else by the tender (and,
when it is about to end, the main thread). What several threads write are single references, replaced whole, and a
dict in which each thread has an entry of its own.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import psycopg2
import structlog
import tenacity

from mqtt_bridge import ownership, schema
from mqtt_bridge.complaints import Complaint
from mqtt_bridge.connections import BridgeConnection, Connections
from mqtt_bridge.errors import PAUSING, BridgeError, Failure, Fenced, SpoolElsewhere, Verdict, classify
from mqtt_bridge.ledger import BatchKey, Claim
from mqtt_bridge.ownership import NO_SPOOL, AlreadyCommitted, SpoolAtHand
from mqtt_bridge.retained import Remembered
from mqtt_bridge.transactions import Batch, Stored, Transactions

log = structlog.get_logger(__name__)
T = TypeVar("T")


class Attempt(BridgeError):
    """One try failed; carries what was understood of it. `stale`: on a connection that had been idle before."""

    def __init__(self, failure: Failure, *, stale: bool) -> None:
        self.failure = failure
        self.stale = stale
        super().__init__(str(failure))


class Stopped(BridgeError):
    """The bridge stops before the batch could be stored: it stays unacknowledged, the broker keeps it."""


class Impatient(BridgeError):
    """The patience of the caller has ended first. Its batch may be committed all the same: only under its key may it
    be tried again, in whatever other place it is kept meanwhile."""


# Verdict -> first and longest delay in seconds; the delay doubles with every try, with jitter.
_DELAYS_S = {
    Verdict.RECONNECT: (0.1, 30.0),
    Verdict.CONFLICT: (0.01, 1.0),
    Verdict.BUSY: (0.1, 30.0),
    Verdict.RESOURCES: (2.0, 30.0),
    Verdict.BROKEN: (2.0, 30.0),
    Verdict.CONFIGURATION: (1.0, 15.0),
    Verdict.ROW: (1.0, 15.0),
    Verdict.UNKNOWN: (1.0, 15.0),
}


SILENCE_S = 15.0
"""Beyond its own statement timeout the server is given this long to say so; then it is taken for silent."""
PROBE_LIMIT_S = 5.0
LOOK_UP_S = 1.0
"""Between two tries, whoever has limited patience is asked so often whether it has ended."""
FAILING = frozenset({Verdict.RECONNECT, *PAUSING})
"""Verdicts for which the database counts as failing. A lock or a time limit is none: it is slow then, not away."""
_GIVEN_UP = 0  # no thread's number: stands for those who have lost their patience, until something is stored again


def _for_ever() -> float:
    return math.inf


class Sink:
    """Stores batches through `connections`, as the owner of `client_id`."""

    def __init__(self, connections: Connections, *, client_id: str, statement_timeout_s: float = 30.0) -> None:
        self._connections = connections
        self._client_id = client_id
        self._transactions = Transactions(client_id=client_id, statement_timeout_s=statement_timeout_s)
        self._limit_s = statement_timeout_s + SILENCE_S
        self._stop = threading.Event()
        self._changed = threading.Condition()  # notified when the database is seen again, and by `stop`
        self._complaint = Complaint()
        self._failing_since_s: float | None = None
        self._troubles: dict[int, Failure] = {}  # by thread: what keeps it from storing; each writes its own
        self.reachable = False
        """Whether the database answered when it was last asked."""
        self.answered_s: float | None = None
        """Monotonic time of the last transaction or probe that succeeded."""
        self.heard_s = time.monotonic()
        """Monotonic time at which the database last said anything, be it a refusal."""
        self.retries = 0

    # -- start and stop

    def open(self, *, create: bool, spool: SpoolAtHand = NO_SPOOL, member_of: str | None = None) -> Claim:
        """Wait for the database, make sure of the schema, and take over the client id.

        `member_of` is that of `ownership.claim`. Raises `SpoolElsewhere` as that does, and `Stopped` by `stop`.
        """
        claim = self._persist(lambda connection: self._open(connection, spool, member_of, create=create))
        self._transactions.owner_epoch = claim.owner_epoch
        return claim

    def _open(self, connection: BridgeConnection, spool: SpoolAtHand, member_of: str | None, *, create: bool) -> Claim:
        schema.ensure(connection, create=create)
        return ownership.claim(connection, self._client_id, spool, member_of=member_of)

    def stop(self) -> None:
        """Give up whatever is being retried: `store` raises `Stopped`. Idempotent."""
        self._stop.set()
        self._rouse()

    def store(self, batch: Batch, *, patience_s: Callable[[], float] = _for_ever) -> Stored:
        """Commit `batch`, however long that takes, or as long as `patience_s` says how long it may still take.

        Raises `Stopped` when the bridge stops first, `Impatient` when the patience ends first, and `Fenced` when
        another process owns the client id. `AlreadyCommitted` only for a batch of several keys.
        """
        return self._persist(lambda connection: self._transactions.run(connection, batch), patience_s)

    @property
    def failing_s(self) -> float:
        """For how long it has not been possible to store something; 0 while all is well, or merely slow."""
        since_s = self._failing_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    @property
    def owner_epoch(self) -> int:
        """Under which this process owns the client id; 0 before `open`."""
        return self._transactions.owner_epoch

    @property
    def trouble(self) -> Failure | None:
        """Why something cannot be stored at the moment, the gravest reason first; None while all is well."""
        troubles = list(self._troubles.values())
        return min(troubles, key=lambda failure: failure.verdict not in PAUSING, default=None)

    # -- beside the batches

    def probe(self) -> bool:
        """Ask the database whether it is there, and whether the client id is still ours.

        Wakes those who wait for the database. `Fenced` when another process has taken over.
        """
        connection: BridgeConnection | None = None
        try:
            with self._connections.connection(limit_s=PROBE_LIMIT_S) as connection:
                if self.owner_epoch:
                    ownership.check_owner(connection, self._client_id, owner_epoch=self.owner_epoch)
                else:
                    _ask(connection)
        except Fenced:
            raise
        except (psycopg2.Error, BridgeError) as error:
            self._note(classify(error, connected=connection is not None and not connection.closed))
            return False
        self._answered()
        self._recovered()
        return True

    def raise_session(self, session_epoch: int) -> bool:
        """Write that the broker has lost the session; one try, False when it failed. `Fenced` as in `store`."""
        try:
            self.run(
                lambda connection: ownership.raise_session(
                    connection, self._client_id, owner_epoch=self.owner_epoch, session_epoch=session_epoch
                )
            )
        except Fenced:
            raise
        except (psycopg2.Error, BridgeError):
            return False
        return True

    def note_subscriptions(self, filters: Iterable[str]) -> None:
        """Remember which filters the session at the broker has; one try."""
        self.run(
            lambda connection: ownership.note_subscriptions(
                connection, self._client_id, filters, owner_epoch=self.owner_epoch
            )
        )

    def release_spool(self) -> None:
        """Note that no acknowledged message is on the disk any more; one short try, for the bridge is leaving."""
        self.run(
            lambda connection: ownership.release_spool(connection, self._client_id, owner_epoch=self.owner_epoch),
            limit_s=PROBE_LIMIT_S,
        )

    def note_retained(self, retained: Remembered) -> None:
        """Remember whose retained messages were stored; one try."""
        self.run(
            lambda connection: ownership.note_retained(
                connection, self._client_id, retained, owner_epoch=self.owner_epoch
            )
        )

    def prune(self, keys: Sequence[BatchKey]) -> None:
        """Delete ledger rows that nobody needs any more; one try, the caller keeps the keys where it fails."""
        self.run(lambda connection: ownership.prune(connection, self._client_id, keys))

    def run(self, action: Callable[[BridgeConnection], T], *, limit_s: float | None = None) -> T:
        """One try of `action` on a connection of the pool; cut off after `limit_s`, if that is shorter than usual."""
        with self._connections.connection(limit_s=limit_s or self._limit_s) as connection:
            return action(connection)

    # -- retrying

    def _persist(self, action: Callable[[BridgeConnection], T], patience_s: Callable[[], float] = _for_ever) -> T:
        """Run `action` until it succeeds. `Fenced` passes through; `Stopped` or `Impatient` end it."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Attempt),
            after=self._after_attempt,
            stop=lambda _: self._stop.is_set() or patience_s() <= 0,
            wait=_delay_s,
            sleep=lambda seconds: self._nap(seconds, patience_s),
        )
        try:
            result: T = retrying(self._attempt, action)
        except tenacity.RetryError as error:
            raise self._why_it_ended() from error
        self._answered()
        self._troubles.pop(_GIVEN_UP, None)
        self._recovered()
        return result

    def _attempt(self, action: Callable[[BridgeConnection], T]) -> T:
        connection: BridgeConnection | None = None
        try:
            with self._connections.connection(limit_s=self._limit_s) as connection:
                return _drop_if_useless(connection, action)
        except (Fenced, SpoolElsewhere, AlreadyCommitted):
            raise
        except Exception as error:  # every error has a verdict; none may end a worker
            connected = connection is not None and not connection.closed
            failure = classify(error, connected=connected)
            raise Attempt(failure, stale=connection is not None and not connection.fresh) from error

    def _why_it_ended(self) -> BridgeError:
        if self._stop.is_set():
            return Stopped("the bridge stopped before the batch could be stored")
        if failure := self._troubles.pop(threading.get_ident(), None):
            self._troubles[_GIVEN_UP] = failure
        return Impatient("the batch could not be stored in time")

    def _after_attempt(self, state: tenacity.RetryCallState) -> None:
        """Runs before it is decided whether to go on: patience may end because of what is noted here."""
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, Attempt):
            self.retries += 1
            if not _only_stale(error, state.attempt_number):
                self._note(error.failure)

    def _note(self, failure: Failure) -> None:
        """Remember the trouble, and log it when it is news or has lasted another minute."""
        self._troubles[threading.get_ident()] = failure
        if failure.verdict in FAILING and self._failing_since_s is None:
            self._failing_since_s = time.monotonic()
        if failure.verdict is Verdict.RECONNECT:
            self.reachable = False
        elif failure.sqlstate:
            self.heard_s = time.monotonic()
        if not self._complaint.is_news(failure.sentence):
            return
        level = log.error if failure.verdict in PAUSING else log.warning
        consequence = "messages wait, unacknowledged or on the disk"
        level(f"nothing can be stored: {failure}", consequence=consequence, **_fields(failure))

    def _answered(self) -> None:
        was_away, self.reachable = not self.reachable, True
        self.answered_s = self.heard_s = time.monotonic()
        if was_away:
            self._rouse()

    def _rouse(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _recovered(self) -> None:
        """This thread's trouble is over; that of another may go on."""
        had_trouble = self._troubles.pop(threading.get_ident(), None)
        if not any(failure.verdict in FAILING for failure in list(self._troubles.values())):
            self._failing_since_s = None
        if had_trouble and not self._troubles and self._complaint.clear():
            log.info("the database stores again")

    def _nap(self, seconds: float, patience_s: Callable[[], float]) -> None:
        """Sleep until the delay or the patience is over, the database is seen again, or the bridge stops."""
        end_s = time.monotonic() + seconds
        with self._changed:
            # Decided under the lock: `stop` sets its event first, so that its notification cannot be missed.
            while not self._stop.is_set() and (left_s := min(end_s - time.monotonic(), patience_s())) > 0:
                if self._changed.wait(min(left_s, LOOK_UP_S)):
                    return


def _drop_if_useless(connection: BridgeConnection, action: Callable[[BridgeConnection], T]) -> T:
    """Run `action`; a connection whose error asks for a new one is closed, and takes its idle fellows with it.

    Such as one to a server that has become read-only: its sessions stay so, even when the server no longer is.
    """
    try:
        return action(connection)
    except Exception as error:
        connection.encoders.clear()  # whoever mends the table may change its types: read them again
        if classify(error, connected=not connection.closed).verdict is Verdict.RECONNECT:
            connection.close()
        raise


def _ask(connection: BridgeConnection) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


def _fields(failure: Failure) -> dict[str, str]:
    known = {"verdict": failure.verdict.value, "sqlstate": failure.sqlstate, "sql": failure.sql}
    return {name: value for name, value in known.items() if value}


def _only_stale(error: Attempt, attempt_number: int) -> bool:
    """Whether a connection had merely died while it lay idle: tried again at once, without a word."""
    return error.stale and attempt_number == 1 and error.failure.verdict is Verdict.RECONNECT


def _delay_s(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    if not isinstance(error, Attempt):
        return 0.0
    if _only_stale(error, state.attempt_number):
        return 0.0  # it had only gone stale while it lay idle
    first_s, longest_s = _DELAYS_S[error.failure.verdict]
    doubled: float = first_s * 2 ** min(state.attempt_number - 1, 20)
    return min(doubled, longest_s) * random.uniform(0.5, 1.0)
