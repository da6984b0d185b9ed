"""`mqtt-bridge demo`, as people start it: what it prints can be pasted, what it sent is stored, and nothing stays."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.waiting import wait_until

SUMMARY = re.compile(
    r"messages sent = (?P<sent>[\d,]+), stored = (?P<stored>[\d,]+), lost (?P<lost>[\d,]+),"
    r" duplicated (?P<duplicated>[\d,]+), dead letters (?P<dead>[\d,]+), your own messages (?P<own>[\d,]+)"
)


class Demo:
    """A demo that runs: its lines up to the invitation to try it, and the rest when it has ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.lines: list[str] = []
        for line in process.stdout:
            self.lines.append(line.rstrip("\n"))
            if "Ctrl-C" in line:
                break

    def value(self, label: str) -> str:
        """What stands behind a label (`Broker`)."""
        return next(line.split()[-1] for line in self.lines if line.strip().startswith(label))

    def command(self, announcement: str) -> str:
        """The shell line below the line with this announcement."""
        index = next(i for i, line in enumerate(self.lines) if announcement in line)
        return self.lines[index + 1].strip()

    def end(self) -> int:
        """Wait for the end, with everything printed until then; the exit code."""
        assert self.process.stdout is not None
        self.lines += self.process.stdout.read().splitlines()
        return self.process.wait(10)

    @property
    def ports(self) -> list[int]:
        """Where broker, database and bridge listen."""
        values = [self.value(label) for label in ("Broker", "Database", "Status page")]
        return [int(re.findall(r":(\d+)", value)[-1]) for value in values]

    @property
    def summary(self) -> dict[str, int]:
        found = next(match for line in self.lines if (match := SUMMARY.match(line)))
        return {name: int(value.replace(",", "")) for name, value in found.groupdict().items()}


@contextmanager
def demo(folder: Path, *arguments: str) -> Iterator[Demo]:
    """A demo whose temporary files go to `folder`; a user's own settings are around, and must not matter."""
    (folder / ".env").write_text("MQTT_HOST=no-such-host.invalid\n")
    environment = {**os.environ, "TMPDIR": str(folder), "MQTT_PORT": "1", "PGHOST": "no-such-host.invalid"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mqtt_bridge", "demo", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield Demo(process)
        finally:
            process.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that the servers' account may enter too."""
    for path in [tmp_path, *tmp_path.parents]:
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    tmp_path.chmod(0o777)
    return tmp_path


def shell(line: str) -> str:
    done = subprocess.run(line, shell=True, text=True, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != ".env"]


def assert_nothing_is_left(ports: list[int], folder: Path) -> None:
    wait_until(lambda: not any(map(is_open, ports)), timeout_s=30, what="the servers and the bridge to end")
    wait_until(lambda: not left_in(folder), timeout_s=30, what="the temporary folders to go")


def test_the_printed_lines_can_be_pasted_and_everything_sent_is_stored(folder):
    with demo(folder, "--duration", "5", "--devices", "20") as running:
        ports = running.ports
        shell(running.command("Publish a message of your own"))
        wait_until(lambda: "21.5" in shell(running.command("see what it became")), what="the row of the own message")
        code = running.end()

    assert code == 0, "\n".join(running.lines)
    assert running.summary == {"sent": 100, "stored": 100, "lost": 0, "duplicated": 0, "dead": 0, "own": 1}
    assert_nothing_is_left(ports, folder)


def test_ctrl_c_ends_the_demo_with_a_summary(folder):
    with demo(folder, "--devices", "50", "--interval", "0.2") as running:
        ports = running.ports
        wait_until(lambda: "21.5" in _publish_and_look(running), what="the row of the own message")
        running.process.send_signal(signal.SIGINT)
        code = running.end()

    assert code == 0, "\n".join(running.lines)
    assert running.summary["sent"] == running.summary["stored"] > 0
    assert_nothing_is_left(ports, folder)


def test_killing_the_demo_leaves_nothing_behind(folder):
    with demo(folder, "--devices", "20") as running:
        ports = running.ports
        assert all(map(is_open, ports))

        running.process.kill()
        running.process.wait()

    assert_nothing_is_left(ports, folder)


def test_a_bridge_that_dies_is_reported_with_its_log(folder):
    with demo(folder, "--devices", "20") as running:
        http_port = running.ports[-1]
        os.kill(_listener_pid(http_port), signal.SIGKILL)
        code = running.end()

    assert code == 1, "\n".join(running.lines)
    message = next(line for line in running.lines if "The bridge ended by itself" in line)
    (log,) = re.findall(r"\((\S+\.log)\)", message)
    assert Path(log).exists()
    assert left_in(folder) == [Path(log).name]


def _publish_and_look(running: Demo) -> str:
    shell(running.command("Publish a message of your own"))
    return shell(running.command("see what it became"))


def _listener_pid(port: int) -> int:
    """The process that listens on the port, found in /proc."""
    inodes = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
    }
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            links = {os.readlink(link) for link in folder.iterdir()}
        except OSError:
            continue
        if links & {f"socket:[{inode}]" for inode in inodes}:
            return int(folder.parent.name)
    raise AssertionError(f"Nobody listens on {port}")
