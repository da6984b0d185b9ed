"""`mosquitto_sub | psql COPY`: two C programs and a pipe, the least that one can do.

It does not decode: a row is the topic and the raw payload, two texts, in a table without an index. Everything is one
COPY and one transaction, which begins with the first message and ends with the last (`-C`): cheaper is impossible, but
until then nobody sees a row, and one line that psql cannot read, or one cut connection, loses all. mosquitto_sub
acknowledges on receipt and flushes its output line by line.
"""

from __future__ import annotations

import shlex

from benchmarks import packages
from benchmarks.contestant import Stage
from benchmarks.one_program import OneProgram
from benchmarks.program import Program

FORMAT = r"%t\t%p"
"""Topic and payload, as COPY's text format has columns. (The payloads here hold no backslash.)"""


class MosquittoPsql(OneProgram):
    """See `Contestant`."""

    name = "mosquitto-psql"
    title = "mosquitto_sub piped into psql COPY, raw payloads, one transaction for all"
    guarantees = "none: acknowledges on receipt, commits at the very end"
    table = "CREATE TABLE raw (topic text, payload text)"
    stored = "raw"

    def install(self) -> str:
        """Both come with the servers of the tests."""
        packages.psql()
        packages.mosquitto_sub()
        return packages.mosquitto_version()

    def launch(self, program: Program, stage: Stage) -> None:
        """Start the pipe."""
        subscribe = packages.subscribe_command(stage, self.client_id, FORMAT, count=stage.messages)
        store = [str(packages.psql()), "-q", stage.dsn, "-c", "COPY raw FROM STDIN"]
        # The shell stays when both have ended: of it one reads what CPU they took.
        pipe = f"{shlex.join(subscribe)} | {shlex.join(store)}; exec sleep infinity"
        program.start(["/bin/sh", "-c", pipe], directory=stage.directory, environment={})
        program.wait_until_connected(stage.broker_port)


CONTESTANTS = (MosquittoPsql(),)
