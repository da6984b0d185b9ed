"""mqtt-bridge itself, as users have it: a process with the settings it cannot do without, all others at their defaults.

`Bridge` is also what the measurements of the bridge alone use; they may give settings, and kill it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import mqtt_bridge
from benchmarks.contestant import Stage, Unavailable
from mqtt_bridge.tools.embedded import free_port

ROOT = Path(__file__).parents[2]
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0

# A proxy of the environment would be asked for 127.0.0.1.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Refused(Unavailable):
    """The program does not take these settings; the message is its own."""


class Bridge:
    """`mqtt-bridge run`. May be killed and started again."""

    name = "mqtt-bridge"
    title = "mqtt-bridge, default settings"
    rows_per_message = 4
    guarantees = "acknowledges after the commit; exactly once through crashes"

    def __init__(self, **settings: object) -> None:
        self.settings = settings
        self.http_port = 0
        self._stage: Stage | None = None
        self._process: subprocess.Popen[bytes] | None = None

    # -- as a contestant

    def install(self) -> str:
        """Nothing to do; the version."""
        return mqtt_bridge.__version__

    def start(self, stage: Stage) -> None:
        """Start it on this stage, and wait until it is ready."""
        self._stage = stage
        self.http_port = free_port()
        self.launch()

    def pids(self) -> list[int]:
        """The one it was started as; processes of BRIDGE_PROCESSES are its children."""
        return [] if self._process is None else [self._process.pid]

    def count(self, connection: Any) -> int:
        """Messages that are stored: each has one temperature."""
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM readings WHERE metric = 'temperature'")
            return int(cursor.fetchone()[0])

    def most(self) -> int | None:
        """Any number."""
        return None

    def stop(self) -> None:
        """SIGTERM, and wait; SIGKILL if it does not end."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # -- more than a contestant

    def launch(self) -> None:
        """Start the process and wait until it is subscribed and the database is there."""
        assert self._stage is not None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mqtt_bridge", "run"],
                cwd=self._stage.directory,  # so that nobody's .env is read
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._wait_until_ready()

    def kill(self) -> None:
        """SIGKILL: what was not committed is left to the broker."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def environment(self) -> dict[str, str]:
        """All that the process is told."""
        assert self._stage is not None
        passed_on = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        return passed_on | {
            "PYTHONPATH": str(ROOT),
            "MQTT_HOST": self._stage.broker_host,
            "MQTT_PORT": str(self._stage.broker_port),
            "MQTT_TOPICS": self._stage.topic_filter.replace("+", "{device}", 1),
            "DATABASE_URL": self._stage.dsn,
            "HTTP_PORT": str(self.http_port),
            **{name: str(value) for name, value in self.settings.items()},
        }

    def status(self) -> dict[str, Any]:
        """The answer of /api/status."""
        with _OPENER.open(f"http://127.0.0.1:{self.http_port}/api/status", timeout=10) as answer:
            content: dict[str, Any] = json.loads(answer.read())
        return content

    @property
    def _log(self) -> Path:
        assert self._stage is not None
        return self._stage.directory / "bridge.log"

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None:
                said = self._log.read_text(errors="replace").strip().splitlines()
                kind = Refused if self._process.returncode == 2 else Unavailable
                raise kind(" ".join(said[-5:]) or f"it ended with exit code {self._process.returncode}")
            if time.monotonic() > deadline_s:
                raise Unavailable(f"it was not ready within {READY_TIMEOUT_S:g} s; see {self._log}")
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        try:
            with _OPENER.open(f"http://127.0.0.1:{self.http_port}/readyz", timeout=10) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


CONTESTANTS = (Bridge(),)
