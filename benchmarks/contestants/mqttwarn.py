"""mqttwarn with its postgres service: a notifier of many services (Python, PyPI), used as a bridge.

The service opens a connection for every message and asks the catalogue for the columns, then inserts one row: the
fields of the payload that have a column of that name, and the payload. Eight workers (the default is one: a third as
fast, in a run each). Nothing is logged below warnings.
"""

from __future__ import annotations

import sys
from pathlib import Path

from psycopg2.extensions import parse_dsn

from benchmarks import packages
from benchmarks.contestant import Stage
from benchmarks.one_program import OneProgram
from benchmarks.program import Program

VERSION = "0.36.1"
SETTINGS = """
[defaults]
hostname = '{host}'
port = {port}
clientid = '{client_id}'
cleansession = False
protocol = 4
lwt = None
logfile = 'stream://sys.stderr'
loglevel = WARNING
num_workers = 8
launch = postgres

[config:postgres]
host = '{db_host}'
port = {db_port}
user = '{db_user}'
pass = '{db_password}'
dbname = '{db_name}'
targets = {{ 'telemetry': ['telemetry', 'payload'] }}

[{topic_filter}]
qos = 1
targets = postgres:telemetry
"""


class Mqttwarn(OneProgram):
    """See `Contestant`."""

    name = "mqttwarn"
    title = "mqttwarn, its postgres service, eight workers: a connection and one wide row per message"
    guarantees = "acknowledges on receipt: a crash loses what is queued in memory, a failure to store the message"
    table = (
        "CREATE TABLE telemetry (topic text, payload text, ts bigint, temperature double precision,"
        " humidity double precision, battery double precision, rssi double precision)"
    )
    at_most = 1_000

    def install(self) -> str:
        """From PyPI, with a paho of its own (below 2)."""
        self._folder()
        return VERSION

    def launch(self, program: Program, stage: Stage) -> None:
        """Write mqttwarn.ini, start it."""
        settings = stage.directory / "mqttwarn.ini"
        settings.write_text(_settings(stage, self.client_id))
        program.start(
            [sys.executable, self._folder() / "bin/mqttwarn"],
            directory=stage.directory,
            environment={"PYTHONPATH": str(self._folder()), "MQTTWARNINI": str(settings)},
        )
        program.wait_until_connected(stage.broker_port)

    def _folder(self) -> Path:
        return packages.from_pypi(self.name, f"mqttwarn=={VERSION}")


def _settings(stage: Stage, client_id: str) -> str:
    database = parse_dsn(stage.dsn)
    return SETTINGS.format(
        host=stage.broker_host,
        port=stage.broker_port,
        client_id=client_id,
        topic_filter=stage.topic_filter,
        db_host=database["host"],
        db_port=database["port"],
        db_user=database["user"],
        db_password=database.get("password", ""),
        db_name=database["dbname"],
    )


CONTESTANTS = (Mqttwarn(),)
