"""Fixtures of the acceptance tests: programs that are gone after the test, and what must never be in their output."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mqtt_bridge.tools.embedded import Broker
from tests.program import Program

MakeBridge = Callable[..., Program]


@pytest.fixture
def site() -> str:
    """A first topic level of this test's own."""
    return f"site-{secrets.token_hex(4)}"


@pytest.fixture
def make_bridge(tmp_path: Path, site: str) -> Iterator[MakeBridge]:
    """Makes a bridge for `{site}/{device}/telemetry` between a database (URL) and a broker; the test starts it.

    A bridge that is left running is killed after the test. A traceback or a warning of Python in its output fails the
    test, whatever else was seen.
    """
    programs: list[Program] = []
    with ExitStack() as stack:

        def make(database: str, broker: Broker | None = None, **settings: object) -> Program:
            at_broker = {"MQTT_HOST": broker.host, "MQTT_PORT": broker.port} if broker else {}
            directory = tmp_path / f"bridge-{len(programs)}"
            directory.mkdir()
            defaults = {
                "DATABASE_URL": database,
                "MQTT_TOPICS": f"{site}/{{device}}/telemetry",
                "MQTT_CLIENT_ID": f"bridge-{site}-{len(programs)}",
            }
            program = stack.enter_context(Program(directory, **(defaults | at_broker | settings)))
            programs.append(program)
            return program

        yield make
    for program in programs:
        output = program.log_of_all_runs
        print(output)  # pytest shows it where the test has failed
        assert python_complaints(output) == []


def python_complaints(output: str) -> list[str]:
    """Lines of a traceback or of a warning of Python.

    paho leaves the socket of a failed TLS handshake to the garbage collector, which takes it at once, with a warning.
    """
    lines = [line for line in output.splitlines() if "Traceback" in line or "Warning: " in line]
    return [line for line in lines if "unclosed <ssl.SSLSocket" not in line and "Enable tracemalloc" not in line]
