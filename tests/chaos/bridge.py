"""`mqtt-bridge run` as a process that never outlives the run, not even when the run is killed.

Its guardian is that of the embedded servers; it runs as whoever runs the tests.
"""

from __future__ import annotations

import json
import signal
import sys
import urllib.request
from collections import Counter
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
    """One bridge, started again and again. Remembers how each of its processes ended, and the most that one used."""

    def __init__(self, name: str, *, without_ledger: bool = False, **settings: object) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}/api/status"
        module = "tests.chaos.without_ledger" if without_ledger else "mqtt_bridge"
        variables = environment(**settings, HTTP_PORT=port) | {"PYTHONPATH": str(ROOT)}
        self._command = [
            "env",
            "-i",
            *(f"{variable}={value}" for variable, value in variables.items()),
            *(sys.executable, "-W", "always", "-m", module, "run"),
        ]
        self._guarded = GuardedServer(None, name=name, stop_signal=signal.SIGKILL)
        self._guarded.account = Account()
        self.exits: Counter[int] = Counter()
        """Exit codes of all processes so far; -9 is kill -9."""
        self.recognised = 0
        """Redeliveries that the processes before the present one had counted when they were last asked."""
        self.largest_rss_bytes = 0
        self._last_status: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        self._guarded.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._guarded.close()

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._guarded.running

    @property
    def log(self) -> str:
        """All that its processes have written."""
        path = self._guarded.directory / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start it; returns at once."""
        self._guarded.launch(*self._command)

    def kill(self) -> None:
        """SIGKILL."""
        self.observe()
        self._guarded.send_signal(signal.SIGKILL)
        self.note_end()

    def stop(self) -> int:
        """SIGTERM, and wait for the exit code."""
        self.observe()
        self._guarded.send_signal(signal.SIGTERM)
        return self.note_end()

    def note_end(self, timeout_s: float = 60.0) -> int:
        """Wait for the end of the process; its exit code."""
        code = self._guarded.wait(timeout_s)
        self.exits[code] += 1
        self.recognised += self._last_status["messages"]["duplicate"] if self._last_status else 0
        self._last_status = None
        return code

    def observe(self) -> dict[str, Any] | None:
        """What it says of itself, None where it does not answer; remembers memory and redeliveries."""
        self._observe_memory()
        try:
            with _OPENER.open(self._url, timeout=5) as answer:
                self._last_status = json.load(answer)
        except (OSError, ValueError):
            return None
        return self._last_status

    def _observe_memory(self) -> None:
        try:
            lines = Path(f"/proc/{self._guarded.pid}/status").read_text().splitlines()
        except OSError:  # it has ended, or this system has no /proc
            return
        for line in lines:
            if line.startswith("VmHWM:"):
                self.largest_rss_bytes = max(self.largest_rss_bytes, int(line.split()[1]) * 1024)
