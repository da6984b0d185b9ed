"""What PostgreSQL and the broker have in common: a loopback port, and the way they start and stop.

Ports are taken at random and may be snatched before the server binds: another is tried then. Whoever answers on the
port is asked who it is before `start` returns.
"""

from __future__ import annotations

import contextlib
import random
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from mqtt_bridge.tools.embedded.account import EmbeddedServerError
from mqtt_bridge.tools.embedded.guarded import GuardedServer, wait_until

HOST = "127.0.0.1"

# Below the ranges from which Linux (32768) and macOS (49152) take the local ports of outgoing connections. A port in
# those could be taken by any client while a server restarts, and a client that keeps trying a closed port of that
# range sooner or later connects to itself (TCP simultaneous open) and holds the port for good.
_PORTS = range(20_000, 32_000)

_PORT_ATTEMPTS = 5
_START_TIMEOUT_S = 60.0


class PortTaken(EmbeddedServerError):
    """Somebody else listens on the port."""


class EmbeddedServer(ABC):
    """A server on a loopback port, in a folder of its own; a context manager.

    `directory` None: a temporary one, removed at the end. `port` None: a free one, kept through restarts.
    """

    host = HOST
    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]
    """What ends the server in good order."""

    def __init__(self, directory: Path | None, *, port: int | None) -> None:
        self._guarded = GuardedServer(directory, name=self.name, stop_signal=self.stop_signal)
        self._port = port

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The TCP port; raises EmbeddedServerError before the first start."""
        if self._port is None:
            raise EmbeddedServerError(f"{self.name} was never started.")
        return self._port

    @property
    def running(self) -> bool:
        """Whether the server's process exists."""
        return self._guarded.running

    @property
    def directory(self) -> Path:
        """The folder that holds the server's data and server.log; raises EmbeddedServerError before the first start."""
        return self._guarded.directory

    def start(self) -> None:
        """Start, and return when the server answers. Idempotent. Raises EmbeddedServerError."""
        if self.running:
            return
        self._guarded.open()
        self._prepare()
        if self._port is not None:
            self._start_on(self._port)
        else:
            self._port = self._start_on_a_free_port()

    def stop(self) -> None:
        """Stop in good order. Idempotent; the data stay until `close`."""
        self._guarded.stop(self.stop_signal)

    def kill(self) -> None:
        """SIGKILL, for the server and all its processes; what was not on disk is lost."""
        self._guarded.kill()

    def close(self) -> None:
        """Stop for good, remove a temporary folder. Idempotent."""
        try:
            self.stop()
        finally:
            self._guarded.close()

    @abstractmethod
    def _prepare(self) -> None:
        """Find the programs, make the data; before every start."""

    @abstractmethod
    def _command(self, port: int) -> Sequence[str | Path]:
        """The command line that serves this port."""

    @abstractmethod
    def _answers(self, port: int) -> bool:
        """Whether this very server answers; raises EmbeddedServerError when another one does."""

    def _start_on_a_free_port(self) -> int:
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            port = free_port()
            try:
                self._start_on(port)
            except PortTaken:
                if attempt == _PORT_ATTEMPTS:
                    raise
            else:
                return port
        raise AssertionError("the last attempt returns or raises")

    def _start_on(self, port: int) -> None:
        self._guarded.launch(*self._command(port))
        wait_until(
            lambda: not self.running or self._answers(port),
            f"{self.name} to start",
            timeout_s=_START_TIMEOUT_S,
            log=self._guarded.log_tail,
        )
        if self.running:
            return
        self._guarded.wait()
        log = self._guarded.log_tail()
        failure = PortTaken if "Address already in use" in log else EmbeddedServerError
        raise failure(f"{self.name} did not start on port {port}.\n{log}")


def free_port() -> int:
    """A TCP port that nobody listens on at 127.0.0.1 just now. Another program may take it first: try again then."""
    for port in random.SystemRandom().sample(_PORTS, 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise EmbeddedServerError(f"No free port between {_PORTS.start} and {_PORTS.stop}.")
