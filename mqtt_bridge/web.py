"""HTTP: the status page, metrics, health and readiness.

One thread (`web`) moves bytes, a few workers (`web-0` ...) answer requests, so a slow client holds up nobody. Nothing
here changes the bridge: every answer is made by a callable that only reads, and a callable that raises costs one
answer (500, with the exception in the log), never the server.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import hmac
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from importlib import resources
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import orjson
import structlog
import waitress  # type: ignore[import-untyped]
from waitress import wasyncore

from mqtt_bridge.errors import Problem, SettingsError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

log = structlog.get_logger(__name__)

WORKERS = 4
IDLE_CONNECTION_S = 30
"""A connection that asks for nothing is closed after this; Prometheus and the status page ask more often."""
MAX_HEADER_BYTES = 16_384
MAX_BODY_BYTES = 1_024
"""No request needs a body; one this long is refused by waitress (413)."""
MAX_ANSWER_BYTES = 16_777_216
STOP_S = 0.5
"""How long `stop` waits for answers that are being made."""

_OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""What orchestrators ask, who have no token: these answers hold no data."""

_HEADERS = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


class Web:
    """The HTTP server of one bridge. `start` and `stop` belong to one thread; the callables run in the workers."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        token: str | None,
        status: Callable[[], dict[str, Any]],
        healthy: Callable[[], list[str]],
        ready: Callable[[], list[str]],
        metrics: Callable[[], tuple[bytes, str]],
    ) -> None:
        """Take the callables that make the answers; nothing is opened before `start`.

        `port` 0 takes a free one. `healthy` and `ready` return the reasons why not (empty: all is well), `metrics`
        a body and its content type. With a `token` everything but `/healthz` and `/readyz` asks for it.
        """
        self._host = host
        self._port = port
        self._token = token.encode() if token else None
        self._status = status
        self._healthy = healthy
        self._ready = ready
        self._metrics = metrics
        self._page = _load_page()
        self._endpoints: dict[str, Callable[[], _Answer]] = {
            "/": self._answer_page,
            "/metrics": self._answer_metrics,
            "/healthz": self._answer_healthy,
            "/readyz": self._answer_ready,
            "/api/status": self._answer_status,
        }
        self._server: _Server | None = None

    @property
    def port(self) -> int:
        """The port that is listened on; before `start`, the one that was asked for."""
        return self._server.port if self._server else self._port

    def start(self) -> None:
        """Listen and answer. SettingsError, naming HTTP_PORT or HTTP_HOST, where that is not possible."""
        if self._server is None:
            self._server = _Server(_listen(self._host, self._port), self._application)
            log.info("the status page is up", url=self._url())

    def stop(self) -> None:
        """Close every connection and end the threads, within a second. Does nothing when not started."""
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def _url(self) -> str:
        return f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{self.port}/"

    def _application(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answer = self._answer(environ)
        start_response(
            f"{answer.status.value} {answer.status.phrase}",
            [
                ("Content-Type", answer.content_type),
                ("Content-Length", str(len(answer.body))),
                *_HEADERS,
                *answer.headers,
            ],
        )
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer.body]

    def _answer(self, environ: WSGIEnvironment) -> _Answer:
        path = environ["PATH_INFO"]
        if path not in _OPEN_PATHS and not self._is_allowed(environ.get("HTTP_AUTHORIZATION", "")):
            return _UNAUTHORIZED
        endpoint = self._endpoints.get(path)
        if endpoint is None:
            return _json(HTTPStatus.NOT_FOUND, {"error": "there is no such page", "pages": list(self._endpoints)})
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _NOT_ALLOWED
        try:
            return endpoint()
        except Exception:
            log.exception("no answer could be made: the client gets a 500, the bridge goes on", path=path)
            return _json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "no answer could be made: see the bridge's log"})

    def _is_allowed(self, authorization: str) -> bool:
        if self._token is None:
            return True
        return hmac.compare_digest(_presented_token(authorization), self._token)

    def _answer_page(self) -> _Answer:
        return self._page

    def _answer_metrics(self) -> _Answer:
        body, content_type = self._metrics()
        return _Answer(HTTPStatus.OK, body, content_type)

    def _answer_healthy(self) -> _Answer:
        return _verdict("healthy", self._healthy())

    def _answer_ready(self) -> _Answer:
        return _verdict("ready", self._ready())

    def _answer_status(self) -> _Answer:
        return _json(HTTPStatus.OK, self._status())


class _Server:
    """A waitress server with the threads it needs, running from construction until `stop`."""

    def __init__(
        self, listener: socket.socket, application: Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]
    ) -> None:
        self.port: int = listener.getsockname()[1]
        self._workers = _Workers(WORKERS)
        self._sockets: dict[int, Any] = {}
        # waitress's own dispatcher gives no hold on its threads and warns about every short queue.
        self._server = waitress.create_server(
            application,
            map=self._sockets,
            _dispatcher=self._workers,
            sockets=[listener],
            ident="mqtt-bridge",
            log_socket_errors=False,
            channel_timeout=IDLE_CONNECTION_S,
            cleanup_interval=IDLE_CONNECTION_S // 3,
            # Never a temporary file: the container's file system may be read-only.
            outbuf_overflow=MAX_ANSWER_BYTES,
            max_request_header_size=MAX_HEADER_BYTES,
            max_request_body_size=MAX_BODY_BYTES,
            # select() fails for descriptors over 1023.
            asyncore_use_poll=True,
        )
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="web", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        wake = self._server.trigger.pull_trigger
        if not self._workers.stop(timeout_s=STOP_S):
            log.warning("an HTTP request is still being answered: its connection is closed without the answer")
            # That worker would wake the loop through a descriptor that may be somebody else's by then.
            self._server.pull_trigger = _do_nothing
        wake(self._close_all)
        self._thread.join(STOP_S)

    def _close_all(self) -> None:
        for connection in list(self._server.active_channels.values()):
            connection.handle_close()
        wasyncore.close_all(self._sockets, ignore_all=True)

    def _run(self) -> None:
        while self._sockets:
            try:
                self._server.run()
            except Exception:
                log.exception("the HTTP server stumbled: it goes on in a second")
                self._stopping.wait(1)


class _Workers:
    """The threads that answer requests; what waitress calls a task dispatcher."""

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        # Daemons: a callable that never returns must not keep the program from ending.
        self._threads = [threading.Thread(target=self._run, name=f"web-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def add_task(self, task: Any) -> None:
        """Called by waitress for every connection that has sent a whole request."""
        self._tasks.put(task)

    def stop(self, *, timeout_s: float) -> bool:
        """Whether every thread has ended in time."""
        deadline = time.monotonic() + timeout_s
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        for task in iter(self._tasks.get, None):
            try:
                task.service()
            except Exception:
                log.exception("an HTTP request could not be answered: its connection is dropped")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = _resolve(host, port)
        return socket.create_server(
            address[:2],
            family=family,
            backlog=128,
            dualstack_ipv6=family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        raise SettingsError([_problem(host, port, error)]) from error


def _resolve(host: str, port: int) -> tuple[Any, Any, Any, Any, Any]:
    """The address to bind; IPv4 where a name has both, since that is what `curl localhost` falls back to."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return min(found, key=lambda info: info[0] != socket.AF_INET)


def _problem(host: str, port: int, error: OSError) -> Problem:
    if error.errno == errno.EADDRINUSE:
        return Problem(
            "HTTP_PORT",
            str(port),
            f"Another program listens on this port of {host}.",
            "Stop it, or choose another port (0 turns HTTP off).",
        )
    if error.errno == errno.EACCES:
        return Problem(
            "HTTP_PORT", str(port), "The system does not let this user have the port.", "Choose one from 1024 on."
        )
    return Problem(
        "HTTP_HOST",
        host,
        f"This address cannot be listened on: {error.strerror or error}.",
        "Give an address of this machine, 127.0.0.1 for this machine alone, or 0.0.0.0 for everybody.",
    )


def _presented_token(authorization: str) -> bytes:
    """The token in an Authorization header (RFC 6750: Bearer; RFC 7617: the password of Basic), else nothing."""
    scheme, _, credentials = authorization.strip().partition(" ")
    # WSGI carries header bytes as latin-1.
    presented = credentials.strip().encode("latin-1", "replace")
    if scheme.lower() == "bearer":
        return presented
    if scheme.lower() == "basic":
        return _basic_password(presented)
    return b""


def _basic_password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _load_page() -> _Answer:
    page = resources.files("mqtt_bridge").joinpath("web", "index.html").read_bytes()
    return _Answer(
        HTTPStatus.OK, page, "text/html; charset=utf-8", (("Content-Security-Policy", _content_policy(page)),)
    )


def _content_policy(page: bytes) -> str:
    """A Content-Security-Policy that allows the page's own script and style, by hash, and nothing else."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_inline_hashes(page, b'script')}",
            f"style-src {_inline_hashes(page, b'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _inline_hashes(page: bytes, tag: bytes) -> str:
    found = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)


def _verdict(name: str, reasons: list[str]) -> _Answer:
    status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
    return _json(status, {name: not reasons, "reasons": reasons})


def _json(status: HTTPStatus, content: dict[str, Any], *headers: tuple[str, str]) -> _Answer:
    return _Answer(status, orjson.dumps(content), headers=headers)


_UNAUTHORIZED = _json(
    HTTPStatus.UNAUTHORIZED,
    {"error": "send the token (HTTP_TOKEN) as a bearer token, or as the password of any user"},
    ("WWW-Authenticate", 'Basic realm="mqtt-bridge", charset="UTF-8"'),
    ("WWW-Authenticate", 'Bearer realm="mqtt-bridge"'),
)

_NOT_ALLOWED = _json(
    HTTPStatus.METHOD_NOT_ALLOWED, {"error": "only GET and HEAD are answered here"}, ("Allow", "GET, HEAD")
)


def _do_nothing() -> None:
    pass
