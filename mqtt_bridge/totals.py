"""The state of several processes as that of one bridge: sums where sums mean something, else the worst.

Every process counts since its own start, so a sum falls when one is started again; each account balances, and so does
their sum. Latencies are the worst of all processes: a quantile of quantiles would be none.

Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mqtt_bridge.account import OUTCOMES

_WORST_FIRST = ("paused", "starting", "draining", "running")

Status = Mapping[str, Any]


def total(parts: Sequence[Status], *, client_id: str) -> dict[str, Any]:
    """What `/api/status` answers, of `parts` together: but for `reasons`, `uptime_s` and `version`.

    `client_id` is MQTT_CLIENT_ID. Without any part: nothing yet, starting.
    """
    counts = ("received", *OUTCOMES, "in_flight")
    return {
        "state": worst_state(part["state"] for part in parts),
        "messages": {name: _sum(parts, "messages", name) for name in counts},
        "rows_stored": sum(part["rows_stored"] for part in parts),
        "rates": {name: round(_sum(parts, "rates", name), 1) for name in ("received_per_s", "stored_per_s")},
        "latency_s": {name: _most(parts, "latency_s", name) for name in ("p50", "p99")},
        "oldest_unacked_s": max((part["oldest_unacked_s"] for part in parts), default=0.0),
        "queue": {name: _sum(parts, "queue", name) for name in ("depth", "size")},
        "broker": {
            "connected": _all(parts, "broker", "connected"),
            "session_present": _all(parts, "broker", "session_present"),
            "client_id": client_id,
            "reconnects": _sum(parts, "broker", "reconnects"),
            # The broker's own count, which all of them read.
            "dropped": _most(parts, "broker", "dropped"),
        },
        "database": {
            "connected": _all(parts, "database", "connected"),
            "pool_in_use": _sum(parts, "database", "pool_in_use"),
            "pool_size": _sum(parts, "database", "pool_size"),
        },
        "spool": {
            "messages": _sum(parts, "spool", "messages"),
            "bytes": _sum(parts, "spool", "bytes"),
            "full": any(part["spool"]["full"] for part in parts),
            "damaged": _sum(parts, "spool", "damaged"),
        },
    }


def worst_state(states: Any) -> str:
    """The one that needs attention most; starting where there is none yet."""
    return min(states, key=_WORST_FIRST.index, default="starting")


def _sum(parts: Sequence[Status], group: str, name: str) -> Any:
    return sum(part[group][name] for part in parts)


def _all(parts: Sequence[Status], group: str, name: str) -> bool:
    return bool(parts) and all(part[group][name] for part in parts)


def _most(parts: Sequence[Status], group: str, name: str) -> Any:
    """The greatest that is known."""
    return max((part[group][name] for part in parts if part[group][name] is not None), default=None)
