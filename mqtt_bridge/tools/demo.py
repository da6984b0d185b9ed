"""The demo: a PostgreSQL, a broker, simulated devices and the bridge, all on this machine, with figures as they run.

The bridge is the real program in a process of its own, configured by environment variables like any other. At the
end the database is asked what it holds: the demo succeeds when that is exactly what the devices sent.

The caller's thread starts, watches and stops everything; the devices run in a thread `demo-devices`. Nothing outlives
the demo, not even when it is killed: the servers and the bridge have guardians (`embedded.server` explains them).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psycopg2

from mqtt_bridge.errors import BridgeError
from mqtt_bridge.tools.embedded import Broker, Postgres, free_port
from mqtt_bridge.tools.simulator import Simulator, Summary
from mqtt_bridge.tools.status import NoStatus, duration, fetch

Echo = Callable[[str], None]

HOST = "127.0.0.1"
# What the lines do that are printed for people to try.
_OWN_TOPIC = "devices/my-device/telemetry"
_OWN_PAYLOAD = '{"temperature": 21.5}'
_OWN_NEWEST = "SELECT * FROM readings WHERE device = 'my-device' ORDER BY time DESC LIMIT 5"

_COMMAND = (sys.executable, "-m", "mqtt_bridge", "run")

READY_S = 60.0
STORED_S = 30.0
"""How long the last messages may take into the database."""
SHUTDOWN_S = 20
LINE_EVERY_S = 5.0
"""How often a line of figures is printed where it cannot be rewritten in place."""

_SETTINGS = ("MQTT_", "DATABASE_", "DB_", "BRIDGE_", "HTTP_", "LOG_", "PG")
"""Prefixes of variables that would configure the bridge: the demo's must not read those of its user."""

# $0 is the demo's folder. The guardian waits for the demo's last word; where the pipe closes without one, the demo was
# killed. $$ is the shell's pid also in the subshell, and the bridge's after exec.
_GUARDED = """
exec 3<&0 </dev/null
(
    trap '' HUP INT TERM
    read -r _ <&3 || { kill -KILL $$; rm -rf "$0"; }
) > /dev/null 2>&1 &
exec 3<&-
exec "$@"
"""

_COUNTS = """
    SELECT
        (SELECT count(*) FROM readings WHERE metric = 'seq' AND device LIKE 'sim-%'),
        (SELECT count(DISTINCT (device, value)) FROM readings WHERE metric = 'seq' AND device LIKE 'sim-%'),
        (SELECT count(*) FROM mqtt_bridge.dead_letters WHERE topic LIKE 'devices/sim-%'),
        (SELECT count(*) FROM (SELECT DISTINCT device, time FROM readings WHERE device NOT LIKE 'sim-%') AS own),
        (SELECT count(*) FROM mqtt_bridge.dead_letters WHERE topic NOT LIKE 'devices/sim-%')
"""

_ARRIVED = """
    SELECT (SELECT count(*) FROM readings WHERE metric = 'seq' AND device LIKE 'sim-%')
         + (SELECT count(*) FROM mqtt_bridge.dead_letters WHERE topic LIKE 'devices/sim-%')
"""


class DemoError(BridgeError):
    """The demo cannot go on. The message says what failed and where to look."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the database holds at the end."""

    stored: int
    """Messages of simulated devices, every copy counted."""
    distinct: int
    """The same, every (device, seq) counted once."""
    dead_letters: int
    own_stored: int
    """Messages of other devices: the user's."""
    own_dead_letters: int

    def balances_with(self, sent: int) -> bool:
        """Whether it is exactly what was sent."""
        return self.stored == self.distinct == sent and self.dead_letters == 0


def run_demo(
    *,
    devices: int = 200,
    interval_s: float = 1.0,
    duration_s: float | None = None,
    stop: threading.Event,
    echo: Echo,
    terminal: TextIO | None = None,
) -> int:
    """Run the demo until `stop` is set or `duration_s` is over; the exit code of the program.

    `echo` prints a line. `terminal` (standard output, when that is a terminal) gets the line of figures, which is
    rewritten in place; without one it is printed every few seconds. 0 means that everything sent is stored, nothing
    twice, no dead letter, and that the bridge ended well.
    """
    if terminal is None and sys.stdout.isatty():
        terminal = sys.stdout
    try:
        with _folder() as folder, ExitStack() as running:
            demo = _start(folder, running, stop=stop, echo=echo)
            if demo is None:
                echo("Stopped before the bridge was ready.")
                return 1
            _introduce(demo, echo)
            simulator = Simulator(HOST, demo.broker.port, devices=devices, interval_s=interval_s, duration_s=duration_s)
            summary = demo.watch(simulator, stop=stop, show=_Line(devices=devices, echo=echo, terminal=terminal))
            return 0 if demo.conclude(summary, echo) else 1
    except (BridgeError, OSError, psycopg2.Error) as error:
        echo(f"The demo failed: {error}")
        return 1


def _start(folder: Path, running: ExitStack, *, stop: threading.Event, echo: Echo) -> _Demo | None:
    """Start everything; None when `stop` was set meanwhile. What was started is ended by `running`."""
    echo("Starting PostgreSQL with a new, empty database (a few seconds) ...")
    postgres = running.enter_context(Postgres())
    if stop.is_set():
        return None
    echo("Starting the broker (where Mosquitto is missing it is fetched first, which can take a minute) ...")
    broker = running.enter_context(Broker())
    if stop.is_set():
        return None
    echo("Starting the bridge ...")
    dsn = postgres.create_database("demo")
    bridge = _Bridge(folder, _settings(broker, dsn, http_port=free_port()))
    running.callback(bridge.close)
    return _Demo(postgres, broker, dsn, bridge) if bridge.wait_ready(stop) else None


def _settings(broker: Broker, dsn: str, *, http_port: int) -> dict[str, str]:
    return {
        "MQTT_HOST": HOST,
        "MQTT_PORT": str(broker.port),
        "MQTT_CLIENT_ID": "mqtt-bridge-demo",
        "DATABASE_URL": dsn,
        "HTTP_HOST": HOST,
        "HTTP_PORT": str(http_port),
        "BRIDGE_SHUTDOWN_S": str(SHUTDOWN_S),
        "LOG_LEVEL": "warning",
    }


def _introduce(demo: _Demo, echo: Echo) -> None:
    for line in (
        "",
        f"  Broker       {HOST}:{demo.broker.port}",
        f"  Database     {demo.dsn}",
        f"  Status page  {demo.bridge.url}",
        "",
        "  Publish a message of your own, from another terminal:",
        f"    {demo.broker.pub_command(_OWN_TOPIC, _OWN_PAYLOAD)}",
        "  and see what it became:",
        # Quoted by hand: shlex would make a thicket of the quotes inside.
        f'    {demo.postgres.psql(database="demo")} -c "{_OWN_NEWEST}"',
        "",
        "  Ctrl-C ends the demo.",
        "",
    ):
        echo(line)


@dataclass(frozen=True, slots=True)
class _Demo:
    """Everything that runs."""

    postgres: Postgres
    broker: Broker
    dsn: str
    bridge: _Bridge

    def watch(self, simulator: Simulator, *, stop: threading.Event, show: _Line) -> Summary:
        """Let the devices publish, and show figures, until they are done, `stop` is set or the bridge is gone."""
        halt = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="demo-devices") as devices, closing(show):
            publishing = devices.submit(simulator.run, halt)
            try:
                self._show_figures(simulator, publishing, stop=stop, show=show)
            finally:
                halt.set()
        self.bridge.check()
        return publishing.result()

    def conclude(self, summary: Summary, echo: Echo) -> bool:
        """Wait until everything is stored, end the bridge, compare. Whether all is well."""
        echo("Ending: waiting until everything sent is stored, then stopping the bridge ...")
        latency = self._latency()
        in_time = self._wait_stored(summary.published)
        begin = time.monotonic()
        code = self.bridge.stop()
        stopping_s = time.monotonic() - begin
        counts = self._count()
        _report(summary, counts, latency, echo)
        echo(f"the bridge left with exit code {code} within {duration(stopping_s)}")
        if not in_time:
            echo(f"not everything was stored within {STORED_S:g} s")
        well = code == 0 and counts.balances_with(summary.published)
        if not well:
            self.bridge.keep_log()
            echo(f"Something went wrong. The log of the bridge: {self.bridge.log}")
        return well

    def _show_figures(
        self, simulator: Simulator, publishing: Future[Summary], *, stop: threading.Event, show: _Line
    ) -> None:
        while not publishing.done() and self.bridge.is_running:
            show.update(self.bridge.status(), simulator.published)
            if stop.wait(1.0):
                break
        show.update(self.bridge.status(), simulator.published)

    def _latency(self) -> dict[str, float | None]:
        status = self.bridge.status()
        return status["latency_s"] if status else {}

    def _wait_stored(self, sent: int) -> bool:
        deadline = time.monotonic() + STORED_S
        with closing(psycopg2.connect(self.dsn)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            while time.monotonic() < deadline and self.bridge.is_running:
                cursor.execute(_ARRIVED)
                if (cursor.fetchone() or (0,))[0] >= sent:
                    return True
                # Another process stores them: there is nothing to wait on.
                time.sleep(0.2)
        return False

    def _count(self) -> Counts:
        with closing(psycopg2.connect(self.dsn)) as connection, connection.cursor() as cursor:
            cursor.execute(_COUNTS)
            row = cursor.fetchone()
        assert row is not None
        return Counts(*row)


def _report(summary: Summary, counts: Counts, latency: Mapping[str, float | None], echo: Echo) -> None:
    own = f"{counts.own_stored + counts.own_dead_letters:,}"
    if counts.own_dead_letters:
        own += f" ({counts.own_dead_letters:,} of them dead letters)"
    echo(
        f"messages sent = {summary.published:,}, stored = {counts.distinct:,},"
        f" lost {summary.published - counts.distinct - counts.dead_letters:,},"
        f" duplicated {counts.stored - counts.distinct:,}, dead letters {counts.dead_letters:,},"
        f" your own messages {own}"
    )
    echo(
        f"in {summary.seconds:.1f} s at {summary.rate:,.1f} messages per second; from arrival to commit"
        f" {duration(latency.get('p50'))} (median), {duration(latency.get('p99'))} (99th percentile)"
    )
    if summary.missed or summary.behind_max_s > 1:
        echo(
            f"this machine could not keep the schedule: up to {duration(summary.behind_max_s)} late,"
            f" {summary.missed:,} readings were not sent at all"
        )


class _Bridge:
    """The bridge as a process, with a guardian that ends it when the demo is killed."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.url = f"http://{settings['HTTP_HOST']}:{settings['HTTP_PORT']}/"
        self.log = folder / "bridge.log"
        self._port = int(settings["HTTP_PORT"])
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(_SETTINGS)}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARDED, folder, *_COMMAND],
                # Not the user's folder, whose .env is not meant.
                cwd=folder,
                env={**inherited, **settings},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the demo, which stops the bridge in good order.
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, stop: threading.Event) -> bool:
        """Whether it became ready before `stop` was set; DemoError when it ended or took too long."""
        deadline = time.monotonic() + READY_S
        reasons = ["it does not answer yet"]
        while not stop.is_set():
            self.check()
            try:
                reasons = fetch(HOST, self._port, path="/readyz")["reasons"]
            except NoStatus:
                pass
            else:
                if not reasons:
                    return True
            if time.monotonic() > deadline:
                raise self._failure(f"The bridge is not ready after {READY_S:g} s: {'; '.join(reasons)}.")
            stop.wait(0.1)
        return False

    def status(self) -> dict[str, Any] | None:
        """What `/api/status` says, None when it says nothing."""
        try:
            return fetch(HOST, self._port)
        except NoStatus:
            return None

    def check(self) -> None:
        """DemoError when the bridge has ended by itself."""
        if not self.is_running:
            raise self._failure(f"The bridge ended by itself with exit code {self._process.returncode}.")

    def stop(self) -> int:
        """Ask it to leave, and wait; its exit code (negative: killed, because it did not)."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(SHUTDOWN_S + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.close()
        return self._process.returncode

    def close(self) -> None:
        """End the process, however it is, and its guardian. Idempotent."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.communicate(b"ended\n")

    def keep_log(self) -> None:
        """Save the log from the folder that is about to go."""
        handle, name = tempfile.mkstemp(prefix="mqtt-bridge-demo-", suffix=".log")
        os.close(handle)
        self.log = Path(shutil.copy(self.log, name))

    def _failure(self, what: str) -> DemoError:
        self.keep_log()
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        return DemoError(f"{what} Its log ({self.log}) ends with:\n{tail}")


class _Line:
    """The one line of figures."""

    def __init__(self, *, devices: int, echo: Echo, terminal: TextIO | None) -> None:
        self._devices = devices
        self._echo = echo
        self._terminal = terminal
        self._next_line = time.monotonic() + LINE_EVERY_S

    def update(self, status: Mapping[str, Any] | None, sent: int) -> None:
        """Show the figures, in place on a terminal, else now and then."""
        if self._terminal is not None:
            width = shutil.get_terminal_size().columns - 1
            self._terminal.write(f"\r{self._text(status, sent)[:width]}\x1b[K")
            self._terminal.flush()
        elif time.monotonic() >= self._next_line:
            self._next_line += LINE_EVERY_S
            self._echo(self._text(status, sent))

    def close(self) -> None:
        """Leave the line standing, for what is printed next."""
        if self._terminal is not None:
            self._terminal.write("\n")
            self._terminal.flush()

    def _text(self, status: Mapping[str, Any] | None, sent: int) -> str:
        begin = f"{self._devices:,} devices, {sent:,} sent"
        if status is None:
            return f"{begin}, the bridge does not answer"
        messages, latency, per_s = status["messages"], status["latency_s"], status["rates"]["stored_per_s"]
        return (
            f"{begin}, {messages['stored']:,} stored, {status['rows_stored']:,} rows, {per_s:,.0f}/s,"
            f" p50 {duration(latency['p50'])}, p99 {duration(latency['p99'])}, {messages['in_flight']:,} in flight"
        )


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for the bridge's log, which is its working directory too; removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="mqtt-bridge-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
