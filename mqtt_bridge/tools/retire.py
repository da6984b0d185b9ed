"""`mqtt-bridge retire`: ends a client id for good, for scaling down and renaming.

A retirement is a series of *rounds*. A round is a whole bridge that unsubscribes instead of subscribing, stores what
the session still holds, and is ended when nothing more comes. MQTT has no sign for an empty queue, so quiet alone is
not believed: the last round is one that began with a new connection to the session, had its UNSUBSCRIBE answered, and
received nothing at all. A broker that still held anything, in its queue or in flight, would have sent it there. Only
then is the session ended, and the client id forgotten in the database.

Invariants: the session is ended only after a round that received nothing; under the lock that a claim of the client id
needs, so nobody can begin to use the session meanwhile; and before the database forgets it. So a retirement that dies
on any line is finished by the next one: what was stored is in the ledger, what was not is in the session.

Threads: `run` in the caller's, which shows the progress. The bridge of a round, and whatever waits for a server, run
beside it, so that signals are heard. `request_stop` may be called by any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Self, TextIO, TypeVar

import psycopg2

from mqtt_bridge import ownership
from mqtt_bridge.account import OUTCOMES
from mqtt_bridge.bridge import EXIT_FENCED, EXIT_OK, Bridge, make_router
from mqtt_bridge.broker_connection import wire_filters
from mqtt_bridge.complaints import Complaint
from mqtt_bridge.connections import BridgeConnection, Connections
from mqtt_bridge.errors import BridgeError, Fenced, SettingsError, classify, explain_unreachable
from mqtt_bridge.metrics import Observation
from mqtt_bridge.ownership import Known, SpoolLeft
from mqtt_bridge.settings import Settings
from mqtt_bridge.spool import SpoolError
from mqtt_bridge.tools.check_spool import open_spool
from mqtt_bridge.tools.guest import hindrance, named_by_user, visit

T = TypeVar("T")

TICK_S = 0.2
RETRY_S = 2.0
PATIENCE_S = 30.0
"""Beyond its own statement timeout the database is given this long; longer than the end of a session can take."""
STILL_S = 60.0
"""After this time of messages that go on coming, it is said what may be the reason."""
LINE, LINE_EVERY_S = 160, 10.0
"""Characters of a line on a terminal at most, and how often there is one elsewhere."""


class Interrupted(BridgeError):
    """Asked to stop before the end."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it has come."""

    phase: str
    """What is being done, one clause."""
    received: int = 0
    in_flight: int = 0
    waiting_for: str = ""
    """Why nothing moves at the moment."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of it."""

    known: Known | None
    """What the database knew before; None when it knew nothing."""
    session_found: bool
    """Whether the broker had a session."""
    messages: dict[str, int]
    """By outcome, over all rounds."""
    ledger_rows: int
    """Rows that the ledger had left at the end."""
    seconds: float

    @property
    def drained(self) -> int:
        """Messages that the session held."""
        return sum(self.messages.values())


@dataclass(frozen=True, slots=True)
class _Round:
    """What one round found."""

    session_found: bool
    session_gone: bool
    received: int
    outcomes: dict[str, int]
    owner_epoch: int


class Retirement:
    """Ends the client id of `settings`."""

    def __init__(
        self,
        settings: Settings,
        *,
        quiet_s: float,
        show: Callable[[Progress], object] = lambda progress: None,
        say: Callable[[str], object] = lambda sentence: None,
    ) -> None:
        """`quiet_s`: how long nothing may come before a round is over. `say` hears what is worth a line of its own."""
        # No HTTP: the port may be another bridge's. Nothing is spooled: it has to be in the database at the end.
        self._settings = settings.model_copy(update={"http_port": 0, "bridge_spool": "off", "bridge_spool_dir": None})
        self._spool_dir = settings.bridge_spool_dir
        self._client_id = settings.mqtt_client_id
        self._quiet_s = quiet_s
        self._show = show
        self._say = say
        self._connections = Connections(settings.dsn, size=1)
        self._stop = threading.Event()
        self._complaint = Complaint()
        self._began_s = time.monotonic()
        self._progress = Progress("")
        self._drained = 0  # messages of the rounds that are over

    def request_stop(self) -> None:
        """End it in good order, to be finished another time."""
        self._stop.set()

    def close(self) -> None:
        """Close the connections to the database. Idempotent."""
        self._connections.close()

    def look_up(self) -> Known | None:
        """What the database knows of the client id, as soon as it answers. Changes nothing.

        `SpoolLeft` when the client id may not be retired, since its disk is not in BRIDGE_SPOOL_DIR; `Interrupted` by
        `request_stop`.
        """
        known = self._insist(lambda: self._ask(lambda connection: ownership.look_up(connection, self._client_id)))
        if known is not None and known.spool_id:
            if known.spool_id != self._spool_at_hand():
                raise SpoolLeft(self._client_id, known.spool_id)
            self._settings = self._settings.model_copy(update={"bridge_spool_dir": self._spool_dir})
        return known

    def _spool_at_hand(self) -> str | None:
        """The id of this client's spool in BRIDGE_SPOOL_DIR, which each round empties; None where there is none."""
        try:
            spool = open_spool(self._settings, self._spool_dir) if self._spool_dir else None
        except SpoolError:
            return None  # in use, somebody else's, or unfit
        return spool.id if spool else None

    def run(self, known: Known | None) -> Summary:
        """Drain the session, end it, and forget the client id; `known` is what `look_up` said.

        Raises `Fenced` when a bridge takes the client id back, `Interrupted` by `request_stop`, BridgeError when it
        cannot go on. After each of them it can be run again.
        """
        self._insist(self._make_sure_whose_session_it_is)
        rounds = [self._round(known, 1)]
        while rounds[-1].received and not rounds[-1].session_gone:
            rounds.append(self._round(known, len(rounds) + 1))
        self._tell(Progress("ending the session", self._drained))
        ledger_rows = self._insist(lambda: self._ask(lambda connection: self._forget(connection, rounds[-1])))
        return Summary(
            known=known,
            session_found=any(each.session_found for each in rounds),
            messages={name: sum(each.outcomes[name] for each in rounds) for name in OUTCOMES},
            ledger_rows=ledger_rows,
            seconds=time.monotonic() - self._began_s,
        )

    def _make_sure_whose_session_it_is(self) -> None:
        """A broker that makes the user name the client id would give us the session of that user."""
        username, _ = self._settings.mqtt_credentials()
        if username == self._client_id:
            return
        try:
            by_user = named_by_user(self._settings)
        except (OSError, UnicodeError) as error:
            raise self._unreachable(error) from error
        if by_user and username is not None:
            raise BridgeError(
                f"The broker makes the user name the client id: the session of {username!r} would end, not that of"
                f" {self._client_id!r}. Set MQTT_USERNAME, and its password, to those of {self._client_id!r}."
            )
        if by_user is not False:
            self._say(
                "The broker may make the name in the certificate, or the user name, the client id, and then the session"
                f" of that name ends: make sure that it is {self._client_id!r}."
            )

    # -- a round

    def _round(self, known: Known | None, number: int) -> _Round:
        phase = "draining" if number == 1 else f"making sure, connection {number}"
        self._tell(Progress(phase, self._drained))
        own = wire_filters(self._settings, make_router(self._settings).filters)
        bridge = Bridge(self._settings, unsubscribe=frozenset(own) | (known.subscriptions if known else frozenset()))
        watch = _Watch(self._quiet_s)

        def tick() -> None:
            observation = bridge.observe()
            watch.look(observation)
            self._note(phase, observation, watch)
            if self._stop.is_set() or watch.done:
                bridge.request_stop()

        code = self._beside(bridge.run, tick)
        if code == EXIT_FENCED:
            raise Fenced(
                f"another process has taken over the client id {self._client_id!r}: a bridge was started under it"
                " again. Nothing is lost. Stop it, and what restarts it, then retire the client id."
            )
        if code != EXIT_OK:
            raise BridgeError(f"{self._client_id!r} is not retired, see above. Nothing is lost; run it again.")
        if not watch.done:
            raise self._interrupted()
        messages = bridge.status()["messages"]
        self._drained += messages["received"]
        return _Round(
            session_found=watch.session_found,
            session_gone=watch.session_gone,
            received=messages["received"],
            outcomes={name: messages[name] for name in OUTCOMES},
            owner_epoch=bridge.owner_epoch,
        )

    def _note(self, phase: str, observation: Observation, watch: _Watch) -> None:
        if watch.goes_on_and_on():
            self._say(
                "messages still arrive after unsubscribing: a long backlog, or a subscription of this session that"
                " neither settings nor database know. Then set MQTT_TOPICS (and MQTT_SHARED_GROUP) to what it was."
            )
        balance = observation.balance
        reasons = "" if watch.done else "; ".join(observation.status["reasons"])
        self._tell(Progress(phase, self._drained + balance.received, balance.in_flight, reasons))

    # -- the end

    def _forget(self, connection: BridgeConnection, last: _Round) -> int:
        return ownership.retire(
            connection, self._client_id, owner_epoch=last.owner_epoch, end_session=self._end_session
        )

    def _end_session(self) -> None:
        """A clean session takes the place of the one that is there, and ends with its connection: in every protocol."""
        try:
            with visit(self._settings, filters=(), lasting=False) as connection:
                problem = hindrance(connection, self._settings)
        except (OSError, UnicodeError) as error:
            raise self._unreachable(error) from error
        if problem:
            raise _NotNow(f"The session cannot be ended: {problem}")

    def _unreachable(self, error: Exception) -> _NotNow:
        reason = explain_unreachable(error, host=self._settings.mqtt_host, port=self._settings.mqtt_port)
        return _NotNow(f"The broker: {reason}")

    # -- waiting

    def _insist(self, action: Callable[[], T]) -> T:
        """Try `action` until the servers that it needs are there."""
        while not self._stop.is_set():
            try:
                result = self._beside(action, self._connections.cut_silent)
            except _NotNow as error:
                if self._complaint.is_news(str(error)):
                    self._say(f"{error} Trying again.")
            else:
                return result
            self._stop.wait(RETRY_S)
        raise self._interrupted()

    def _ask(self, action: Callable[[BridgeConnection], T]) -> T:
        connection: BridgeConnection | None = None
        try:
            with self._connections.connection(limit_s=self._settings.db_statement_timeout_s + PATIENCE_S) as connection:
                return action(connection)
        except (Fenced, SpoolLeft, SettingsError, _NotNow):
            raise
        except (psycopg2.Error, BridgeError) as error:
            connected = connection is not None and not connection.closed
            raise _NotNow(f"The database: {classify(error, connected=connected)}") from error

    def _beside(self, action: Callable[[], T], tick: Callable[[], object]) -> T:
        """Run `action` in a thread of its own, and `tick` now and then until it is done."""
        done: Future[T] = Future()
        ended = threading.Event()

        def work() -> None:
            try:
                done.set_result(action())
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
                done.set_exception(error)
            ended.set()

        threading.Thread(target=work, name="mqtt-bridge-retire", daemon=True).start()
        while not ended.wait(TICK_S):
            tick()
        return done.result()

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"interrupted: {self._client_id!r} is not retired yet. Nothing is lost; run it again.")

    def _tell(self, progress: Progress) -> None:
        if progress != self._progress:
            self._progress = progress
            self._show(progress)


class _NotNow(BridgeError):
    """A server is away: to be tried again."""


class _Watch:
    """When is a round over? Looks at the bridge again and again."""

    def __init__(self, quiet_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._quiet_s = quiet_s
        self._clock = clock
        self._seen: tuple[int, int] | None = None  # messages received, and on which connection
        self._changed_s = 0.0  # when that was last another
        self._busy_s = 0.0  # when it was last not idle
        self._unsubscribed_s: float | None = None
        self._said = False
        self.done = False
        """Whether nothing more is to be expected. Stays so: the bridge is being ended."""
        self.session_found = False
        """Whether the broker had the session when a connection began."""
        self.session_gone = False
        """Whether there is only a new one any more, which is empty."""

    def look(self, observation: Observation) -> None:
        """Take in what is seen now.

        Idle means: connected, unsubscribed, the database there, everything received committed, also what was on a disk,
        every PUBACK proven.
        """
        if self.done:
            return
        now_s, broker = self._clock(), observation.status["broker"]
        seen = (observation.balance.received, broker["reconnects"])
        held = observation.balance.in_flight or observation.status["spool"]["messages"]
        idle = observation.ready and not held and not observation.unproven_acks
        if seen != self._seen:
            self._seen, self._changed_s = seen, now_s
        if not idle:
            self._busy_s = now_s
        if observation.ready and self._unsubscribed_s is None:
            self._unsubscribed_s = now_s
        self.session_found |= broker["session_present"]
        self.session_gone = idle and not broker["session_present"]
        self.done = self.session_gone or (idle and now_s - max(self._changed_s, self._busy_s) >= self._quiet_s)

    def goes_on_and_on(self) -> bool:
        """Whether messages have gone on arriving for very long; true once."""
        if self._said or self.done or self._unsubscribed_s is None:
            return False
        now_s = self._clock()
        self._said = now_s - self._unsubscribed_s > STILL_S and now_s - self._changed_s <= self._quiet_s
        return self._said


# -- for people


class ProgressLine:
    """One line that changes, on a terminal; else a line now and then."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._shown: tuple[str, float] = ("", 0.0)  # phase of the last line, and when

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, progress: Progress) -> None:
        """Show it, where that is not too often."""
        text = f"{progress.phase}: {progress.received:,} messages, {progress.in_flight:,} in flight"
        if self._stream.isatty():
            waiting = f" ({progress.waiting_for})" if progress.waiting_for else ""
            self._write(f"\r\x1b[K{text}{waiting}"[:LINE])
        elif progress.phase != self._shown[0] or self._clock() - self._shown[1] >= LINE_EVERY_S:
            self._shown = (progress.phase, self._clock())
            self._write(f"{text}\n")

    def say(self, sentence: str) -> None:
        """Something worth a line of its own."""
        self.clear()
        self._write(f"{sentence}\n")

    def clear(self) -> None:
        """Make room for something else."""
        if self._stream.isatty():
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def question(settings: Settings, known: Known | None) -> str:
    """What is asked before it begins."""
    broker, client_id = f"{settings.mqtt_host}:{settings.mqtt_port}", settings.mqtt_client_id
    return (
        f"Client id {client_id!r} at the broker {broker}, in the database: {_acquaintance(known)}.\n"
        "What its session holds is stored, then the session ends for good. A bridge that runs under it stops.\n"
        f"Retire {client_id!r}?"
    )


def _acquaintance(known: Known | None) -> str:
    if known is None:
        return "unknown"
    subscriptions = ", ".join(sorted(known.subscriptions)) or "no subscription noted"
    return f"last claimed {known.claimed_at:%Y-%m-%d %H:%M} UTC, {subscriptions}"


def render(client_id: str, summary: Summary) -> str:
    """What became of it, for the terminal."""
    if not summary.session_found:
        if summary.known is None:
            return f"{client_id!r} is known neither to the broker nor to the database: there was nothing to retire"
        rows = f"{summary.ledger_rows:,} ledger rows"
        return f"the broker has no session of {client_id!r} any more; its traces in the database are gone ({rows})"
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in summary.messages.items() if count)
    held = f"its session held {summary.drained:,} messages ({counts})" if counts else "its session held nothing"
    return f"{client_id!r} is retired: {held}; {summary.seconds:.1f} s"
