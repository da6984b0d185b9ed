"""What a bridge says of itself, made up: for whoever adds it up or shows it."""

from __future__ import annotations

from typing import Any

from mqtt_bridge.account import OUTCOMES, Balance
from mqtt_bridge.metrics import Observation


def make_balance(*, received: int = 0, in_flight: int = 0, **outcomes: int) -> Balance:
    """An account that balances where the numbers do."""
    return Balance(
        received=received,
        outcomes=dict.fromkeys(OUTCOMES, 0) | outcomes,
        in_flight=in_flight,
        queue_depth=in_flight,
        queue_bytes=100 * in_flight,
        oldest_us=None,
        rows={"readings": outcomes.get("stored", 0)},
        ignored={},
        dead_letters={},
        repairs={},
        batches=1,
        latency_p50_s=None,
        latency_p99_s=None,
    )


def make_status(balance: Balance, **changes: Any) -> dict[str, Any]:
    """What `/api/status` answers, with these keys replaced."""
    return {
        "state": "running",
        "reasons": [],
        "messages": {"received": balance.received, **balance.outcomes, "in_flight": balance.in_flight},
        "rows_stored": sum(balance.rows.values()),
        "rates": {"received_per_s": 10.0, "stored_per_s": 9.5},
        "latency_s": {"p50": None, "p99": None},
        "oldest_unacked_s": 0.0,
        "queue": {"depth": balance.queue_depth, "size": 20_000},
        "broker": {
            "connected": True,
            "session_present": True,
            "client_id": "hall-1",
            "reconnects": 0,
            "dropped": None,
        },
        "database": {"connected": True, "pool_in_use": 1, "pool_size": 4},
        "spool": {"messages": 0, "bytes": 0, "full": False, "damaged": 0},
        "uptime_s": 1.0,
        "version": "0.1.0",
    } | changes


def make_observation(balance: Balance | None = None, **changes: Any) -> Observation:
    """The state at one moment; `changes` are to the status."""
    balance = balance or make_balance()
    status = make_status(balance, **changes)
    return Observation(status=status, balance=balance, retries=2, unproven_acks=3, ready=True, healthy=True)
