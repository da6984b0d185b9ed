"""One program that is measured: started in a session of its own with a log, and ended with everything it has started.

It is not asked whether it works: its log is watched for the line that says so. Threads: all in the caller's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from benchmarks.contestant import Unavailable

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
_LOOK_S = 0.02


class Program:
    """A program, or a pipeline of programs below one shell. May be started once."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str | Path], *, directory: Path, environment: Mapping[str, str]) -> None:
        """Start it; both its outputs go to the log. `environment` comes on top of our own."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                cwd=directory,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pids(self) -> list[int]:
        """The root of its process tree; empty when it does not run."""
        return [self._process.pid] if self._process is not None and self._process.poll() is None else []

    def wait_until_it_says(self, text: str) -> None:
        """Return when the log holds this text; Unavailable when it ends or takes too long."""
        self._wait_until(lambda: text in self._output())

    def wait_until_connected(self, port: int) -> None:
        """Return when it has a connection to this TCP port: for programs that do not say so."""
        self._wait_until(lambda: any(_is_connected(process, port) for process in self._members()))

    def stop(self) -> None:
        """SIGTERM for all its processes, SIGKILL for those that remain, or were started meanwhile. Idempotent."""
        if self._process is None:
            return
        deadline = time.monotonic() + STOP_TIMEOUT_S
        _signal(self._members(), signal.SIGTERM)
        while (left := self._members()) and self.pids and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        # The root is gone, or will be: nothing starts anew what is ended now. (collectd restarts its pipe.)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while left and time.monotonic() < deadline:
            _signal(left, signal.SIGKILL)
            time.sleep(_LOOK_S)
            left = self._members()
        self._process.wait()
        self._process = None

    def _members(self) -> list[psutil.Process]:
        """Its tree, and what the tree has left behind: a session outlives its leader."""
        assert self._process is not None
        return [process for process in psutil.process_iter() if _is_member(process, self._process.pid)]

    def _wait_until(self, predicate: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not predicate():
            if not self.pids or time.monotonic() > deadline:
                why = f"it was not ready within {START_TIMEOUT_S:g} s" if self.pids else "it ended at once"
                raise Unavailable(f"{why}. Its last words: {' | '.join(self._output().splitlines()[-5:])}")
            time.sleep(_LOOK_S)  # a foreign program gives no event to wait on

    def _output(self) -> str:
        return self._log.read_text(errors="replace")


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _is_member(process: psutil.Process, session: int) -> bool:
    """A zombie counts as gone: the first process of a container may never reap it."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    return False


def _is_connected(process: psutil.Process, port: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        ends = [connection.raddr for connection in process.net_connections("tcp") if connection.status == "ESTABLISHED"]
        return any(end and end.port == port for end in ends)
    return False
