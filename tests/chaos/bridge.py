"""`mqtt-bridge run` as a process that never outlives the run, not even when the run is killed.

Its guardian is that of the embedded servers; it runs as whoever runs the tests. Its folder, and a spool in it, live as
long as the run does, over any number of processes.

With several processes (`BRIDGE_PROCESSES`) what is started is their supervisor. It is in sessions of their own that the
others run: should a run be killed, they end because their supervisor does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from mqtt_bridge.tools.embedded import free_port
from mqtt_bridge.tools.embedded.account import Account
from mqtt_bridge.tools.embedded.guarded import GuardedServer
from tests.program import environment

ROOT = Path(__file__).resolve().parents[2]

# A proxy of the environment would be asked for 127.0.0.1.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Bridge:
    """One bridge, started again and again. Remembers how each of its processes ended, and what they used."""

    def __init__(self, name: str, *, without_ledger: bool = False, **settings: object) -> None:
        self.settings: dict[str, object] = {"HTTP_PORT": free_port()} | settings
        """May be changed before a start."""
        self._module = "tests.chaos.without_ledger" if without_ledger else "mqtt_bridge"
        self._guarded = GuardedServer(None, name=name, stop_signal=signal.SIGKILL)
        self._guarded.account = Account()
        self.exits: Counter[int] = Counter()
        """Exit codes of all processes so far; -9 is kill -9."""
        self.recognised = 0
        """Redeliveries that the processes before the present one had counted when they were last asked."""
        self.unbalanced: list[str] = []
        """Accounts that did not balance."""
        self.largest_spool_messages = 0
        self.largest_spool_bytes = 0
        self.peak_rss_bytes = 0
        """Of the process that used most; of several, of all together."""
        self.rss_bytes = 0
        """Of the present process, when it was last looked at."""
        self._cpu_s: dict[int, float] = {}  # by process
        self.last_status: dict[str, Any] | None = None
        """Of the present process; of several, when all of them had answered."""

    def __enter__(self) -> Self:
        self._guarded.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._guarded.close()

    @property
    def directory(self) -> Path:
        """A folder of the run's own, which its processes may write to."""
        return self._guarded.directory

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._guarded.running

    @property
    def log(self) -> str:
        """All that its processes have written."""
        path = self._guarded.directory / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all its processes, each up to when it was last looked at."""
        return sum(self._cpu_s.values())

    def start(self) -> None:
        """Start it; returns at once."""
        variables = environment(**self.settings) | {"PYTHONPATH": str(ROOT)}
        settings = [f"{variable}={value}" for variable, value in variables.items()]
        self._guarded.launch("env", "-i", *settings, sys.executable, "-W", "always", "-m", self._module, "run")

    def kill(self) -> None:
        """SIGKILL; for each of several processes."""
        self.observe()
        members = self._members()
        self._guarded.send_signal(signal.SIGKILL)  # first, for it would start the others again
        for pid in members.values():
            _kill(pid)
        self.note_end()

    def kill_one(self, dice: random.Random) -> None:
        """SIGKILL for one of several processes, which is started again; or for their supervisor, as often as for one
        of the others: then the others leave by themselves while the next start is under way."""
        self.observe()
        members = self._members()
        victim = dice.choice(["supervisor", *sorted(members)]) if members else "supervisor"
        if victim == "supervisor":
            self._guarded.send_signal(signal.SIGKILL)
            self.note_end()
        else:
            _kill(members[victim])
            self.exits[-signal.SIGKILL] += 1
            self.recognised += sum(
                each["messages"]["duplicate"]
                for each in (self.last_status or {}).get("processes", [])
                if each["pid"] == members[victim]
            )

    def _members(self) -> dict[str, int]:
        """Process ids of several processes, by client id; none of a single one."""
        processes = (self._ask() or {}).get("processes", [])
        return {each["client_id"]: each["pid"] for each in processes if each["pid"] is not None}

    def stop(self) -> int:
        """SIGTERM, and wait for the exit code."""
        self.observe()
        self._guarded.send_signal(signal.SIGTERM)
        return self.note_end()

    def note_end(self, timeout_s: float = 60.0) -> int:
        """Wait for the end of the process; its exit code."""
        code = self._guarded.wait(timeout_s)
        self.exits[code] += 1
        self.recognised += self.last_status["messages"]["duplicate"] if self.last_status else 0
        self.last_status = None
        return code

    def observe(self) -> dict[str, Any] | None:
        """What it says of itself, None where it, or one of several, does not answer; remembers what is to be
        remembered."""
        status = self._ask()
        processes = (status or {}).get("processes", [])
        self._observe_processes([self._guarded.pid, *(each["pid"] for each in processes)])
        if status is None or any(each["state"] is None for each in processes):
            return None
        self.last_status = status
        self._check_balance(status["messages"])
        self.largest_spool_messages = max(self.largest_spool_messages, status["spool"]["messages"])
        self.largest_spool_bytes = max(self.largest_spool_bytes, status["spool"]["bytes"])
        return status

    def _check_balance(self, messages: dict[str, int]) -> None:
        if messages["received"] != sum(messages.values()) - messages["received"]:
            self.unbalanced.append(str(messages))

    def _ask(self) -> dict[str, Any] | None:
        try:
            with _OPENER.open(f"http://127.0.0.1:{self.settings['HTTP_PORT']}/api/status", timeout=5) as answer:
                status: dict[str, Any] = json.load(answer)
        except (OSError, ValueError):
            return None
        return status

    def _observe_processes(self, pids: Sequence[int | None]) -> None:
        """Memory of all these processes (proc(5): VmHWM, VmRSS) and their CPU time; nothing where there is no /proc."""
        rss_bytes = peak_bytes = 0
        for pid in pids:
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            memory = dict(line.split(":", 1) for line in status.splitlines())
            if pid is not None and "VmRSS" in memory:  # not of a zombie
                rss_bytes += _kilobytes(memory["VmRSS"])
                peak_bytes += _kilobytes(memory["VmHWM"])
                self._cpu_s[pid] = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
        if rss_bytes:
            self.rss_bytes = rss_bytes
            self.peak_rss_bytes = max(self.peak_rss_bytes, peak_bytes)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _kilobytes(text: str) -> int:
    """`    1234 kB` in bytes."""
    return int(text.split()[0]) * 1024
