"""What the bridge asks of the database beside the batches: probes, notes, pruning, purging, partitions.

Each duty is done again and again, and is tried once each time: what fails is due again. Before the client id is
claimed there is nothing to write; only the probe, the rates and the report begin at once.

Invariant: nothing is noted in the database but what `begin` has read there, and what this process has seen since.

Threads: `mqtt-bridge-tender` does the rounds. `begin` runs in the main thread, and no duty that writes is done before
it has ended; `attempt` may be called by any.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import psycopg2
import structlog

from mqtt_bridge import dead_letters, schema
from mqtt_bridge.errors import BridgeError, Fenced
from mqtt_bridge.ledger import Claim
from mqtt_bridge.pipeline import Pipeline
from mqtt_bridge.rates import Rates
from mqtt_bridge.retained import Remembered, Retained
from mqtt_bridge.settings import Settings
from mqtt_bridge.sink import Sink
from mqtt_bridge.subscriber import Subscriber

log = structlog.get_logger(__name__)

TICK_S = 1.0
PROBE_EVERY_S = 5.0
REPORT_EVERY_S = 60.0
HOUSEKEEPING_EVERY_S = 3600.0

Duty = Callable[[], object]


class Tender:
    """Does its rounds from `start` to `stop`."""

    def __init__(
        self,
        settings: Settings,
        *,
        sink: Sink,
        pipeline: Pipeline,
        subscriber: Subscriber,
        retained: Retained,
        rates: Rates,
        on_fenced: Callable[[Fenced], object],
    ) -> None:
        """`on_fenced` hears that the client id has another owner."""
        self._settings = settings
        self._sink = sink
        self._pipeline = pipeline
        self._subscriber = subscriber
        self._retained = retained
        self._rates = rates
        self._on_fenced = on_fenced
        self._noted_subscriptions: frozenset[str] = frozenset()
        self._noted_retained = Remembered()
        self._wakes = threading.Event()
        self._claimed = threading.Event()  # there is something to write, and a right to
        self._cut_off = threading.Event()  # the broker has ended a connection: is the client id still ours?
        self._tidy = threading.Event()  # set to have the last round done ...
        self._tidied = threading.Event()  # ... and set when that is done
        self._stopped = threading.Event()
        self._due_s: dict[Duty, float] = {}
        self._thread = threading.Thread(target=self._run, name="mqtt-bridge-tender", daemon=True)
        self.turns = 0
        """Grows with every duty, and with every look at what is due: does it get on?"""

    # -- for other threads

    def start(self) -> None:
        """Start the thread; once."""
        self._thread.start()

    def begin(self, claim: Claim) -> None:
        """The client id is claimed: begin with what the database knows, and go on writing down what becomes of it."""
        self._noted_subscriptions = claim.subscriptions
        self._noted_retained = claim.retained
        self.attempt(self.note_retained)  # what is withheld should be known before SUBSCRIBE
        self._claimed.set()

    def wake(self) -> None:
        """There may be something to do now."""
        self._wakes.set()

    def ask_for_the_owner(self) -> None:
        """Ask the database soon whether the client id is still ours."""
        self._cut_off.set()
        self._wakes.set()

    def tidy_up(self, timeout_s: float) -> bool:
        """Have a last round done, after which nothing changes any more; False when it took too long."""
        self._tidy.set()
        self._wakes.set()
        return self._tidied.wait(timeout_s)

    def stop(self) -> None:
        """End the thread, without waiting for it: it may hang in the database. Idempotent."""
        self._stopped.set()
        self._wakes.set()

    @property
    def ident(self) -> int | None:
        """The thread's number; None before `start`."""
        return self._thread.ident

    @property
    def alive(self) -> bool:
        """Whether the thread runs, as it should from `start` to `stop`."""
        return self._thread.is_alive()

    def attempt(self, duty: Duty) -> None:
        """Try it once; whatever comes of it, go on."""
        self.turns += 1
        try:
            duty()
        except Fenced as error:
            self._on_fenced(error)
        except (psycopg2.Error, BridgeError) as error:
            log.debug("housekeeping failed, to be tried again", error=str(error))
        except Exception:  # the tender must survive; the next round tries again
            log.exception("housekeeping failed for an unforeseen reason")

    # -- the thread

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._wakes.wait(TICK_S)
            self._wakes.clear()
            self.turns += 1
            self._do_what_is_due()
            if self._cut_off.is_set():
                self._cut_off.clear()
                self.attempt(self._sink.probe)
            if self._tidy.is_set() and not self._tidied.is_set():
                for duty in (self._note_subscriptions, self.note_retained, self._prune):
                    self.attempt(duty)
                self._tidied.set()

    def _do_what_is_due(self) -> None:
        for pause_s, duty in self._duties():
            due_s = self._due_s.setdefault(duty, time.monotonic() + min(pause_s, REPORT_EVERY_S))
            if time.monotonic() >= due_s:
                self._due_s[duty] = time.monotonic() + pause_s
                self.attempt(duty)

    def _duties(self) -> Iterator[tuple[float, Duty]]:
        """Each with the time between two tries."""
        yield 1.0, self._sample
        yield PROBE_EVERY_S, self._sink.probe
        yield REPORT_EVERY_S, self._report
        if self._claimed.is_set():
            yield 0.0, self._raise_session
            yield 1.0, self._note_subscriptions
            yield 1.0, self.note_retained
            yield REPORT_EVERY_S, self._prune
            yield REPORT_EVERY_S, self._purge
            yield HOUSEKEEPING_EVERY_S, self._make_partitions

    # -- the duties

    def _sample(self) -> None:
        balance = self._pipeline.balance()
        self._rates.sample(time.monotonic(), received=balance.received, stored=balance.outcomes["stored"])

    def _report(self) -> None:
        balance = self._pipeline.balance()
        log.info("account", received=balance.received, in_flight=balance.in_flight, **balance.outcomes)

    def _raise_session(self) -> None:
        epoch = self._pipeline.session_to_raise
        if epoch is not None and self._sink.raise_session(epoch):
            self._pipeline.session_raised(epoch)

    def _note_subscriptions(self) -> None:
        filters = self._subscriber.subscriptions
        if filters != self._noted_subscriptions and self._pipeline.session_to_raise is None:
            self._sink.note_subscriptions(filters)
            self._noted_subscriptions = filters

    def note_retained(self) -> None:
        """Write down whose replays are over, once what came of them is durable."""
        retained = self._retained.remembering()
        # In this order: what was received when the replays were found to be over is durable, or held.
        if retained != self._noted_retained and not self._pipeline.holds_replays:
            self._sink.note_retained(retained)
            self._retained.remembered = self._noted_retained = retained

    def _prune(self) -> None:
        """Empty the ledger of what is proven, where no batch has come to do so."""
        while keys := self._pipeline.take_prunable():
            try:
                self._sink.prune(keys)
            except BaseException:
                self._pipeline.give_back(keys)  # forgotten here they would stay in the database for ever
                raise

    def _purge(self) -> None:
        """Delete some of the dead letters that are too old; the rest of them in a minute."""
        days = self._settings.bridge_dead_letter_days
        purged = self._sink.run(lambda connection: dead_letters.purge_older_than(connection, days))
        if purged:
            log.info("old dead letters were deleted", count=purged, older_than_days=days)

    def _make_partitions(self) -> None:
        if self._settings.db_auto_create:
            self._sink.run(lambda connection: schema.make_partitions(connection, datetime.now(UTC)))
