"""`fetch` and `render`: what a running bridge says, and what is said when none is running."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from mqtt_bridge.tools.status import NoStatus, duration, fetch, render, span
from mqtt_bridge.web import Web

STATUS: dict[str, Any] = {
    "state": "paused",
    "reasons": ["the database is away: connection refused"],
    "messages": {
        "received": 12_345,
        "stored": 12_300,
        "duplicate": 5,
        "dead_lettered": 0,
        "ignored": 0,
        "spooled": 0,
        "dropped": 0,
        "in_flight": 40,
    },
    "rows_stored": 49_200,
    "rates": {"received_per_s": 200.04, "stored_per_s": 0},
    "latency_s": {"p50": 0.0064, "p99": None},
    "oldest_unacked_s": 3.21,
    "queue": {"depth": 40, "size": 20_000},
    "broker": {"connected": True, "session_present": False, "client_id": "hall-7", "reconnects": 2, "dropped": 3},
    "database": {"connected": False, "pool_in_use": 1, "pool_size": 4},
    "spool": {"messages": 0, "bytes": 0},
    "uptime_s": 93_784.2,
    "version": "0.1.0",
}


@contextmanager
def running(*, token: str | None = None, reasons: tuple[str, ...] = (), metrics: bytes = b"") -> Iterator[Web]:
    web = Web(
        host="127.0.0.1",
        port=0,
        token=token,
        status=lambda: STATUS,
        healthy=lambda: list(reasons),
        ready=lambda: list(reasons),
        metrics=lambda: (metrics, "text/plain"),
    )
    web.start()
    try:
        yield web
    finally:
        web.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_the_status_of_a_running_bridge_is_fetched_where_it_listens(host):
    with running() as web:
        assert fetch(host, web.port) == STATUS


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    with running() as web:
        assert fetch("127.0.0.1", web.port) == STATUS


def test_a_readiness_of_503_is_an_answer():
    with running(reasons=("not subscribed",)) as web:
        assert fetch("127.0.0.1", web.port, path="/readyz") == {"ready": False, "reasons": ["not subscribed"]}


def test_the_token_opens():
    with running(token="s3cret ü") as web:
        assert fetch("127.0.0.1", web.port, token="s3cret ü") == STATUS


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_wrong_token_names_the_setting_and_not_the_token(token):
    with running(token="s3cret") as web:
        with pytest.raises(NoStatus, match="HTTP_TOKEN") as caught:
            fetch("127.0.0.1", web.port, token=token)

    assert "wrong" not in str(caught.value)


def test_nobody_there_names_the_settings():
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]

    with pytest.raises(NoStatus, match="HTTP_HOST and HTTP_PORT") as caught:
        fetch("127.0.0.1", port)

    assert f"http://127.0.0.1:{port}/" in str(caught.value)
    assert "refused" in str(caught.value)


def test_a_host_that_does_not_exist_names_the_settings():
    with pytest.raises(NoStatus, match="HTTP_HOST and HTTP_PORT"):
        fetch("no-such-host.invalid", 8080)


@pytest.mark.parametrize("path", ["/", "/metrics", "/nowhere"])
def test_something_else_that_answers_is_no_bridge(path):
    with running(metrics=b"[1]") as web:
        with pytest.raises(NoStatus, match="HTTP_HOST and HTTP_PORT"):
            fetch("127.0.0.1", web.port, path=path)


def test_the_view_shows_state_reasons_and_account():
    assert render(STATUS).splitlines() == [
        "mqtt-bridge 0.1.0, client id hall-7: paused, up 1 d 2 h",
        "  ! the database is away: connection refused",
        "  messages  12,345 received = 12,300 stored + 5 duplicate + 40 in flight",
        "  rates     200.0 received and 0.0 stored per second",
        "  latency   6.4 ms median, - at the 99th percentile",
        "  waiting   oldest unacknowledged message: 3.2 s",
        "  queue     40 of 20,000 messages",
        "  broker    connected, new session, 2 reconnects, 3 messages dropped since its start (of any client)",
        "  database  AWAY, 1 of 4 connections in use, 49,200 rows stored",
        "  spool     empty",
    ]


def test_several_processes_are_shown_in_a_table_below_the_sums():
    processes = [
        {"client_id": "hall-1", "pid": 4711, "restarts": 0, **STATUS, "state": "running"},
        {"client_id": "hall-2", "pid": 4712, "restarts": 1_000, "state": None, "reasons": ["its process ..."]},
        {"client_id": "hall-10", "pid": None, "restarts": 7, "state": None, "reasons": ["its process ..."]},
    ]

    assert render(STATUS | {"processes": processes}).splitlines()[10:] == [
        "  process      state   pid  restarts  received/s  stored  in flight",
        "  hall-1     running  4711         0       200.0  12,300         40",
        "  hall-2   NO ANSWER  4712     1,000           -       -          -",
        "  hall-10      ENDED     -         7           -       -          -",
    ]


def test_a_filled_spool_is_shown_with_its_size():
    spooled = STATUS | {"spool": {"messages": 1_500, "bytes": 3 * 1_048_576}, "oldest_unacked_s": 0}

    assert "  spool     1,500 messages, 3.0 MiB" in render(spooled)
    assert "  waiting   oldest unacknowledged message: -" in render(spooled)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.00042, "0.42 ms"), (0.0213, "21.3 ms"), (0.9, "900 ms"), (1, "1.0 s"), (200, "3 min 20 s")],
)
def test_durations_are_written_as_people_do(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.9, "7 s"), (61, "1 min 1 s"), (3 * 3600 + 65, "3 h 1 min"), (86_400, "1 d 0 h")]
)
def test_spans_are_written_by_their_two_largest_units(seconds, text):
    assert span(seconds) == text


@pytest.mark.parametrize("garbage", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
def test_a_server_that_speaks_something_else_names_the_settings(garbage):
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(fetch, "127.0.0.1", server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            connection.recv(10_000)
            connection.sendall(garbage)

        with pytest.raises(NoStatus, match="HTTP_HOST and HTTP_PORT"):
            asked.result(10)
