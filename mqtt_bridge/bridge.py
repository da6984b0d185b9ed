"""Builds the bridge of its parts, starts and stops them in order.

Start: HTTP, so that the outside can see why it is not ready; the spool; database, schema and ownership of the client
id; workers and drainer; and only then the subscriber, for what the broker redelivers can be recognised only by who has
read the ledger and the spool.

Stop: leave new messages to the broker, drain the queue into the database (while that is away, into the spool where
there is one), have every PUBACK proven, disconnect. What cannot be done within `BRIDGE_SHUTDOWN_S` is left undone: it
was not acknowledged, and the broker keeps it.

Threads: `run` belongs to the main thread. `request_stop` may be called by any.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog

from mqtt_bridge.acks import AckTracker
from mqtt_bridge.batches import Batches
from mqtt_bridge.broker_limits import DropWatch
from mqtt_bridge.complaints import Complaint
from mqtt_bridge.connections import Connections
from mqtt_bridge.diversion import Diversion
from mqtt_bridge.drainer import Drainer
from mqtt_bridge.errors import BridgeError, Fenced, Problem, SettingsError, SpoolElsewhere
from mqtt_bridge.health import Health
from mqtt_bridge.last_resort import LastResort
from mqtt_bridge.ledger import BatchKeys, Ledger
from mqtt_bridge.metrics import Exposition, Observation
from mqtt_bridge.ownership import SpoolAtHand
from mqtt_bridge.pipeline import Limits, Pipeline
from mqtt_bridge.rates import Rates
from mqtt_bridge.retained import Retained
from mqtt_bridge.routes import Router, default_routes
from mqtt_bridge.settings import Settings
from mqtt_bridge.sink import Sink, Stopped
from mqtt_bridge.spool import FILE_NAME, NoSpool, Spool, SpoolError, SpoolInUse
from mqtt_bridge.subscriber import Subscriber
from mqtt_bridge.tender import Tender
from mqtt_bridge.watchdog import Watchdog, signs_of_life, stacks
from mqtt_bridge.web import Web

log = structlog.get_logger(__name__)

EXIT_OK, EXIT_FAILED, EXIT_SETTINGS, EXIT_FENCED = 0, 1, 2, 3

COLLECT_EVERY = 50_000
"""Objects made and not yet gone, after which the garbage collector has a look. Python's own 700 suit small programs."""
SPOOL_AGAIN_S = 1.0
"""A spool that another process uses is asked for again after this time."""
LEAVE_S = 5.0
"""Time kept back from the drain for having the acknowledgements proven, at most."""


def _relieve_the_collector() -> None:
    """Have the garbage collector look less often: at full load it takes a sixth of the CPU, and finds next to nothing.

    Messages and their rows are no cycles. What is made once, up to here, it need not look at again at all.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY)


def make_router(settings: Settings) -> Router:
    """The router that these settings ask for."""
    return Router(
        default_routes(",".join(settings.mqtt_topics)),
        max_values=settings.bridge_max_values,
        max_depth=settings.bridge_max_depth,
    )


def make_spool(settings: Settings) -> Spool | NoSpool:
    """The spool that these settings ask for; with BRIDGE_SPOOL=off one that is there, to be emptied."""
    directory = settings.bridge_spool_dir
    if directory is None or (settings.bridge_spool == "off" and not (directory / FILE_NAME).exists()):
        return NoSpool()
    return Spool(directory, client_id=settings.mqtt_client_id, max_bytes=settings.bridge_spool_max_mb << 20)


class Bridge:
    """One bridge: one client id, one subscriber, one pipeline, one sink."""

    def __init__(
        self,
        settings: Settings,
        *,
        abandoned_spool: str | None = None,
        unsubscribe: frozenset[str] | None = None,
        member_of: str | None = None,
        last_resort: LastResort | None = None,
    ) -> None:
        """`abandoned_spool`: the id of a spool that is given up, with what may wait in it.

        `member_of`: the MQTT_CLIENT_ID of the bridge that this one is a process of, to be noted; it may be its own.

        With `unsubscribe` it subscribes to nothing: it unsubscribes from these filters, and from those that the session
        is known to have, and stores what the session still holds.

        `last_resort` ends the process where a thread that hangs keeps `run` from coming to its end.
        """
        self._settings = settings
        self._abandoned_spool = abandoned_spool
        self._member_of = member_of
        self._router = make_router(settings)
        batches = Batches(self._router)
        self._connections = Connections(settings.dsn, size=settings.db_pool_size)
        self._sink = Sink(
            self._connections,
            client_id=settings.mqtt_client_id,
            statement_timeout_s=settings.db_statement_timeout_s,
        )
        self._spool = make_spool(settings)
        self._diversion = Diversion(
            self._sink, self._spool, mode=settings.bridge_spool, crowded=lambda: self._pipeline.crowded
        )
        self._acks = AckTracker()
        self._ledger = Ledger(redelivery=settings.mqtt_redelivery)
        self._retained = Retained.of(settings, self._router.filters)
        self._pipeline = Pipeline(
            batches,
            self._diversion,
            ledger=self._ledger,
            acks=self._acks,
            limits=Limits(
                workers=settings.bridge_workers,
                batch_size=settings.bridge_batch_size,
                batch_wait_s=settings.bridge_batch_wait_ms / 1000,
                queue_size=settings.bridge_queue_size,
                queue_bytes=settings.bridge_queue_mb << 20,
            ),
            linger_s=lambda: self._diversion.linger_s,
            wants_replay=self._retained.wants,
            on_fatal=self._fail,
            on_session_lost=lambda: self._tender.wake(),
        )
        self._drainer = Drainer(
            self._spool,
            self._diversion,
            self._sink,
            batches,
            on_drained=self._pipeline.drained,
            on_fatal=self._fail,
        )
        self._subscriber = Subscriber(
            settings,
            filters=self._router.filters if unsubscribe is None else (),
            inbox=self._pipeline,
            acks=self._acks,
            retained=self._retained,
            on_cut=lambda: self._tender.ask_for_the_owner(),
            unwanted=unsubscribe or frozenset(),
            drops=DropWatch(self._router.filters, asks=unsubscribe is None),
        )
        self._rates = Rates()
        self._tender = Tender(
            settings,
            sink=self._sink,
            pipeline=self._pipeline,
            subscriber=self._subscriber,
            retained=self._retained,
            rates=self._rates,
            on_fenced=self._fail,
        )
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._began_receiving = False
        self._watchdog = self._make_watchdog(last_resort or LastResort())
        self._health = Health(
            settings,
            pipeline=self._pipeline,
            sink=self._sink,
            subscriber=self._subscriber,
            connections=self._connections,
            acks=self._acks,
            rates=self._rates,
            spool=self._spool,
            threads={
                "the network thread is dead": lambda: self._subscriber.alive,
                "a worker thread is dead": lambda: self._pipeline.alive,
                "the drainer thread is dead": lambda: self._drainer.alive,
                "the tender thread is dead": lambda: self._tender.alive,
                "the watchdog thread is dead": lambda: self._watchdog.alive,
            },
            stuck=lambda: self._watchdog.reasons,
            receiving=lambda: self._began_receiving,
            stopping=self._stopping.is_set,
        )
        self._web = Web(
            host=settings.http_host,
            port=settings.http_port,
            token=settings.http_token.get_secret_value() if settings.http_token else None,
            status=self._health.status,
            healthy=self._health.unhealthy_reasons,
            ready=self._health.unready_reasons,
            metrics=Exposition(self._health.observe).render,
        )

    def _make_watchdog(self, last_resort: LastResort) -> Watchdog:
        settings = self._settings
        signs = signs_of_life(
            subscriber=self._subscriber,
            pipeline=self._pipeline,
            acks=self._acks,
            sink=self._sink,
            steps=lambda worker: (self._connections.steps(worker), self._diversion.turns(worker)),
            drainer=lambda: (
                (self._drainer.turns, self._connections.steps(self._drainer.ident or 0))
                if self._spool.messages
                else None
            ),
            tender=lambda: (self._tender.turns, self._connections.steps(self._tender.ident or 0)),
            statement_timeout_s=settings.db_statement_timeout_s,
            batch_wait_s=settings.bridge_batch_wait_ms / 1000,
        )
        return Watchdog(
            signs,
            sink=self._sink,
            connections=self._connections,
            dead_threads=lambda: self._health.dead_threads(),
            watching=lambda: self._began_receiving,
            leaving=self._stopping.is_set,
            leave_within_s=settings.bridge_shutdown_s,
            stopped=self._stopped,
            fail=lambda reason: self._fail(BridgeError(reason)),
            last_resort=last_resort,
        )

    def status(self) -> dict[str, Any]:
        """What `/api/status` answers."""
        return self._health.status()

    def observe(self) -> Observation:
        """What `/metrics` is made from."""
        return self._health.observe()

    def unhealthy(self) -> list[str]:
        """Why this process should be restarted."""
        return self._health.unhealthy_reasons()

    @property
    def owner_epoch(self) -> int:
        """Under which this process owns its client id; 0 before it does."""
        return self._sink.owner_epoch

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
        except (Fenced, SettingsError, SpoolElsewhere) as error:
            self._fail(error)
        except Exception as error:  # the supervisor must see the end, not a process that hangs with half its threads
            log.critical("the bridge failed for an unforeseen reason", exc_info=True)
            self._fail(error)
        self._shut_down()
        return self._exit_code()

    def _start(self) -> None:
        self._open_spool()
        claim = self._sink.open(
            create=self._settings.db_auto_create, spool=self._spool_at_hand(), member_of=self._member_of
        )
        self._ledger.load(claim, self._spool.entries())
        self._pipeline.found_in_spool(self._spool.messages)
        self._subscriber.subscriptions = claim.subscriptions
        self._retained.load(claim.retained)
        self._tender.begin(claim)
        log.info(
            "the database is ready",
            client_id=self._settings.mqtt_client_id,
            owner_epoch=claim.owner_epoch,
            unproven_batches=len(claim.entries),
        )
        _relieve_the_collector()
        self._pipeline.start()
        self._drainer.start()
        self._subscriber.start()
        self._began_receiving = True

    def _open_spool(self) -> None:
        """Take the spool's directory; while a predecessor is still using it, wait for its end."""
        complaint = Complaint()
        while True:
            try:
                return self._spool.open()
            except SpoolInUse as error:
                if complaint.is_news(str(error)):
                    log.warning(f"{error}", consequence="waiting until it is free; the broker keeps the messages")
            except SpoolError as error:
                directory = str(self._settings.bridge_spool_dir)
                raise SettingsError(
                    [Problem("BRIDGE_SPOOL_DIR", directory, "It cannot be used.", f"{error}")]
                ) from error
            if self._stopping.wait(SPOOL_AGAIN_S):
                raise Stopped("the bridge stopped before its spool was free")

    def _spool_at_hand(self) -> SpoolAtHand:
        keys, owner_epoch, session_epoch = BatchKeys(), 0, 1
        for entry in self._spool.entries():
            keys.add(entry.key)
            owner_epoch = max(owner_epoch, entry.key.owner_epoch)
            session_epoch = max(session_epoch, entry.session_epoch)
        wanted = self._settings.bridge_spool != "off" or self._spool.messages > 0
        return SpoolAtHand(
            id=self._spool.id if wanted else None,
            accepts=frozenset(name for name in (self._spool.id, self._abandoned_spool) if name),
            keys=keys,
            owner_epoch=owner_epoch,
            session_epoch=session_epoch,
        )

    def request_stop(self) -> None:
        """Begin to shut down. Safe in a signal handler: it only sets events."""
        self._stopping.set()
        if not self._began_receiving:
            self._sink.stop()  # nothing to drain: do not wait for the database

    def _fail(self, error: BaseException) -> None:
        """End the bridge because of `error`; called by any thread."""
        if self._failure is None:
            self._failure = error
        if isinstance(error, Fenced | SettingsError | SpoolElsewhere):
            log.error(f"{error}; stopping", client_id=self._settings.mqtt_client_id)
            self._give_up_storing()
        self._stopping.set()

    def _give_up_storing(self) -> None:
        self._sink.stop()
        self._diversion.stop()

    def _exit_code(self) -> int:
        if self._failure is None:
            return EXIT_OK
        if isinstance(self._failure, SettingsError | SpoolElsewhere):
            return EXIT_SETTINGS
        return EXIT_FENCED if isinstance(self._failure, Fenced) else EXIT_FAILED

    def _shut_down(self) -> None:
        deadline_s = time.monotonic() + self._settings.bridge_shutdown_s

        def left_s() -> float:
            return max(0.0, deadline_s - time.monotonic())

        log.info("stopping", in_flight=self._pipeline.balance().in_flight)
        self._subscriber.stop_taking_in()
        if self._began_receiving and self._failure is None:
            self._leave_in_good_order(left_s)
        self._give_up_storing()
        self._subscriber.stop(left_s())
        workers_ended = self._pipeline.stop(max(1.0, left_s()))
        if not workers_ended:
            log.warning("a worker hangs; its batch is left to the broker", stack=stacks())
        if self._drainer.stop(max(1.0, left_s())) and workers_ended:
            self._leave_the_spool()
        self._account_for_the_rest()
        self._stopped.set()
        self._tender.stop()
        self._connections.close()
        self._web.stop()
        log.info("stopped", **self._pipeline.balance().outcomes)

    def _leave_in_good_order(self, left_s: Callable[[], float]) -> None:
        """Drain, have the acknowledgements proven, disconnect, tidy up; each for as long as there is time left."""
        keep_back_s = min(LEAVE_S, self._settings.bridge_shutdown_s / 4)
        self._diversion.hurry()
        self._pipeline.drain(max(0.0, left_s() - keep_back_s))
        if not self._subscriber.leave(left_s() * 0.8):
            log.warning("the broker has not confirmed the last acknowledgements; the ledger will recognise them")
        self._diversion.wait_until_empty(left_s() * 0.8)
        self._tender.tidy_up(min(2.0, left_s()))

    def _leave_the_spool(self) -> None:
        """Nobody uses it any more. Without messages in it, a successor can do without its disk.

        After a failure it can not: that may have left a batch there of which nobody knows.
        """
        in_good_order = self._began_receiving and self._failure is None
        if self._spool.messages:
            log.info("messages stay in the spool for the next start", messages=self._spool.messages)
        elif self._spool.id and in_good_order and self._sink.reachable:
            self._tender.attempt(self._sink.release_spool)
        self._spool.close()

    def _account_for_the_rest(self) -> None:
        left, lost = self._pipeline.give_up()
        if left:
            log.warning("not everything could be stored; it stays unacknowledged, the broker keeps it", messages=left)
        if lost:
            log.warning("messages of QoS 0 could not be stored and are lost", messages=lost)
