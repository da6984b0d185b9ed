"""collectd (C, Debian): a collector of metrics, fed by mosquitto_sub, with its PostgreSQL writer.

Its own MQTT plugin reads only collectd's own payloads (`time:value:value`), no JSON. So the messages come by its other
way in, the exec plugin: mosquitto_sub and one line of awk that rewrites each message as PUTVAL. All three programs are
counted; a device that spoke collectd's format would save the awk and a pipe.

The values of a message are one value list of a type of ours, stored by one INSERT as a row with an array, in a table
without an index. A transaction lasts a second (`CommitInterval`), which is collectd's remedy for a commit per row; a
failing row costs all of them. It ends with the first value that is written after that second, so the plugin `uptime`
writes one every second. (With `FlushInterval`, meant for that, nine rows of ten were lost.) One write thread: with
more, two values of a device may overtake each other, and collectd drops what is older than the last. The queue before
it has no bound.
"""

from __future__ import annotations

import getpass
import os
import pwd
import shlex
import subprocess
from pathlib import Path

from psycopg2.extensions import parse_dsn

from benchmarks import packages
from benchmarks.contestant import Stage
from benchmarks.one_program import OneProgram
from benchmarks.program import Program
from mqtt_bridge.tools.embedded import debian
from mqtt_bridge.tools.embedded.account import Account

PACKAGES = ("collectd-core", "libpq5", "mawk")
TYPES = (
    "telemetry temperature:GAUGE:U:U, humidity:GAUGE:U:U, battery:GAUGE:U:U, rssi:GAUGE:U:U\nuptime value:GAUGE:0:U\n"
)
"""The topic is the rest of the identifier: host `bench`, plugin `device`, instance `000042`, type `telemetry`."""
PUTVAL = r"""{ printf "PUTVAL \"%s\" interval=1 %.3f:%s:%s:%s:%s\n", $1, $11 / 1000, $3, $5, $7, $9 }"""
"""The payload is cut at colons, commas and braces: values are at even places behind their names."""
CONFIGURATION = """
Hostname "bench"
BaseDir "{directory}"
PIDFile "{directory}/collectd.pid"
PluginDir "{root}/usr/lib/collectd"
TypesDB "{directory}/types.db"
WriteThreads 1
ReadThreads 1

LoadPlugin logfile
<Plugin logfile>
    LogLevel warning
    File "{directory}/collectd.log"
</Plugin>

<LoadPlugin uptime>
    Interval 1
</LoadPlugin>

LoadPlugin exec
<Plugin exec>
    Exec "{user}" "/bin/sh" "{directory}/subscribe.sh"
</Plugin>

LoadPlugin postgresql
<Plugin postgresql>
    <Writer store>
        Statement "INSERT INTO telemetry VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)"
        StoreRates false
    </Writer>
    <Database "{db_name}">
        Host "{db_host}"
        Port "{db_port}"
        User "{db_user}"
        Password "{db_password}"
        SSLMode "disable"
        Writer store
        CommitInterval 1
    </Database>
</Plugin>
"""


class Collectd(OneProgram):
    """See `Contestant`."""

    name = "collectd"
    title = "collectd, fed by mosquitto_sub, a transaction a second, one row of arrays per message"
    guarantees = "acknowledges on receipt: a crash loses what is queued in memory, and a second of what was inserted"
    table = (
        "CREATE TABLE telemetry (time timestamptz, host text, plugin text, plugin_instance text, type text,"
        ' type_instance text, names text[], types text[], "values" double precision[])'
    )
    stored = "telemetry WHERE type = 'telemetry'"
    at_most = 50_000

    def install(self) -> str:
        """Unpacked from Debian's packages."""
        root = packages.from_debian(self.name, *PACKAGES)
        packages.mosquitto_sub()
        environment = {**os.environ, **_libraries(root)}
        said = subprocess.run([root / "usr/sbin/collectd", "-h"], env=environment, capture_output=True, text=True)
        versions = [line.split(",")[0] for line in said.stdout.splitlines() if line.startswith("collectd ")]
        return versions[0] if versions else "unknown"

    def launch(self, program: Program, stage: Stage) -> None:
        """Write its three files, start it."""
        root = packages.from_debian(self.name, *PACKAGES)
        subscribe = packages.subscribe_command(stage, self.client_id, r"%t\t%p")
        (stage.directory / "types.db").write_text(TYPES)
        (stage.directory / "subscribe.sh").write_text(_pipe(subscribe, root))
        configuration = stage.directory / "collectd.conf"
        configuration.write_text(_configuration(stage, root))
        program.start(
            [root / "usr/sbin/collectd", "-f", "-C", configuration],
            directory=stage.directory,
            environment=_libraries(root),
        )
        program.wait_until_connected(stage.broker_port)


def _libraries(root: Path) -> dict[str, str]:
    return {"LD_LIBRARY_PATH": ":".join(map(str, debian.library_path(root)))}


def _pipe(subscribe: list[str], root: Path) -> str:
    # "interactive": else mawk would wait for a full buffer, and the last messages with it.
    translate = [str(root / "usr/bin/mawk"), "-W", "interactive", "-F", "[\t:,{}]+", PUTVAL]
    return f"{shlex.join(subscribe)} | {shlex.join(translate)}\n"


def _configuration(stage: Stage, root: Path) -> str:
    database = parse_dsn(stage.dsn)
    uid = Account.unprivileged().uid
    return CONFIGURATION.format(
        directory=stage.directory,
        root=root,
        user=getpass.getuser() if uid is None else pwd.getpwuid(uid).pw_name,  # as root it runs nothing
        db_name=database["dbname"],
        db_host=database["host"],
        db_port=database["port"],
        db_user=database["user"],
        db_password=database.get("password", ""),
    )


CONTESTANTS = (Collectd(),)
