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
from types import TracebackType
from typing import Self

from mqtt_bridge.tools.embedded.mosquitto import Mosquitto, find_mosquitto
from mqtt_bridge.tools.embedded.server import HOST, EmbeddedServerError, GuardedServer, free_port, wait_until

PROJECT_CONFIG = Path(__file__).with_name("mosquitto.conf")

_START_TIMEOUT_S = 30.0
_PORT_ATTEMPTS = 5

# What differs from machine to machine, and therefore is not taken from the project's file.
_REPLACED = frozenset({"listener", "port", "bind_address", "persistence_location", "pid_file", "user", "include_dir"})


class Broker:
    """One Mosquitto with one persistence folder.

    `directory` None: a temporary one, removed at the end. `port` None: a free one, kept through restarts.
    `config_lines` are added to `config`, each in place of the lines with the same first word
    (`["max_queued_messages 10"]`); a further `listener` line and what belongs to it may be among them.
    """

    host = HOST

    def __init__(
        self,
        directory: Path | None = None,
        *,
        port: int | None = None,
        config_lines: Sequence[str] = (),
        config: Path = PROJECT_CONFIG,
    ) -> None:
        # SIGTERM writes the persistence file.
        self._server = GuardedServer(directory, name="mosquitto", stop_signal=signal.SIGTERM)
        self._mosquitto: Mosquitto | None = None
        self._port = port
        self._may_choose_port = port is None
        self._config = config
        self._config_lines = tuple(config_lines)
        # Whoever connects without a client id is given one with this prefix: that is how we recognise our broker.
        self._mark = f"embedded-{secrets.token_hex(8)}-"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The TCP port; raises EmbeddedServerError before the first start."""
        if self._port is None:
            raise EmbeddedServerError("mosquitto was never started.")
        return self._port

    @property
    def running(self) -> bool:
        """Whether the broker's process exists."""
        return self._server.running

    @property
    def directory(self) -> Path:
        """The folder with mosquitto.conf, mosquitto.db and server.log."""
        return self._server.directory

    def start(self) -> None:
        """Start, and return when the broker answers. Idempotent. Raises EmbeddedServerError."""
        if self.running:
            return
        self._server.open()
        self._mosquitto = self._mosquitto or find_mosquitto(self._server.account)
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            if self._port is None:
                self._port = free_port()
            if self._start_once(self._mosquitto, last=attempt == _PORT_ATTEMPTS):
                self._may_choose_port = False
                return
            if self._may_choose_port:
                self._port = None

    def stop(self) -> None:
        """SIGTERM: sessions and queues are written to disk. Idempotent; they stay until `close`."""
        self._server.stop(signal.SIGTERM)

    def restart(self) -> None:
        """Stop and start on the same port, with everything that is persistent."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """SIGKILL: what came since the last autosave is lost."""
        self._server.kill()

    def close(self) -> None:
        """Stop for good, remove a temporary folder. Idempotent."""
        try:
            self.stop()
        finally:
            self._server.close()

    def pub_command(self, topic: str, payload: str, qos: int = 1) -> str:
        """A shell line, ready to paste, that publishes one message (through paho where mosquitto_pub is missing)."""
        arguments = ("-h", HOST, "-p", str(self.port), "-q", str(qos), "-t", topic, "-m", payload)
        line = self._mosquitto.publish_line(*arguments) if self._mosquitto is not None else None
        if line is not None:
            return line
        call = f"p.single({topic!r}, {payload!r}, {qos}, hostname={HOST!r}, port={self.port})"
        return shlex.join([sys.executable, "-c", f"import paho.mqtt.publish as p; {call}"])

    def _start_once(self, mosquitto: Mosquitto, *, last: bool) -> bool:
        """True when it answers, False when another attempt may help; raises EmbeddedServerError when none will."""
        config = self._server.directory / "mosquitto.conf"
        config.write_text(self._configuration())
        config.chmod(0o644)
        self._server.launch(*mosquitto.command, "-c", config)
        wait_until(
            lambda: self._answers() or not self.running, "Mosquitto to start", _START_TIMEOUT_S, self._server.log_tail
        )
        if self.running:
            return True
        self._server.wait()
        log = self._server.log_tail()
        if not last and "Address already in use" in log:
            return False
        raise EmbeddedServerError(f"Mosquitto did not start.\n{log}")

    def _configuration(self) -> str:
        own = [
            f"listener {self.port} {HOST}",
            f"persistence_location {self._server.directory}/",
            f"auto_id_prefix {self._mark}",
        ]
        replaced = _REPLACED.union(*(line.split()[:1] for line in self._config_lines))
        settings = [line for line in self._config.read_text().splitlines() if line.strip() and line[0] != "#"]
        kept = [line for line in settings if line.split()[0] not in replaced]
        return "\n".join([*own, *kept, *self._config_lines, ""])

    def _answers(self) -> bool:
        """Whether our broker answers on the port. Raises EmbeddedServerError where somebody else's does."""
        answer = _connect_packet_answer(self.port)
        if answer is None:
            return False
        if self._mark.encode() in answer:
            return True
        # A broker that wants passwords names no client id. Ours would have ended by now, had it not got the port.
        return answer[3:4] not in (b"", b"\x00") and self._survives()

    def _survives(self) -> bool:
        try:
            self._server.wait(timeout_s=0.3)
        except EmbeddedServerError:
            return True
        return False


def _connect_packet_answer(port: int) -> bytes | None:
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
