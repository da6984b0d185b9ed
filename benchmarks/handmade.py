"""Bridges that are written by hand, on paho-mqtt and psycopg2: what their contestants, and their processes, share.

Such a bridge is one module of `benchmarks/contestants/`, which is both: imported, it has `CONTESTANTS`; started with
`python -m`, it is the process that is measured. `HandMade` is for the harness, the rest for that process.

They store four rows a message in a table like the bridge's own, with the same index but without partitions (one table
costs the server less than many: that favours them).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks.contestant import Stage
from benchmarks.one_program import OneProgram
from benchmarks.program import Program

ROOT = Path(__file__).parents[1]

OnMessage = Callable[[mqtt.Client, Any, mqtt.MQTTMessage], None]


class HandMade(OneProgram):
    """A contestant whose program is the module that it stands in."""

    rows_per_message = 4
    table = (
        "CREATE TABLE readings (time timestamptz NOT NULL, device text NOT NULL, metric text NOT NULL,"
        " value double precision); "
        "CREATE INDEX readings_device_metric_time ON readings (device, metric, time DESC)"
    )
    stored = "readings WHERE metric = 'temperature'"

    def install(self) -> str:
        """Nothing to do: the bridge itself needs the same packages."""
        return f"paho-mqtt {version('paho-mqtt')}, psycopg2 {version('psycopg2-binary')}"

    def launch(self, program: Program, stage: Stage) -> None:
        """Start the module, tell it where things are."""
        told = [stage.broker_host, str(stage.broker_port), self.client_id, stage.topic_filter, stage.dsn]
        program.start(
            [sys.executable, "-m", type(self).__module__, *told],
            directory=stage.directory,
            environment={"PYTHONPATH": str(ROOT)},
        )
        program.wait_until_connected(stage.broker_port)


# -- in the process


def connect(on_message: OnMessage, *, manual_ack: bool = False) -> mqtt.Client:
    """A client that is subscribed at QoS 1, with a session that lasts. The caller runs its loop.

    MQTT 3.1.1: with MQTT 5 paho takes twice the CPU.
    """
    host, port, client_id, topic_filter = sys.argv[1:5]
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, clean_session=False, manual_ack=manual_ack)
    client.on_connect = lambda client, *_: client.subscribe(topic_filter, qos=1)
    client.on_message = on_message
    client.connect(host, int(port))
    return client


def database() -> str:
    """The URL that the process was told."""
    return sys.argv[5]


def device(topic: str) -> str:
    """The second level."""
    return topic.split("/", 2)[1]
