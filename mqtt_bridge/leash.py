"""What ties a process to the supervisor that has started it: one end each of a pair of sockets.

Through it the supervisor asks how the process is, and tells it to stop; by its end the process learns that the
supervisor is gone, however that died, and stops in good order. So no process is ever left behind.

On the wire: the supervisor sends single bytes, `ASK` or `STOP`; each `ASK` is answered, in order, by one line of JSON.

Threads: `mqtt-bridge-leash`, in the process. The supervisor's end belongs to a `Member`.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
import structlog

from mqtt_bridge.account import Balance
from mqtt_bridge.metrics import Observation

log = structlog.get_logger(__name__)

ASK, STOP = b"?", b"!"


@dataclass(frozen=True, slots=True)
class Answer:
    """How a process says that it is."""

    observation: Observation
    unhealthy: list[str]
    """Why it should be restarted."""

    def encoded(self) -> bytes:
        """As one line."""
        return orjson.dumps(self) + b"\n"

    @classmethod
    def decoded(cls, line: bytes) -> Answer:
        """Of what `encoded` made."""
        content: dict[str, Any] = orjson.loads(line)
        observation: dict[str, Any] = content["observation"]
        balance = Balance(**observation.pop("balance"))
        return cls(Observation(balance=balance, **observation), content["unhealthy"])


class Leash:
    """The end of the process that is held."""

    def __init__(
        self, descriptor: int, *, stop: Callable[[], object], answer: Callable[[], Answer] | None = None
    ) -> None:
        """`descriptor` was inherited. `stop` ends the process in good order; `answer` tells how it is."""
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        self._stop = stop
        self._answer = answer
        self._thread = threading.Thread(target=self._run, name="mqtt-bridge-leash", daemon=True)

    def start(self) -> None:
        """Start the thread; once. It ends with the supervisor, or with the process."""
        self._thread.start()

    def _run(self) -> None:
        with self._socket:
            try:
                self._listen()
            except OSError:
                pass  # the other end is gone
            except Exception:
                log.exception("the process cannot answer its supervisor: it stops, to be started again")
        self._stop()

    def _listen(self) -> None:
        while request := self._socket.recv(1):
            if request == STOP:
                self._stop()
            elif self._answer is not None:
                self._socket.sendall(self._answer().encoded())
        log.info("the supervisor is gone or lets go: stopping")
