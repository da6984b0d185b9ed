"""A Mosquitto for the demo and for tests: `with Broker() as broker: client.connect(broker.host, broker.port)`.

It runs with the project's mosquitto/mosquitto.conf, so that its limits are those that users get; only the listener
and the folders are replaced. (`mosquitto.conf` beside this module is a link to that file, and in an installed package
a copy of it.)
"""

from __future__ import annotations

import secrets
import shlex
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from mqtt_bridge.tools.embedded.account import EmbeddedServerError
from mqtt_bridge.tools.embedded.mosquitto import Mosquitto, find_mosquitto
from mqtt_bridge.tools.embedded.server import HOST, EmbeddedServer

PROJECT_CONFIG = Path(__file__).with_name("mosquitto.conf")

# What differs from machine to machine, and therefore is not taken from the project's file.
_REPLACED = frozenset({"listener", "port", "bind_address", "persistence_location", "pid_file", "user", "include_dir"})


class Broker(EmbeddedServer):
    """One Mosquitto with one persistence folder, which holds mosquitto.conf, mosquitto.db and server.log.

    `config_lines` are added to `config`, each in place of the lines with the same first word
    (`["max_queued_messages 10"]`); a further `listener` line and what belongs to it may be among them. `stop` writes
    sessions and queues to disk; `kill` loses what came since the last autosave.
    """

    name = "mosquitto"
    stop_signal = signal.SIGTERM

    def __init__(
        self,
        directory: Path | None = None,
        *,
        port: int | None = None,
        config_lines: Sequence[str] = (),
        config: Path = PROJECT_CONFIG,
    ) -> None:
        super().__init__(directory, port=port)
        self._config = config
        self._config_lines = tuple(config_lines)
        self._mosquitto: Mosquitto | None = None
        # Whoever connects without a client id is given one with this prefix: that is how we recognise our broker.
        self._mark = f"embedded-{secrets.token_hex(8)}-"

    def restart(self) -> None:
        """Stop and start on the same port, with everything that is persistent."""
        self.stop()
        self.start()

    def pub_command(self, topic: str, payload: str, qos: int = 1) -> str:
        """A shell line, ready to paste, that publishes one message (through paho where mosquitto_pub is missing)."""
        arguments = ("-h", HOST, "-p", str(self.port), "-q", str(qos), "-t", topic, "-m", payload)
        line = self._mosquitto.publish_line(*arguments) if self._mosquitto is not None else None
        if line is not None:
            return line
        call = f"p.single({topic!r}, {payload!r}, {qos}, hostname={HOST!r}, port={self.port})"
        return shlex.join([sys.executable, "-c", f"import paho.mqtt.publish as p; {call}"])

    def _prepare(self) -> None:
        self._mosquitto = self._mosquitto or find_mosquitto(self._guarded.account)

    def _command(self, port: int) -> Sequence[str | Path]:
        assert self._mosquitto is not None
        config = self.directory / "mosquitto.conf"
        config.write_text(self._configuration(port))
        config.chmod(0o644)
        return [*self._mosquitto.command, "-c", config]

    def _configuration(self, port: int) -> str:
        own = [
            f"listener {port} {HOST}",
            f"persistence_location {self.directory}/",
            f"auto_id_prefix {self._mark}",
        ]
        replaced = _REPLACED.union(*(line.split()[:1] for line in self._config_lines))
        settings = [line for line in self._config.read_text().splitlines() if line.strip() and line[0] != "#"]
        kept = [line for line in settings if line.split()[0] not in replaced]
        return "\n".join([*own, *kept, *self._config_lines, ""])

    def _answers(self, port: int) -> bool:
        answer = _answer_to_connect(port)
        if answer is None:
            return False
        if self._mark.encode() in answer or (_refuses(answer) and self._survives()):
            return True
        if self._survives():
            raise EmbeddedServerError(f"Port {port} is answered by another broker.")
        return False

    def _survives(self) -> bool:
        """Whether our broker still runs when one that did not get its port would have ended."""
        try:
            self._guarded.wait(timeout_s=0.5)
        except EmbeddedServerError:
            return True
        return False


def _refuses(connack: bytes) -> bool:
    """A broker that wants passwords names no client id: whether it is ours cannot be read from its answer."""
    return connack[3:4] not in (b"", b"\x00")


def _answer_to_connect(port: int) -> bytes | None:
    """What answers a CONNECT without client id (MQTT 5, section 3.1.3.1): the CONNACK, None where nobody does."""
    connect = b"\x00\x04MQTT" + bytes([5, 0x02]) + struct.pack("!H", 10) + b"\x00" + b"\x00\x00"
    try:
        with socket.create_connection((HOST, port), timeout=2) as connection:
            connection.sendall(b"\x10" + bytes([len(connect)]) + connect)
            answer = connection.recv(1024)
            connection.sendall(b"\xe0\x00")
    except OSError:
        return None
    return answer or None
