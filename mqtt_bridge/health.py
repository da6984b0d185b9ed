"""How the bridge is: what `/api/status` and `/metrics` tell, and why it is not ready or not healthy.

Not ready is what keeps messages from flowing, whoever is to blame. Not healthy is what only a restart can mend: no
outage of the broker or the database ever is.

Nothing here changes anything. Any thread may ask: what the parts are asked for, they guard themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mqtt_bridge import __version__
from mqtt_bridge.account import Balance
from mqtt_bridge.acks import AckTracker
from mqtt_bridge.connections import Connections
from mqtt_bridge.errors import PAUSING
from mqtt_bridge.metrics import Observation
from mqtt_bridge.pipeline import Pipeline
from mqtt_bridge.rates import Rates
from mqtt_bridge.settings import Settings
from mqtt_bridge.sink import SILENCE_S, Sink
from mqtt_bridge.spool import NoSpool, Spool
from mqtt_bridge.subscriber import Subscriber


class Health:
    """Tells how the parts of one bridge are."""

    def __init__(
        self,
        settings: Settings,
        *,
        pipeline: Pipeline,
        sink: Sink,
        subscriber: Subscriber,
        connections: Connections,
        acks: AckTracker,
        rates: Rates,
        spool: Spool | NoSpool,
        threads: Mapping[str, Callable[[], bool]],
        stuck: Callable[[], Sequence[str]],
        receiving: Callable[[], bool],
        stopping: Callable[[], bool],
    ) -> None:
        """`threads`: whether each lives, as all should from `receiving` to `stopping`, by the reason if it does not.

        `stuck`: what the watchdog has found.
        """
        self._settings = settings
        self._pipeline = pipeline
        self._sink = sink
        self._subscriber = subscriber
        self._connections = connections
        self._acks = acks
        self._rates = rates
        self._spool = spool
        self._threads = threads
        self._stuck = stuck
        self._receiving = receiving
        self._stopping = stopping
        self._began_s = time.monotonic()

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
                "dropped": broker.dropped,
            },
            "database": {
                "connected": self._sink.reachable,
                "pool_in_use": self._connections.in_use,
                "pool_size": self._connections.size,
            },
            "spool": {
                "messages": self._spool.messages,
                "bytes": self._spool.bytes,
                "full": self._spool.full,
                "damaged": self._spool.damaged,
            },
            "uptime_s": round(time.monotonic() - self._began_s, 1),
            "version": __version__,
        }

    def _state(self) -> str:
        if self._stopping():
            return "draining"
        trouble = self._sink.trouble
        if trouble is not None and trouble.verdict in PAUSING:
            return "paused"
        return "running" if self._receiving() else "starting"

    def unready_reasons(self) -> list[str]:
        """Why messages cannot flow from broker to database at the moment; empty when they can."""
        reasons = ["shutting down"] if self._stopping() else []
        trouble = self._sink.trouble
        if trouble is not None:
            reasons.append(str(trouble))
        elif not self._sink.reachable:
            reasons.append("the database has not answered yet")
        elif time.monotonic() - (self._sink.answered_s or 0.0) > SILENCE_S:
            reasons.append("the database is silent: it neither answers nor refuses")
        if self._spool.full:
            reasons.append("the spool is full: messages are held, see BRIDGE_SPOOL_MAX_MB and its disk")
        if not self._receiving():
            reasons.append("not subscribed: the database comes first")
        elif not self._subscriber.state.subscribed:
            reasons.append(f"not subscribed: {self._subscriber.state.problem or 'waiting for the broker to confirm.'}")
        return reasons

    def unhealthy_reasons(self) -> list[str]:
        """Why this process should be restarted; empty through every outage of others.

        Takes no lock: it answers also where a thread hangs with one.
        """
        return [*self.dead_threads(), *self._stuck()]

    def dead_threads(self) -> list[str]:
        """Of the threads that should live now, those that do not, each as a reason."""
        if not self._receiving() or self._stopping():
            return []
        return [reason for reason, alive in self._threads.items() if not alive()]


def _age_s(since_us: int | None) -> float:
    return 0.0 if since_us is None else max(0.0, round(time.time() - since_us / 1e6, 3))
