"""Builds the bridge of its parts, starts and stops them in order, and tells how it is.

Start: HTTP, so that the outside can see why it is not ready; database, schema and ownership of the client id; workers;
and only then the subscriber, for what the broker redelivers can be recognised only by who has read the ledger.

Stop: leave new messages to the broker, drain the queue into the database, have every PUBACK proven, disconnect. What
cannot be done within `BRIDGE_SHUTDOWN_S` is left undone: it was not acknowledged, and the broker keeps it.

Threads: `run` belongs to the main thread. `mqtt-bridge-tender` does what needs the database beside the batches: probes,
partitions, pruning. `mqtt-bridge-watchdog` needs nothing but the clock: it sees to it that the others live, and cuts
connections to a database that is silent. `request_stop` may be called by a signal handler.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import psycopg2
import structlog

from mqtt_bridge import __version__, dead_letters, schema
from mqtt_bridge.account import Balance
from mqtt_bridge.acks import AckTracker
from mqtt_bridge.connections import Connections
from mqtt_bridge.errors import PAUSING, BridgeError, Fenced
from mqtt_bridge.ledger import Ledger
from mqtt_bridge.metrics import Exposition, Observation
from mqtt_bridge.pipeline import Limits, Pipeline
from mqtt_bridge.rates import Rates
from mqtt_bridge.routes import Router, default_routes
from mqtt_bridge.settings import Settings
from mqtt_bridge.sink import Sink, Stopped
from mqtt_bridge.subscriber import Subscriber
from mqtt_bridge.web import Web

log = structlog.get_logger(__name__)

EXIT_OK, EXIT_FAILED, EXIT_SETTINGS, EXIT_FENCED = 0, 1, 2, 3

PROBE_EVERY_S = 5.0
REPORT_EVERY_S = 60.0
HOUSEKEEPING_EVERY_S = 3600.0
STALLED_S = 60.0
"""A message that waits longer than this although the database answers means that the bridge itself is stuck."""
ANSWERED_WITHIN_S = 10.0
SILENT_S = 15.0
"""After this time without an answer, three probes, the database counts as silent."""
LEAVE_S = 5.0
"""Time kept back from the drain for having the acknowledgements proven, at most."""


def make_router(settings: Settings) -> Router:
    """The router that these settings ask for."""
    return Router(
        default_routes(",".join(settings.mqtt_topics)),
        max_values=settings.bridge_max_values,
        max_depth=settings.bridge_max_depth,
    )


class Bridge:
    """One bridge: one client id, one subscriber, one pipeline, one sink."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._began_s = time.monotonic()
        self._router = make_router(settings)
        self._connections = Connections(settings.dsn, size=settings.db_pool_size)
        self._sink = Sink(
            self._connections,
            client_id=settings.mqtt_client_id,
            statement_timeout_s=settings.db_statement_timeout_s,
        )
        self._acks = AckTracker()
        self._ledger = Ledger(redelivery=settings.mqtt_redelivery)
        self._pipeline = Pipeline(
            self._router,
            self._sink,
            ledger=self._ledger,
            acks=self._acks,
            limits=Limits(
                workers=settings.bridge_workers,
                batch_size=settings.bridge_batch_size,
                batch_wait_s=settings.bridge_batch_wait_ms / 1000,
                queue_size=settings.bridge_queue_size,
                queue_bytes=settings.bridge_queue_mb << 20,
            ),
            keep_retained=settings.mqtt_retained != "never",
            on_fatal=self._fail,
            on_session_lost=lambda: self._tender_wakes.set(),
        )
        self._subscriber = Subscriber(
            settings,
            filters=self._router.filters,
            inbox=self._pipeline,
            acks=self._acks,
            on_cut=self._ask_who_owns_the_client_id,
        )
        self._metrics = Exposition(self.observe)
        self._web = Web(
            host=settings.http_host,
            port=settings.http_port,
            token=settings.http_token.get_secret_value() if settings.http_token else None,
            status=self.status,
            healthy=self.unhealthy_reasons,
            ready=self.unready_reasons,
            metrics=self._metrics.render,
        )
        self._rates = Rates()
        self._tender_wakes = threading.Event()
        self._cut_off = threading.Event()  # the broker has ended a connection: is the client id still ours?
        self._tender = threading.Thread(target=self._tend, name="mqtt-bridge-tender", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="mqtt-bridge-watchdog", daemon=True)
        self._tidy = threading.Event()  # set to have the tender do its last round ...
        self._tidied = threading.Event()  # ... and set by it when that is done
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._began_receiving = False
        self._noted_subscriptions: frozenset[str] = frozenset()

    # -- running

    def run(self) -> int:
        """Run until `request_stop`, or until the bridge cannot go on; returns the exit code.

        Raises SettingsError when HTTP cannot be served as asked.
        """
        if self._settings.http_port:
            self._web.start()
        self._tender.start()
        self._watchdog.start()
        try:
            self._start()
            self._stopping.wait()
        except Stopped:
            pass  # asked to stop while the database was still awaited
        except Fenced as error:
            self._fail(error)
        except Exception as error:  # the supervisor must see the end, not a process that hangs with half its threads
            log.critical("the bridge failed for an unforeseen reason", exc_info=True)
            self._fail(error)
        self._shut_down()
        return self._exit_code()

    def _start(self) -> None:
        claim = self._sink.open(create=self._settings.db_auto_create)
        self._ledger.load(claim)
        self._subscriber.subscriptions = self._noted_subscriptions = claim.subscriptions
        log.info(
            "the database is ready",
            client_id=self._settings.mqtt_client_id,
            owner_epoch=claim.owner_epoch,
            unproven_batches=len(claim.entries),
        )
        self._pipeline.start()
        self._subscriber.start()
        self._began_receiving = True

    def _watch(self) -> None:
        """The watchdog's life, until the very end: also a shutdown must not hang on a silent database."""
        while not self._stopped.wait(1.0):
            if self._connections.cut_silent():
                log.warning("a database connection was cut: the server is there but does not answer", stack=stacks())
            for reason in self._dead_threads():
                log.critical("the bridge cannot go on", reason=reason, stack=stacks())
                self._fail(BridgeError(reason))

    def request_stop(self) -> None:
        """Begin to shut down. Safe in a signal handler: it only sets events."""
        self._stopping.set()
        if not self._began_receiving:
            self._sink.stop()  # nothing to drain: do not wait for the database

    def _fail(self, error: BaseException) -> None:
        """End the bridge because of `error`; called by any thread."""
        if self._failure is None:
            self._failure = error
        if isinstance(error, Fenced):
            log.error(f"{error}; stopping", client_id=self._settings.mqtt_client_id)
            self._sink.stop()
        self._stopping.set()

    def _exit_code(self) -> int:
        if self._failure is None:
            return EXIT_OK
        return EXIT_FENCED if isinstance(self._failure, Fenced) else EXIT_FAILED

    def _shut_down(self) -> None:
        deadline_s = time.monotonic() + self._settings.bridge_shutdown_s

        def left_s() -> float:
            return max(0.0, deadline_s - time.monotonic())

        log.info("stopping", in_flight=self._pipeline.balance().in_flight)
        self._subscriber.stop_taking_in()
        if self._began_receiving and self._failure is None:
            self._leave_in_good_order(left_s)
        self._sink.stop()
        self._subscriber.stop(left_s())
        if not self._pipeline.stop(max(1.0, left_s())):
            log.warning("a worker hangs in the database; its batch is left to the broker", stack=stacks())
        self._account_for_the_rest()
        self._stopped.set()
        self._tender_wakes.set()
        self._connections.close()
        self._web.stop()
        log.info("stopped", **self._pipeline.balance().outcomes)

    def _leave_in_good_order(self, left_s: Callable[[], float]) -> None:
        """Drain, have the acknowledgements proven, disconnect, tidy up; each for as long as there is time left."""
        keep_back_s = min(LEAVE_S, self._settings.bridge_shutdown_s / 4)
        self._pipeline.drain(max(0.0, left_s() - keep_back_s))
        if not self._subscriber.leave(left_s() * 0.8):
            log.warning("the broker has not confirmed the last acknowledgements; the ledger will recognise them")
        self._tidy.set()
        self._tender_wakes.set()
        self._tidied.wait(min(2.0, left_s()))

    def _account_for_the_rest(self) -> None:
        left, lost = self._pipeline.give_up()
        if left:
            log.warning("not everything could be stored; it stays unacknowledged, the broker keeps it", messages=left)
        if lost:
            log.warning("messages of QoS 0 could not be stored and are lost", messages=lost)

    # -- the tender

    def _tend(self) -> None:
        every = (
            (0.0, self._raise_session),
            (1.0, self._sample),
            (1.0, self._note_subscriptions),
            (PROBE_EVERY_S, self._sink.probe),
            (REPORT_EVERY_S, self._report),
            (REPORT_EVERY_S, self._prune),
            (REPORT_EVERY_S, self._purge),
            (HOUSEKEEPING_EVERY_S, self._keep_house),
        )
        due_s = {action: time.monotonic() + min(pause_s, REPORT_EVERY_S) for pause_s, action in every}
        while not self._stopped.is_set():
            self._tender_wakes.wait(1.0)
            self._tender_wakes.clear()
            for pause_s, action in every:
                if time.monotonic() >= due_s[action]:
                    due_s[action] = time.monotonic() + pause_s
                    self._tend_to(action)
            if self._cut_off.is_set():
                self._cut_off.clear()
                self._tend_to(self._sink.probe)
            if self._tidy.is_set() and not self._tidied.is_set():
                self._tend_to(self._note_subscriptions)
                self._tend_to(self._prune)
                self._tidied.set()

    def _ask_who_owns_the_client_id(self) -> None:
        self._cut_off.set()
        self._tender_wakes.set()

    def _tend_to(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Fenced as error:
            self._fail(error)
        except (psycopg2.Error, BridgeError) as error:
            log.debug("housekeeping failed, to be tried again", error=str(error))
        except Exception:  # the tender must survive; the next round tries again
            log.exception("housekeeping failed for an unforeseen reason")

    def _sample(self) -> None:
        balance = self._pipeline.balance()
        self._rates.sample(time.monotonic(), received=balance.received, stored=balance.outcomes["stored"])

    def _raise_session(self) -> None:
        epoch = self._pipeline.session_to_raise
        if epoch is not None and self._sink.raise_session(epoch):
            self._pipeline.session_raised(epoch)

    def _note_subscriptions(self) -> None:
        filters = self._subscriber.subscriptions
        if filters != self._noted_subscriptions and self._pipeline.session_to_raise is None:
            self._sink.note_subscriptions(filters)
            self._noted_subscriptions = filters

    def _report(self) -> None:
        balance = self._pipeline.balance()
        log.info("account", received=balance.received, in_flight=balance.in_flight, **balance.outcomes)

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
        if not self._began_receiving:
            return
        days = self._settings.bridge_dead_letter_days
        purged = self._sink.run(lambda connection: dead_letters.purge_older_than(connection, days))
        if purged:
            log.info("old dead letters were deleted", count=purged, older_than_days=days)

    def _keep_house(self) -> None:
        if self._began_receiving and self._settings.db_auto_create:
            self._sink.run(lambda connection: schema.make_partitions(connection, datetime.now(UTC)))

    # -- how it is

    def status(self) -> dict[str, Any]:
        """What `/api/status` answers."""
        return self._status(self._pipeline.balance())

    def observe(self) -> Observation:
        """What `/metrics` is made from."""
        balance = self._pipeline.balance()
        return Observation(
            status=self._status(balance),
            balance=balance,
            retries=self._sink.retries,
            unproven_acks=self._acks.unproven,
            ready=not self.unready_reasons(),
            healthy=not self.unhealthy_reasons(),
        )

    def _status(self, balance: Balance) -> dict[str, Any]:
        broker = self._subscriber.state
        received_per_s, stored_per_s = self._rates.per_second()
        return {
            "state": self._state(),
            "reasons": self.unready_reasons(),
            "messages": {"received": balance.received, **balance.outcomes, "in_flight": balance.in_flight},
            "rows_stored": sum(balance.rows.values()),
            "rates": {"received_per_s": round(received_per_s, 1), "stored_per_s": round(stored_per_s, 1)},
            "latency_s": {"p50": balance.latency_p50_s, "p99": balance.latency_p99_s},
            "oldest_unacked_s": _age_s(balance.oldest_us),
            "queue": {"depth": balance.queue_depth, "size": self._settings.bridge_queue_size},
            "broker": {
                "connected": broker.connected,
                "session_present": broker.session_present,
                "client_id": self._settings.mqtt_client_id,
                "reconnects": broker.reconnects,
            },
            "database": {
                "connected": self._sink.reachable,
                "pool_in_use": self._connections.in_use,
                "pool_size": self._connections.size,
            },
            "spool": {"messages": 0, "bytes": 0},
            "uptime_s": round(time.monotonic() - self._began_s, 1),
            "version": __version__,
        }

    def _state(self) -> str:
        if self._stopping.is_set():
            return "draining"
        trouble = self._sink.trouble
        if trouble is not None and trouble.verdict in PAUSING:
            return "paused"
        return "running" if self._began_receiving else "starting"

    def unready_reasons(self) -> list[str]:
        """Why messages cannot flow from broker to database at the moment; empty when they can."""
        reasons = ["shutting down"] if self._stopping.is_set() else []
        trouble = self._sink.trouble
        if trouble is not None:
            reasons.append(str(trouble))
        elif not self._sink.reachable:
            reasons.append("the database has not answered yet")
        elif time.monotonic() - (self._sink.last_answer_s or 0.0) > SILENT_S:
            reasons.append("the database is silent: it neither answers nor refuses")
        if not self._began_receiving:
            reasons.append("not subscribed: the database comes first")
        elif not self._subscriber.state.subscribed:
            reasons.append(f"not subscribed: {self._subscriber.state.problem or 'waiting for the broker to confirm.'}")
        return reasons

    def unhealthy_reasons(self) -> list[str]:
        """Why this process should be restarted; empty through every outage of others."""
        reasons = self._dead_threads()
        # What an outage has held back is not to blame on the bridge until it has had the time to store it.
        age_s = min(_age_s(self._pipeline.balance().oldest_us), time.monotonic() - self._sink.trouble_ended_s)
        answered_s = self._sink.last_answer_s
        answers = answered_s is not None and time.monotonic() - answered_s < ANSWERED_WITHIN_S
        if age_s > STALLED_S and answers and self._sink.trouble is None:
            reasons.append(f"the oldest message has waited for {age_s:.0f} s although the database answers")
        return reasons

    def _dead_threads(self) -> list[str]:
        if not self._began_receiving or self._stopping.is_set():
            return []
        threads = {
            "the network thread is dead": self._subscriber.alive,
            "a worker thread is dead": self._pipeline.alive,
            "the tender thread is dead": self._tender.is_alive(),
            "the watchdog thread is dead": self._watchdog.is_alive(),
        }
        return [reason for reason, alive in threads.items() if not alive]


def _age_s(since_us: int | None) -> float:
    return 0.0 if since_us is None else max(0.0, round(time.time() - since_us / 1e6, 3))


def stacks() -> str:
    """The stacks of all threads, to be read by whoever asks why one of them hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
