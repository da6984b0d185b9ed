"""MQTT over websockets for a broker that has none: Debian's Mosquitto is built without.

`with WebsocketRelay("127.0.0.1", broker.port) as relay:` listens on `relay.port`, path /mqtt, subprotocol `mqtt`,
binary frames (MQTT 5, section 6), and carries the bytes to and from the broker's TCP port.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence
from http import HTTPStatus
from typing import Self

from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol

from tests.packets import cut


class WebsocketRelay:
    """One listener, a thread for itself and two for each connection."""

    host = "127.0.0.1"

    def __init__(
        self, target_host: str, target_port: int, *, path: str = "/mqtt", sizes: Sequence[int] = (65_536,)
    ) -> None:
        """`sizes`: of the frames to the client, over and over; packets may begin and end anywhere in them."""
        self._sizes = sizes
        self._target = (target_host, target_port)
        self._path = path
        self._server = serve(
            self._relay,
            self.host,
            0,
            subprotocols=[Subprotocol("mqtt")],
            process_request=self._check_path,
            compression=None,
            max_size=None,
        )
        self.port: int = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="websocket-relay", daemon=True)
        self._lock = threading.Lock()
        self._handlers: set[threading.Thread] = set()
        """Guarded by `_lock`."""
        self._connections: set[ServerConnection] = set()
        """Guarded by `_lock`."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self.cut()
        with self._lock:
            handlers = list(self._handlers)
        for handler in handlers:
            handler.join(timeout=10)

    def cut(self) -> None:
        """Close every connection without a closing handshake."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)

    def _check_path(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == self._path:
            return None
        return connection.respond(HTTPStatus.NOT_FOUND, f"MQTT is at {self._path}\n")

    def _relay(self, client: ServerConnection) -> None:
        with self._lock:
            self._handlers.add(threading.current_thread())
            self._connections.add(client)
        try:
            with socket.create_connection(self._target) as broker:
                downstream = threading.Thread(target=self._to_client, args=(broker, client), name="websocket-down")
                downstream.start()
                self._to_broker(client, broker)
                downstream.join()
        finally:
            with self._lock:
                self._handlers.discard(threading.current_thread())
                self._connections.discard(client)

    def _to_broker(self, client: ServerConnection, broker: socket.socket) -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            for frame in client:
                if isinstance(frame, str):  # MQTT-6.0.0-1: anything but binary ends the connection
                    break
                broker.sendall(frame)
        with contextlib.suppress(OSError):
            broker.shutdown(socket.SHUT_RDWR)

    def _to_client(self, broker: socket.socket, client: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            while data := broker.recv(65_536):
                for frame in cut(data, self._sizes):
                    client.send(frame)
        with contextlib.suppress(OSError):
            client.close()
