"""A PostgreSQL and an MQTT broker of our own, on free loopback ports, for the demo and for tests.

`Postgres` and `Broker` are context managers that start a real server and take it away again. Neither needs Docker,
an account or a running service, both work as root and as an ordinary user, and both are gone when the program ends,
even when it is killed (`guarded` says how). For production, run your own.
"""

from mqtt_bridge.tools.embedded.account import EmbeddedServerError
from mqtt_bridge.tools.embedded.broker import Broker
from mqtt_bridge.tools.embedded.postgres import Postgres
from mqtt_bridge.tools.embedded.server import free_port

__all__ = ["Broker", "EmbeddedServerError", "Postgres", "free_port"]
