"""The HTTP server, asked over real sockets."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from structlog.testing import capture_logs

from mqtt_bridge.errors import SettingsError
from mqtt_bridge.leash import Answer as Told
from mqtt_bridge.member import Sight
from mqtt_bridge.supervisor import _of_process
from mqtt_bridge.web import Web
from tests.observations import make_observation

ALL_PATHS = ["/", "/metrics", "/healthz", "/readyz", "/api/status"]
OPEN_PATHS = ["/healthz", "/readyz"]
GUARDED_PATHS = ["/", "/metrics", "/api/status"]


@dataclass
class Bridge:
    """A bridge as `Web` sees it: four callables, whose answers a test may change."""

    reasons_unhealthy: list[str] = field(default_factory=list)
    reasons_not_ready: list[str] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=lambda: {"state": "running", "messages": {"received": 7}})
    metrics_content: tuple[bytes, str] = (b"mqtt_bridge_up 1\n", "text/plain; version=0.0.4")

    def status(self) -> dict[str, Any]:
        return self.state

    def healthy(self) -> list[str]:
        return self.reasons_unhealthy

    def ready(self) -> list[str]:
        return self.reasons_not_ready

    def metrics(self) -> tuple[bytes, str]:
        return self.metrics_content


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def content(self) -> Any:
        return json.loads(self.body)


def make_web(bridge: Bridge | None = None, **changes: Any) -> Web:
    bridge = bridge or Bridge()
    options: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "token": None,
        "status": bridge.status,
        "healthy": bridge.healthy,
        "ready": bridge.ready,
        "metrics": bridge.metrics,
    }
    return Web(**options | changes)


@pytest.fixture
def bridge():
    return Bridge()


@pytest.fixture
def serve(bridge):
    """A function that starts a server of this bridge; every one is stopped at the end."""
    started: list[Web] = []

    def start(**changes: Any) -> Web:
        web = make_web(bridge, **changes)
        web.start()
        started.append(web)
        return web

    yield start
    for web in started:
        web.stop()


@pytest.fixture
def web(serve):
    return serve()


def ask(web: Web, path: str, *, method: str = "GET", headers: dict[str, str] | None = None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=10)
    try:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


def web_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("web")]


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_a_healthy_and_ready_bridge_says_so(web):
    health = ask(web, "/healthz")
    readiness = ask(web, "/readyz")

    assert (health.status, health.body) == (200, b'{"healthy":true,"reasons":[]}')
    assert (readiness.status, readiness.body) == (200, b'{"ready":true,"reasons":[]}')


def test_reasons_turn_health_and_readiness_into_503(web, bridge):
    bridge.reasons_unhealthy = ["a worker is dead"]
    bridge.reasons_not_ready = ["the broker is away", "the database is away"]

    health = ask(web, "/healthz")
    readiness = ask(web, "/readyz")

    assert (health.status, health.content) == (503, {"healthy": False, "reasons": ["a worker is dead"]})
    assert (readiness.status, readiness.content["reasons"]) == (503, ["the broker is away", "the database is away"])


def test_the_status_is_the_json_of_what_the_bridge_says(web, bridge):
    answer = ask(web, "/api/status")

    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.content == bridge.state


def test_the_metrics_are_passed_on_with_their_content_type(web, bridge):
    answer = ask(web, "/metrics")

    assert (answer.status, answer.body, answer.headers["Content-Type"]) == (200, *bridge.metrics_content)


def test_the_status_page_loads_nothing_from_elsewhere(web):
    answer = ask(web, "/")

    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"/api/status" in answer.body
    assert not re.search(rb"(src|href)=[\"']?(https?:)?//", answer.body)


def test_the_status_page_shows_of_each_process_what_the_supervisor_tells_of_it(web):
    page = ask(web, "/").body.decode()
    table = page[page.index("function showProcesses") : page.index("function show(status)")]

    read = set(re.findall(r"process\.([a-z_]+)", table))

    answer = Told(make_observation(), [])
    told = _of_process(Sight("hall-1", 4711, 0, answer, 0.0, failing=False))
    assert {"client_id", "state", "pid", "restarts", "rates", "messages"} == read
    assert read <= told.keys()
    assert told["messages"].keys() >= set(re.findall(r"process\.messages\?\.([a-z_]+)", table)) != set()


def test_the_content_policy_allows_exactly_the_script_and_the_style_of_the_page(web):
    answer = ask(web, "/")

    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    for directive, tag in [("script-src", b"script"), ("style-src", b"style")]:
        (inline,) = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), answer.body, re.DOTALL)
        assert policy[directive] == f"'sha256-{base64.b64encode(hashlib.sha256(inline).digest()).decode()}'"
    assert b' style="' not in answer.body
    assert not re.search(rb"<[^>]+ on[a-z]+=", answer.body)


@pytest.mark.parametrize("path", [*ALL_PATHS, "/nowhere"])
def test_no_answer_is_cached_or_sniffed(web, path):
    answer = ask(web, path)

    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ALL_PATHS)
def test_head_answers_like_get_without_the_body(web, path):
    get = ask(web, path)
    head = ask(web, path, method="HEAD")

    assert (head.status, head.body) == (200, b"")
    assert head.headers["Content-Length"] == str(len(get.body))
    assert head.headers["Content-Type"] == get.headers["Content-Type"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_are_refused(web, method):
    answer = ask(web, "/api/status", method=method)

    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/nowhere", "/healthz/", "/api", "/%00", "/../healthz", "/web/index.html"])
def test_an_unknown_path_is_a_404_in_json_that_names_the_pages(web, path):
    answer = ask(web, path)

    assert answer.status == 404
    assert answer.content["pages"] == ALL_PATHS


@pytest.mark.parametrize("path", OPEN_PATHS)
def test_probes_need_no_token(serve, path):
    web = serve(token="s3cret")

    assert ask(web, path).status == 200


@pytest.mark.parametrize("path", [*GUARDED_PATHS, "/nowhere"])
def test_everything_else_needs_the_token(serve, path):
    web = serve(token="s3cret")

    answer = ask(web, path)

    assert answer.status == 401
    schemes = [value.split(" ")[0] for value in answer.headers.get_all("WWW-Authenticate", [])]
    assert schemes == ["Basic", "Bearer"]


@pytest.mark.parametrize("path", GUARDED_PATHS)
@pytest.mark.parametrize(
    "authorization",
    ["Bearer s3cret:ü", "bearer s3cret:ü", "BEARER  s3cret:ü", basic("anybody", "s3cret:ü"), basic("", "s3cret:ü")],
)
def test_the_token_opens_as_bearer_and_as_the_password_of_any_user(serve, path, authorization):
    web = serve(token="s3cret:ü")

    answer = ask(web, path, headers={"Authorization": authorization.encode()})  # type: ignore[dict-item]

    assert answer.status == 200


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer s3cret2",
        "s3cret",
        "Digest s3cret",
        basic("s3cret", ""),
        basic("", "wrong"),
        "Basic s3cret",
        "Basic ====",
        "Basic \xff",
    ],
)
def test_nothing_but_the_token_opens(serve, authorization):
    web = serve(token="s3cret")

    answer = ask(web, "/api/status", headers={"Authorization": authorization})

    assert answer.status == 401


def test_an_empty_token_is_no_token(serve):
    web = serve(token="")

    assert ask(web, "/api/status").status == 200


def test_a_callable_that_raises_costs_one_answer_and_is_logged(serve):
    def fail() -> dict[str, Any]:
        raise RuntimeError("no luck")

    web = serve(status=fail)

    with capture_logs() as logs:
        answers = [ask(web, "/api/status") for _ in range(20)]

    assert [answer.status for answer in answers] == [500] * 20
    assert "no luck" not in answers[0].body.decode()
    errors = [entry for entry in logs if entry["log_level"] == "error"]
    assert [(entry["path"], entry["exc_info"]) for entry in errors] == [("/api/status", True)] * 20
    assert ask(web, "/healthz").status == 200


def test_a_status_that_is_no_json_costs_one_answer(web, bridge):
    bridge.state = {"state": object()}

    assert ask(web, "/api/status").status == 500
    assert ask(web, "/healthz").status == 200


def test_fifty_requests_at_once_are_all_answered(web, bridge):
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda i: ask(web, ALL_PATHS[i % len(ALL_PATHS)]), range(50)))

    assert [answer.status for answer in answers] == [200] * 50


def test_a_request_is_answered_while_another_is_being_made(serve):
    entered, leave = threading.Event(), threading.Event()

    def slow_status() -> dict[str, Any]:
        entered.set()
        assert leave.wait(10)
        return {}

    web = serve(status=slow_status)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, web, "/api/status")
        assert entered.wait(10)

        assert ask(web, "/healthz").status == 200

        leave.set()
        assert slow.result(10).status == 200


def test_clients_that_send_slowly_or_read_nothing_stop_nobody(serve):
    web = serve(metrics=lambda: (b"x" * 8_000_000, "text/plain"))
    slow = [socket.create_connection(("127.0.0.1", web.port)) for _ in range(20)]
    for sender in slow[:10]:
        sender.sendall(b"GET /healthz HTTP/1.1\r\nHost:")
    for reader in slow[10:]:
        reader.sendall(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n")

    answers = [ask(web, "/healthz") for _ in range(10)]

    assert [answer.status for answer in answers] == [200] * 10
    for sender in slow[:10]:
        sender.sendall(b" here\r\n\r\n")
        assert sender.recv(100).startswith(b"HTTP/1.1 200 ")
    for client in slow:
        client.close()


def test_garbage_on_the_socket_stops_nobody(web):
    for garbage in [
        b"\x16\x03\x01\x02\x00",
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/9.9\r\nA" + b"\xff" * 20_000 + b"\r\n\r\n",
    ]:
        with socket.create_connection(("127.0.0.1", web.port)) as client:
            client.sendall(garbage)

    assert ask(web, "/healthz").status == 200


def test_a_connection_serves_several_requests(web):
    connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=10)
    sockets = set()

    for path in ALL_PATHS:
        connection.request("GET", path)
        assert connection.getresponse().read()
        sockets.add(connection.sock)

    connection.close()
    assert len(sockets) == 1


def test_a_port_in_use_is_a_settings_error_that_names_the_setting(web):
    second = make_web(port=web.port)

    with pytest.raises(SettingsError) as caught:
        second.start()

    (problem,) = caught.value.problems
    assert (problem.setting, problem.value) == ("HTTP_PORT", str(web.port))
    second.stop()


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid", ""])
def test_an_address_that_cannot_be_bound_is_a_settings_error_that_names_the_setting(host):
    with pytest.raises(SettingsError) as caught:
        make_web(host=host).start()

    (problem,) = caught.value.problems
    assert (problem.setting, problem.value) == ("HTTP_HOST", host)


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0"])
def test_names_and_wildcards_are_listened_on(serve, host):
    web = serve(host=host)

    assert ask(web, "/healthz").status == 200


def test_the_threads_have_names_and_end_within_a_second_even_with_clients_connected():
    web = make_web()
    web.start()
    client = http.client.HTTPConnection("127.0.0.1", web.port, timeout=10)
    client.request("GET", "/healthz")
    assert client.getresponse().read()
    names = web_threads()

    begin = time.monotonic()
    web.stop()
    took_s = time.monotonic() - begin

    assert sorted(names) == ["web", "web-0", "web-1", "web-2", "web-3"]
    assert took_s < 1
    assert web_threads() == []
    assert client.sock.recv(1) == b""
    client.close()


def test_stop_does_not_wait_for_an_answer_that_never_comes():
    entered, leave = threading.Event(), threading.Event()

    def stuck() -> dict[str, Any]:
        entered.set()
        leave.wait(10)
        return {}

    web = make_web(status=stuck)
    web.start()
    client = socket.create_connection(("127.0.0.1", web.port))
    client.sendall(b"GET /api/status HTTP/1.1\r\nHost: here\r\n\r\n")
    assert entered.wait(10)
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("web-")]

    begin = time.monotonic()
    web.stop()
    took_s = time.monotonic() - begin

    assert took_s < 1
    assert client.recv(1) == b""
    client.close()
    leave.set()
    for worker in workers:
        worker.join(10)
    assert web_threads() == []


def test_start_and_stop_are_idempotent_and_the_port_is_free_again():
    never_started = make_web()
    never_started.stop()
    web = make_web()

    web.start()
    port = web.port
    web.start()
    assert web.port == port
    web.stop()
    web.stop()

    again = make_web(port=port)
    again.start()
    assert ask(again, "/healthz").status == 200
    again.stop()
