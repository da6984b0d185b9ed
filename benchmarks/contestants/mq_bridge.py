"""mq-bridge (https://github.com/marcomq/mq-bridge): a bridge between many systems, with a core in Rust, from PyPI.

Its nearest relative here: MQTT in, batches, COPY out, acknowledged after the write. Only configuration: no handler in
Python, so all work is done by its core (rumqttc and sqlx on tokio). One wide row a message: its tokens name top-level
fields of the payload, so the topic, and with it the device, is not stored (the MQTT input does not hand it on).
Batches of 2,000: those of 8,000 were no faster, those of 512, its default, half as fast. What else was tried made no
difference that stood out (README.md).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import packages
from benchmarks.contestant import Stage
from benchmarks.one_program import OneProgram
from benchmarks.program import Program

VERSION = "1.2.0"
INSERT = (
    "INSERT INTO telemetry (ts, temperature, humidity, battery, rssi) VALUES (${payload:ts}, ${payload:temperature},"
    " ${payload:humidity}, ${payload:battery}, ${payload:rssi})"
)
ROOT = Path(__file__).parents[2]
RUNNING = "the route runs"


class MqBridge(OneProgram):
    """See `Contestant`."""

    name = "mq-bridge"
    title = "mq-bridge (Rust core), batches of 2,000 by COPY, one wide row per message"
    guarantees = "acknowledges after the commit: at least once"
    table = (
        "CREATE TABLE telemetry (ts bigint, temperature double precision,"
        " humidity double precision, battery double precision, rssi double precision)"
    )

    def install(self) -> str:
        """From PyPI."""
        self._folder()
        return VERSION

    def launch(self, program: Program, stage: Stage) -> None:
        """Start this module as a process, which runs the route."""
        broker = f"tcp://{stage.broker_host}:{stage.broker_port}"
        program.start(
            [sys.executable, "-m", type(self).__module__, broker, self.client_id, stage.topic_filter, stage.dsn],
            directory=stage.directory,
            environment={"PYTHONPATH": f"{ROOT}:{self._folder()}"},
        )
        program.wait_until_it_says(RUNNING)

    def _folder(self) -> Path:
        return packages.from_pypi(self.name, f"mq-bridge=={VERSION}")


CONTESTANTS = (MqBridge(),)


# -- in the process


def route(broker: str, client_id: str, topic_filter: str, dsn: str) -> dict[str, Any]:
    """The configuration."""
    subscription = {
        "url": broker,
        "topic": topic_filter,
        "client_id": client_id,
        "qos": 1,
        "protocol": "v3",
        "clean_session": False,
        "queue_capacity": 10_000,
    }
    table = {"url": dsn, "table": "telemetry", "insert_query": INSERT, "bulk_copy": True}
    return {"input": {"mqtt": subscription}, "output": {"sqlx": table}, "batch_size": 2_000, "concurrency": 2}


def run() -> None:
    """For ever."""
    import mq_bridge  # of the folder on PYTHONPATH

    with mq_bridge.Route.from_config(route(*sys.argv[1:])) as running:
        print(RUNNING, flush=True)
        running.join()


if __name__ == "__main__":
    run()
