"""One server process in one folder, which never outlives the process that started it.

`GuardedServer` starts a server as an unprivileged account (PostgreSQL refuses root, Mosquitto drops it) in a session
of its own, so that Ctrl-C in a terminal reaches the bridge and not its database. Beside it runs a guardian, a few
lines of shell that hold the reading end of a pipe. When the pipe closes (the parent ended, was killed, or said so)
the guardian stops the server and removes the folder. That works the same on Linux and macOS and costs 1 MB.

Invariant: no server starts unguarded. The guardian first opens a gate (a file) and on its way out first closes it,
then reads the pid; the server first writes its pid, then looks at the gate. Whatever the order, one sees the other.

Not thread-safe: one thread at a time starts and stops a server.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

from mqtt_bridge.tools.embedded.account import Account, EmbeddedServerError

_STOP_TIMEOUT_S = 30.0

_RUN = """
echo $$ > "$0/server.pid" && [ -e "$0/gate" ] || exit 75
exec "$@" >> "$0/server.log" 2>&1
"""

# $1 folder, $2 "make" (and remove at the end) or "keep", $3 signal that stops the server. A folder that cannot be made
# or written to ends the guardian at once. A shell has nothing better than sleep to wait for a process that is not its
# child; a zombie counts as gone, since the first process of a container may never reap it. The signal comes after
# CONT because the parent may have died in the middle of `kill`. Removal is tried again because a dying server may
# still create files.
_GUARD = """
trap '' HUP INT TERM PIPE
gone() { ! kill -0 "$1" 2>/dev/null || grep -qs '^State:.Z' "/proc/$1/status"; }
if [ "$2" = make ]; then mkdir -m 700 "$1" || exit 1; fi
rm -f "$1/server.pid"
: > "$1/gate" || exit 1
echo ready
read -r _
rm -f "$1/gate"
pid=$(cat "$1/server.pid" 2>/dev/null)
if [ -n "$pid" ]; then
    kill -CONT "$pid" 2>/dev/null
    kill "-$3" "$pid" 2>/dev/null
    tries=0
    until gone "$pid"; do
        tries=$((tries + 1))
        if [ "$tries" -ge 100 ]; then kill -KILL "$pid" 2>/dev/null; fi
        if [ "$tries" -ge 200 ]; then break; fi
        sleep 0.1
    done
    rm -f "$1/server.pid"
fi
tries=0
while [ "$2" = make ] && [ -e "$1" ] && [ "$tries" -lt 50 ]; do
    rm -rf "$1" 2>/dev/null
    tries=$((tries + 1))
    if [ -e "$1" ]; then sleep 0.1; fi
done
"""


class GuardedServer:
    """One folder, one server process in it, one guardian beside both.

    `directory` None makes a temporary folder that disappears with `close`; a folder that is given is kept.
    `stop_signal` ends the server when the parent has died.
    """

    def __init__(self, directory: Path | None, *, name: str, stop_signal: signal.Signals) -> None:
        self.account = Account.unprivileged()
        self._given = directory
        self._name = name
        self._stop_signal = stop_signal
        self._directory: Path | None = None
        self._guardian: subprocess.Popen[str] | None = None
        self._process: subprocess.Popen[str] | None = None

    @property
    def directory(self) -> Path:
        """The server's folder; raises EmbeddedServerError before the first start."""
        if self._directory is None:
            raise EmbeddedServerError(f"{self._name} was never started.")
        return self._directory

    @property
    def pid(self) -> int | None:
        """The server's process id, None when it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def running(self) -> bool:
        """Whether the process exists (not: whether it answers)."""
        return self.pid is not None

    def open(self) -> Self:
        """Make the folder and start the guardian. Idempotent."""
        if self._guardian is None:
            if self._given is None:
                self._open_temporary()
            else:
                self._open_given(self._given.resolve())
        return self

    def launch(self, *command: str | Path) -> None:
        """Start `command` in the folder, its output appended to server.log. One at a time."""
        if self.running:
            raise EmbeddedServerError(f"{self._name} runs already.")
        self.open()
        self._process = self.account.popen(
            ["/bin/sh", "-c", _RUN, self.directory, *command], stdin=subprocess.DEVNULL, new_session=True
        )

    def wait(self, timeout_s: float = _STOP_TIMEOUT_S) -> int:
        """Wait for the process to end, return its exit code (0 if there is none)."""
        if self._process is None:
            return 0
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise EmbeddedServerError(f"{self._name} did not end within {timeout_s:g} s.\n{self.log_tail()}") from error
        # Else the guardian could signal a stranger that was given the same pid later.
        (self.directory / "server.pid").unlink(missing_ok=True)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the server's main process, if there is one."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self, number: signal.Signals) -> None:
        """End the server with this signal and wait; SIGKILL where it does not obey. Idempotent."""
        self.send_signal(number)
        try:
            self.wait()
        except EmbeddedServerError:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL for the server and all its children at once, as if the machine had lost power to it."""
        pid = self.pid
        if pid is None:
            self.wait()
            return
        self.send_signal(signal.SIGSTOP)  # so that it makes no further children while we look for them
        children = _children(pid)
        for process in [pid, *children]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.wait()
        wait_until(lambda: not any(_exists(child) for child in children), f"{self._name}'s children to end")

    def close(self) -> None:
        """Kill what still runs, dismiss the guardian, which removes a temporary folder. Idempotent."""
        self.kill()
        self._process = None
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            with contextlib.suppress(OSError):
                guardian.communicate("the server is gone\n", timeout=_STOP_TIMEOUT_S)
        if self._given is None and self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)  # what we, as root, may have put there
        self._directory = None

    def log_tail(self, lines: int = 15) -> str:
        """The last lines the server wrote."""
        log = self.directory / "server.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _open_given(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if self.account.uid is not None:
            shutil.chown(directory, self.account.uid, self.account.gid)
        if not self._start_guardian(directory, "keep"):
            raise EmbeddedServerError(
                f"{directory} cannot be reached by the account that {self._name} runs as"
                f" (uid {os.geteuid() if self.account.uid is None else self.account.uid}):"
                " choose a folder below directories that everybody may enter."
            )

    def _open_temporary(self) -> None:
        # The guardian makes it, as the account: so there is never a folder without a guardian, and it is proven that
        # the account can reach it and remove it.
        for parent in dict.fromkeys([tempfile.gettempdir(), "/tmp", "/var/tmp"]):
            directory = Path(parent).resolve() / f"mqtt-bridge-{self._name}-{secrets.token_hex(4)}"
            if self._start_guardian(directory, "make"):
                return
        raise EmbeddedServerError("No temporary folder can be written to: make /tmp writable or set TMPDIR.")

    def _start_guardian(self, directory: Path, mode: Literal["make", "keep"]) -> bool:
        stop = self._stop_signal.name.removeprefix("SIG")
        guardian = self.account.popen(
            ["/bin/sh", "-c", _GUARD, "mqtt-bridge-guardian", directory, mode, stop],
            stdin=subprocess.PIPE,
            output=subprocess.PIPE,
            new_session=True,
        )
        assert guardian.stdout is not None
        if guardian.stdout.readline() != "ready\n":
            guardian.communicate()
            return False
        self._directory, self._guardian = directory, guardian
        return True


def wait_until(
    predicate: Callable[[], bool], what: str, timeout_s: float = _STOP_TIMEOUT_S, log: Callable[[], str] = str
) -> None:
    """Look every 20 ms (a foreign process gives no event to wait on); EmbeddedServerError when time is up."""
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline:
            raise EmbeddedServerError(f"Waited {timeout_s:g} s for {what}.\n{log()}".rstrip())
        time.sleep(0.02)


def _children(pid: int) -> list[int]:
    listing = _list_processes()
    return [child for child, parent in listing if parent == pid]


def _list_processes() -> list[tuple[int, int]]:
    """(pid, parent) of all but zombies: from /proc where there is one (small images have no ps), else from ps."""
    if Path("/proc/self/stat").exists():
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [(pid, parent) for pid in pids if (parent := _parent(pid)) is not None]
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], check=True, capture_output=True, text=True).stdout
    fields = [line.split() for line in listing.splitlines()]
    return [(int(pid), int(parent)) for pid, parent, state in fields if not state.startswith("Z")]


def _parent(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]  # the name, in parentheses, may hold anything
    return None if state == "Z" else int(parent)


def _exists(pid: int) -> bool:
    return any(process == pid for process, _ in _list_processes())
