"""Fetches what is measured from the package registries, by their ordinary clients, into folders of our own.

Each function is idempotent: a folder that exists is complete. Unavailable says what the client has said.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.contestant import Stage, Unavailable, install_directory
from mqtt_bridge.tools.embedded import EmbeddedServerError, debian
from mqtt_bridge.tools.embedded.account import Account
from mqtt_bridge.tools.embedded.mosquitto import find_mosquitto
from mqtt_bridge.tools.embedded.postgres import find_programs

_TIMEOUT_S = 600


def from_pypi(name: str, *requirements: str) -> Path:
    """A folder for PYTHONPATH with these distributions and what they need."""

    def fill(folder: Path) -> None:
        _run([sys.executable, "-m", "pip", "install", "-q", "--no-input", "--target", str(folder), *requirements])

    return _filled(name, requirements, fill)


def from_npm(name: str, *packages: str) -> Path:
    """A folder with node_modules."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise Unavailable("Node.js and npm are not there")

    def fill(folder: Path) -> None:
        _run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), *packages])

    return _filled(name, packages, fill)


def from_debian(name: str, *packages: str) -> Path:
    """A folder with these packages unpacked, and the packages they need and the system lacks."""
    target = install_directory(name) / "root"
    try:
        debian.unpack(packages, target)
    except EmbeddedServerError as error:
        raise Unavailable(str(error)) from error
    return target


def mosquitto_sub() -> tuple[str, ...]:
    """The command, with the environment that it may need; of the Mosquitto that the broker is."""
    try:
        mosquitto = find_mosquitto(Account())
    except EmbeddedServerError as error:
        raise Unavailable(str(error)) from error
    if mosquitto.publisher is None:
        raise Unavailable("mosquitto_sub is not there: apt-get install mosquitto-clients")
    prefix = ("env", *mosquitto.environment) if mosquitto.environment else ()
    return (*prefix, str(mosquitto.publisher.with_name("mosquitto_sub")))


def subscribe_command(stage: Stage, client_id: str, template: str, *, count: int | None = None) -> list[str]:
    """mosquitto_sub on a standing session at QoS 1, printing messages by this template; ends after `count`."""
    broker = ["-h", stage.broker_host, "-p", str(stage.broker_port), "-i", client_id, "-c", "-q", "1"]
    ending = [] if count is None else ["-C", str(count)]
    return [*mosquitto_sub(), *broker, "-t", stage.topic_filter, "-F", template, *ending]


def mosquitto_version() -> str:
    """What mosquitto_sub says of itself."""
    said = subprocess.run([*mosquitto_sub(), "--version"], capture_output=True, text=True, check=False).stdout
    return " ".join(said.split()) or "unknown"


def psql() -> Path:
    """The psql beside the embedded PostgreSQL."""
    program = find_programs(Account()) / "psql"
    if not program.exists():
        raise Unavailable("psql is not there: apt-get install postgresql-client")
    return program


def _filled(name: str, wanted: Sequence[str], fill: Callable[[Path], object]) -> Path:
    """A folder that has a name for just these versions, and appears when it is complete."""
    parent = install_directory(name)
    target = parent / "+".join(wanted).replace("/", "_")
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=parent) as scratch:
            fresh = Path(scratch) / "fresh"
            fresh.mkdir(mode=0o755)
            fill(fresh)
            fresh.rename(target)
    return target


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} could not fetch it: {error}") from error
    if done.returncode:
        raise Unavailable(f"{Path(command[0]).name} could not fetch it: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout
