"""The bridge as its users have it: a process of its own, with nothing but the settings that it is given.

    program = Program(tmp_path, DATABASE_URL=database, MQTT_HOST=broker.host, MQTT_PORT=broker.port)
    with program:                       # killed at the end, whatever happens
        program.start().wait_until_ready()
        assert program.stop() == 0

It runs in `directory`, so that nobody's `.env` is read, and every warning of Python is shown in its output.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

from mqtt_bridge.tools.embedded import free_port
from tests.waiting import wait_until

PASSED_ON = ("PATH", "LANG", "PYTHONPATH", "COVERAGE_PROCESS_START")
"""All that a program gets of the environment that the tests run in."""

# A proxy of the environment would be asked for 127.0.0.1.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def command_line(*arguments: str) -> list[str]:
    """`mqtt-bridge ARGUMENTS`, with every warning shown."""
    return [sys.executable, "-W", "always", "-m", "mqtt_bridge", *arguments]


def environment(**settings: object) -> dict[str, str]:
    """The environment of a program: what every program needs, and these settings."""
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return passed_on | {name: str(value) for name, value in settings.items()}


def run_command(
    directory: Path, *arguments: str, stdin: bytes = b"", timeout_s: float = 60, **settings: object
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end; stdout and stderr are text."""
    ended = subprocess.run(
        command_line(*arguments),
        cwd=directory,
        env=environment(**settings),
        input=stdin,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )
    return subprocess.CompletedProcess(ended.args, ended.returncode, ended.stdout.decode(), ended.stderr.decode())


class Program:
    """`mqtt-bridge run`. May be started again after it has ended; `settings` may be changed in between."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.settings: dict[str, object] = {"HTTP_PORT": free_port()} | settings
        self._directory = directory
        self._log_path = directory / "bridge.log"
        self._log_path.touch()
        self._began_at = 0  # where the output of the present run begins
        self._process: subprocess.Popen[bytes] | None = None
        self.command = command_line("run")
        """What `start` runs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # -- its life

    def start(self, *options: str) -> Self:
        """Start it, with these options of `run`; returns at once."""
        assert not self.running, "it runs already"
        self._began_at = self._log_path.stat().st_size
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.command, *options],
                cwd=self._directory,
                env=environment(**self.settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def terminate(self) -> None:
        """SIGTERM; returns at once."""
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout_s: float = 40.0) -> int:
        """Wait for its end; the exit code."""
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"The bridge did not end within {timeout_s:g} s:\n{self.log}") from None

    def stop(self, timeout_s: float = 40.0) -> int:
        """SIGTERM, and wait for its end; the exit code."""
        self.terminate()
        return self.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL, and wait for its end. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    # -- what it says

    @property
    def log(self) -> str:
        """All that the present (or last) run has written."""
        return self._log_path.read_bytes()[self._began_at :].decode()

    @property
    def log_of_all_runs(self) -> str:
        """All that was ever written."""
        return self._log_path.read_text()

    def get(self, path: str) -> tuple[int, bytes]:
        """Status code and body of an HTTP answer; ConnectionError where nobody answers."""
        url = f"http://127.0.0.1:{self.settings['HTTP_PORT']}{path}"
        try:
            with _OPENER.open(url, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except urllib.error.URLError as error:
            raise ConnectionError(f"{url}: {error.reason}") from error

    def status(self) -> dict[str, Any]:
        """The answer of `/api/status`."""
        code, body = self.get("/api/status")
        assert code == 200, body
        content: dict[str, Any] = json.loads(body)
        return content

    def messages(self) -> dict[str, int]:
        """The account of messages."""
        counts: dict[str, int] = self.status()["messages"]
        return counts

    def healthz(self) -> int | None:
        """Status code of `/healthz`; None where nobody answers."""
        try:
            return self.get("/healthz")[0]
        except ConnectionError:
            return None

    def readyz(self) -> tuple[int | None, list[str]]:
        """Status code of `/readyz` and its reasons; (None, []) where nobody answers."""
        try:
            code, body = self.get("/readyz")
        except ConnectionError:
            return None, []
        return code, json.loads(body)["reasons"]

    # -- what a test waits for

    def wait_until_up(self) -> Self:
        """Until HTTP answers: from then on signals are handled as well."""
        wait_until(lambda: self._alive() and self.healthz() == 200, timeout_s=30, what="the bridge to come up")
        return self

    def wait_until_ready(self, timeout_s: float = 60.0) -> Self:
        """Until it is subscribed and the database is there."""
        wait_until(
            lambda: self._alive() and self.readyz()[0] == 200,
            timeout_s=timeout_s,
            what=f"the bridge to be ready, {self.readyz()}",
        )
        return self

    def wait_for_log(self, pattern: str, timeout_s: float = 30.0) -> str:
        """The first line of the present run in which the pattern (regular expression) is found."""
        return wait_until(
            lambda: next((line for line in self.log.splitlines() if re.search(pattern, line)), None),
            timeout_s=timeout_s,
            what=f"{pattern!r} in the log",
        )

    def wait_for_outcomes(self, count: int, timeout_s: float = 60.0) -> dict[str, int]:
        """Until `count` messages were received and none is in flight; the account."""

        def all_settled() -> dict[str, int] | None:
            assert self._alive()
            messages = self.messages()
            return messages if messages["received"] >= count and not messages["in_flight"] else None

        return wait_until(all_settled, timeout_s=timeout_s, what=f"{count} messages to be settled")

    def _alive(self) -> bool:
        assert self.running, f"the bridge has ended:\n{self.log}"
        return True
