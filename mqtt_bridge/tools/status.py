"""Asks a running bridge for its state over HTTP, and shows the answer to a person.

Both are plain functions; the caller's thread waits for the answer.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Sequence
from http import HTTPStatus
from http.client import HTTPException
from typing import Any

import orjson

from mqtt_bridge.errors import BridgeError

TIMEOUT_S = 5.0

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
"""Addresses to listen on that are none to connect to, and where to find such a server on this machine."""

_ANSWERS = frozenset({HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE})
"""503 is how `/healthz` and `/readyz` say no: an answer like any other."""


class NoStatus(BridgeError):
    """No bridge answered, or not as one does. The message says where it was asked, and what to do."""


def fetch(host: str, port: int, *, token: str | None = None, path: str = "/api/status") -> dict[str, Any]:
    """The JSON that a running bridge answers on `path`; NoStatus where it does not answer."""
    url = f"{_address(host, port)}{path}"
    status, body = _get(url, token)
    if status == HTTPStatus.UNAUTHORIZED:
        raise NoStatus(f"The bridge at {url} asks for another token. Set HTTP_TOKEN to the one it was started with.")
    if status not in _ANSWERS:
        raise NoStatus(
            f"{url} answered {status}. Its log says why, if that is a bridge: check HTTP_HOST and HTTP_PORT."
        )
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict):
        raise NoStatus(f"What answers at {url} is no bridge. Check HTTP_HOST and HTTP_PORT.")
    return answer


def render(status: dict[str, Any]) -> str:
    """The answer of `/api/status` as text for a terminal: one aligned line a subject, reasons first."""
    broker = status["broker"]
    title = f"mqtt-bridge {status['version']}, client id {broker['client_id']}"
    lines = [f"{title}: {status['state']}, up {span(status['uptime_s'])}"]
    lines += [f"  ! {reason}" for reason in status["reasons"]]
    lines += [f"  {name:<10}{text}" for name, text in _subjects(status)]
    lines += _table(status.get("processes", []))
    return "\n".join(lines)


def _table(processes: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each of several processes."""
    if not processes:
        return []
    rows = [_HEADER, *map(_row, processes)]
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [f"  {row[0]:<{first}}  {'  '.join(map(str.rjust, row[1:], others))}" for row in rows]


_HEADER: tuple[str, ...] = ("process", "state", "pid", "restarts", "received/s", "stored", "in flight")


def _row(process: dict[str, Any]) -> tuple[str, ...]:
    first = (process["client_id"], process["state"] or ("NO ANSWER" if process["pid"] else "ENDED"))
    counted = (str(process["pid"] or "-"), f"{process['restarts']:,}")
    if process["state"] is None:
        return (*first, *counted, "-", "-", "-")
    messages = process["messages"]
    rate = f"{process['rates']['received_per_s']:,.1f}"
    return (*first, *counted, rate, f"{messages['stored']:,}", f"{messages['in_flight']:,}")


def duration(seconds: float | None) -> str:
    """A short time as people write it: `6.4 ms`, `2.1 s`; `-` where there is none."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 120 else span(seconds)


def span(seconds: float) -> str:
    """A long time by its two largest units: `1 d 2 h`, `3 min 20 s`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _address(host: str, port: int) -> str:
    reachable = _WILDCARDS.get(host, host)
    return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{port}"


def _get(url: str, token: str | None) -> tuple[int, bytes]:
    request = urllib.request.Request(url)
    if token:
        # Encoded here because urllib would insist on latin-1; WSGI hands the bytes through.
        request.add_header("Authorization", f"Bearer {token}".encode().decode("latin-1"))
    # A proxy of the environment would be asked for 127.0.0.1, and would find itself there.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except (OSError, HTTPException) as error:
        cause = getattr(error, "reason", None) or error
        reason = getattr(cause, "strerror", None) or cause
        raise NoStatus(
            f"No bridge answers at {url}: {reason}. Is it running, with HTTP on (HTTP_PORT is not 0)?"
            " HTTP_HOST and HTTP_PORT have to be the ones it was started with."
        ) from error


def _subjects(status: dict[str, Any]) -> list[tuple[str, str]]:
    rates, latency, queue = status["rates"], status["latency_s"], status["queue"]
    return [
        ("messages", _account(status["messages"])),
        ("rates", f"{rates['received_per_s']:,.1f} received and {rates['stored_per_s']:,.1f} stored per second"),
        ("latency", f"{duration(latency['p50'])} median, {duration(latency['p99'])} at the 99th percentile"),
        ("waiting", f"oldest unacknowledged message: {duration(status['oldest_unacked_s'] or None)}"),
        ("queue", f"{queue['depth']:,} of {queue['size']:,} messages"),
        ("broker", _broker(status["broker"])),
        ("database", _database(status)),
        ("spool", _spool(status["spool"])),
    ]


def _account(messages: dict[str, int]) -> str:
    """Every outcome that is not zero, after the two that always matter."""
    rest = [name for name in messages if name not in ("received", "stored") and messages[name]]
    shown = [f"{messages[name]:,} {name.replace('_', ' ')}" for name in ("received", "stored", *rest)]
    return f"{shown[0]} = {' + '.join(shown[1:])}"


def _broker(broker: dict[str, Any]) -> str:
    session = "session resumed" if broker["session_present"] else "new session"
    dropped = f", {broker['dropped']:,} messages dropped since its start (of any client)" if broker["dropped"] else ""
    return f"{_presence(broker)}, {session}, {broker['reconnects']:,} reconnects{dropped}"


def _database(status: dict[str, Any]) -> str:
    database = status["database"]
    pool = f"{database['pool_in_use']} of {database['pool_size']} connections in use"
    return f"{_presence(database)}, {pool}, {status['rows_stored']:,} rows stored"


def _spool(spool: dict[str, int]) -> str:
    return f"{spool['messages']:,} messages, {spool['bytes'] / 1_048_576:,.1f} MiB" if spool["messages"] else "empty"


def _presence(peer: dict[str, Any]) -> str:
    return "connected" if peer["connected"] else "AWAY"
