"""What a run happens on: servers, links, publisher and bridges, taken up together and taken down together."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Self

from mqtt_bridge.tools.embedded import Broker, Postgres
from tests.chaos.bridge import Bridge
from tests.chaos.link import Link
from tests.chaos.publisher import Publisher
from tests.chaos.schedule import Parameters
from tests.chaos.store import SERVER_SETTINGS, Store

CLIENT_ID = "chaos-bridge"
FULL_QUEUE = {"BRIDGE_QUEUE_SIZE": 100, "BRIDGE_BATCH_SIZE": 20}


class Stage:
    """A context manager; nothing runs before it is entered, and the bridges are started by others."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._take_up(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def spool_directory(self) -> Path:
        """Where the spool is, if there is one. It lives as long as the run, over any number of kills."""
        return self.bridge.directory / "spool"

    @property
    def client_ids(self) -> list[str]:
        """Of all processes of the bridge."""
        count = self.parameters.processes
        return [CLIENT_ID] if count == 1 else [f"{CLIENT_ID}-{number}" for number in range(1, count + 1)]

    @property
    def spool_directories(self) -> list[Path]:
        """Of all processes of the bridge."""
        if self.parameters.processes == 1:
            return [self.spool_directory]
        return [self.spool_directory / client_id for client_id in self.client_ids]

    @property
    def broker_log(self) -> str:
        """All that the broker has written."""
        return (self.broker.directory / "server.log").read_text(errors="replace")

    def _take_up(self, stack: ExitStack) -> None:
        parameters = self.parameters
        self.postgres = stack.enter_context(Postgres(settings=SERVER_SETTINGS))
        self.broker = stack.enter_context(Broker())
        self.store = stack.enter_context(closing(Store(self.postgres.dsn())))
        self.store.prepare()
        ports = self._take_up_links(stack)
        self.bridge = stack.enter_context(self._make_bridge("chaos-bridge", *ports))
        self.thief = stack.enter_context(self._make_bridge("chaos-thief", *ports))
        self._give_them_the_spool()
        self.publisher = stack.enter_context(Publisher(self.broker, parameters))

    def _take_up_links(self, stack: ExitStack) -> tuple[int, int]:
        """Ports of broker and database for the bridge. Without faults of the links it goes there directly: a proxy
        in Python would be what is measured."""
        parameters = self.parameters
        faults = parameters.cuts or parameters.stalls or parameters.freezes
        if not (faults or parameters.db_delay_ms or parameters.broker_delay_ms):
            return self.broker.port, self.postgres.port
        self.broker_link, self.database_link = (
            stack.enter_context(Link("127.0.0.1", port, delay_s=delay_ms / 1000))
            for port, delay_ms in (
                (self.broker.port, parameters.broker_delay_ms),
                (self.postgres.port, parameters.db_delay_ms),
            )
        )
        return self.broker_link.port, self.database_link.port

    def _make_bridge(self, name: str, broker_port: int, database_port: int) -> Bridge:
        parameters = self.parameters
        return Bridge(
            name,
            without_ledger=parameters.without_ledger,
            DATABASE_URL=self.store.dsn.replace(f":{self.postgres.port}/", f":{database_port}/"),
            MQTT_HOST="127.0.0.1",
            MQTT_PORT=broker_port,
            MQTT_PROTOCOL=parameters.protocol,
            MQTT_RECEIVE=parameters.receive,
            MQTT_TOPICS="chaos/{device}/telemetry",
            MQTT_CLIENT_ID=CLIENT_ID,
            BRIDGE_WORKERS=parameters.workers,
            BRIDGE_PROCESSES=parameters.processes,
            **(FULL_QUEUE if parameters.full_queue else {}),
        )

    def _give_them_the_spool(self) -> None:
        """One disk for both: who takes the client id over has to find what the other has acknowledged."""
        if self.parameters.spool != "off":
            settings = {
                "BRIDGE_SPOOL": self.parameters.spool,
                "BRIDGE_SPOOL_DIR": self.spool_directory,
                "BRIDGE_SPOOL_MAX_MB": self.parameters.spool_max_mb,
            }
            for bridge in (self.bridge, self.thief):
                bridge.settings |= settings
