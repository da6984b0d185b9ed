"""Node-RED (Node.js, npm): `mqtt in`, and a function node that inserts by a pool of connections.

There are palettes with PostgreSQL nodes; they wrap the same `pg` package that the function node here uses directly,
which saves a node and a template per message: that favours it. One wide row a message by a prepared statement, ten
connections (pg's default). No editor, no HTTP. mqtt.js acknowledges on receipt, and what the database cannot keep up
with waits in memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import packages
from benchmarks.contestant import Stage
from benchmarks.one_program import OneProgram
from benchmarks.program import Program

NODE_RED = "node-red@4.1.8"
PG = "pg@8"
OPEN_POOL = "context.set('pool', new pg.Pool({connectionString: env.get('BENCH_DSN')}));"
CLOSE_POOL = "context.get('pool').end();"
INSERT = """
const reading = msg.payload;
context.get('pool').query({
    name: 'insert',
    text: 'INSERT INTO telemetry VALUES (to_timestamp($1 / 1000.0), $2, $3, $4, $5, $6)',
    values: [reading.ts, msg.topic.split('/')[1],
             reading.temperature, reading.humidity, reading.battery, reading.rssi],
}).catch(error => node.error(error.message));
"""
SETTINGS = """
module.exports = {
    flowFile: 'flows.json', credentialSecret: false, httpAdminRoot: false, httpNodeRoot: false,
    functionExternalModules: true, externalModules: {autoInstall: false},
    logging: {console: {level: 'info', metrics: false, audit: false}},
};
"""


class NodeRed(OneProgram):
    """See `Contestant`."""

    name = "node-red"
    title = "Node-RED: mqtt in, function node with a pool of ten connections, one wide row per message"
    guarantees = "acknowledges on receipt: a crash loses what is queued in memory"
    table = (
        "CREATE TABLE telemetry (time timestamptz, device text, temperature double precision,"
        " humidity double precision, battery double precision, rssi double precision)"
    )
    at_most = 20_000

    def install(self) -> str:
        """From npm. The version of Node-RED is the last for Node.js 18 and 20."""
        packages.from_npm(self.name, PG)
        return str(json.loads((self._modules() / "node-red/package.json").read_text())["version"])

    def launch(self, program: Program, stage: Stage) -> None:
        """Write settings and flow, start it, wait for its connection to the broker."""
        (stage.directory / "settings.js").write_text(SETTINGS)
        (stage.directory / "flows.json").write_text(json.dumps(_flow(stage, self.client_id)))
        (stage.directory / "package.json").write_text(json.dumps({"dependencies": {"pg": "8"}}))
        (stage.directory / "node_modules").symlink_to(packages.from_npm(self.name, PG) / "node_modules")
        program.start(
            ["node", self._modules() / "node-red/red.js", "--userDir", stage.directory],
            directory=stage.directory,
            environment={"BENCH_DSN": stage.dsn},
        )
        program.wait_until_it_says("Connected to broker")

    def _modules(self) -> Path:
        return packages.from_npm(self.name, NODE_RED) / "node_modules"


def _flow(stage: Stage, client_id: str) -> list[dict[str, Any]]:
    """What the editor would save."""
    broker = {
        "id": "broker", "type": "mqtt-broker", "broker": stage.broker_host, "port": str(stage.broker_port),
        "clientid": client_id, "protocolVersion": "4", "cleansession": False, "autoConnect": True, "keepalive": "60",
    }  # fmt: skip
    subscription = {
        "id": "in", "type": "mqtt in", "z": "tab", "broker": "broker", "topic": stage.topic_filter, "qos": "1",
        "datatype": "json", "inputs": 0, "wires": [["store"]],
    }  # fmt: skip
    store = {
        "id": "store", "type": "function", "z": "tab", "libs": [{"var": "pg", "module": "pg"}], "outputs": 0,
        "initialize": OPEN_POOL, "func": INSERT, "finalize": CLOSE_POOL, "wires": [],
    }  # fmt: skip
    return [{"id": "tab", "type": "tab", "label": "bridge"}, broker, subscription, store]


CONTESTANTS = (NodeRed(),)
