"""A short visit to the broker, without pipeline: for commands that look, or that end a session.

Threads: all in the caller's.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mqtt_bridge.acks import AckTracker, SendAcks
from mqtt_bridge.broker_connection import BrokerConnection
from mqtt_bridge.broker_limits import DropWatch
from mqtt_bridge.errors import explain_hangup
from mqtt_bridge.model import Run
from mqtt_bridge.settings import Settings

BROKER_TIMEOUT_S = 10.0


class _Discard:
    """An inbox that wants nothing."""

    session_to_raise = None
    rest_s = 0.0

    def connected(self, *, session_present: bool, send_acks: SendAcks) -> None:
        """Nothing to prepare."""

    def disconnected(self) -> None:
        """Nothing to forget."""

    def receive(self, run: Run) -> None:
        """Copies for the guest; the bridge's own session gets every message as well."""

    def prove(self, positions: Sequence[int]) -> None:
        """Nothing was acknowledged."""


@contextmanager
def visit(
    settings: Settings, *, filters: Sequence[str], lasting: bool, drops: DropWatch | None = None
) -> Iterator[BrokerConnection]:
    """A connection that is left in good order; `lasting` as in `BrokerConnection`.

    OSError where the broker cannot be reached, SettingsError where a secret or a TLS file cannot be read.
    """
    connection = BrokerConnection(
        settings, filters=filters, inbox=_Discard(), acks=AckTracker(), lasting=lasting, drops=drops
    )
    try:
        connection.open()
        yield connection
    finally:
        connection.leave()
        connection.step(0.1)  # that is when DISCONNECT is written
        connection.close()


def named_by_user(settings: Settings) -> bool | None:
    """Whether the broker makes the user name the client id, as Mosquitto's `use_username_as_clientid` does.

    It says nothing of it. But two client ids that nobody has can have no session, unless they are given the same one:
    the user's, which then is left as it is. None where the broker does not let such client ids in.
    """
    if settings.mqtt_credentials()[0] is None and settings.mqtt_tls_cert is None:
        return False
    guests = [settings.model_copy(update={"mqtt_client_id": f"mqtt-bridge-{uuid.uuid4().hex[:8]}"}) for _ in range(2)]
    found = []
    for each in guests:
        with visit(each, filters=(), lasting=True) as connection:
            if hindrance(connection, each) is not None:
                return None
            found.append(connection.session_present)
    for each in guests if not found[0] else ():  # these sessions were begun here
        with visit(each, filters=(), lasting=False) as connection:
            hindrance(connection, each)
    return any(found)


def hindrance(connection: BrokerConnection, settings: Settings) -> str | None:
    """Wait for the connection to be subscribed: what keeps it from that, None when it is."""
    step_until(connection, lambda: connection.subscribed or bool(connection.problem), timeout_s=BROKER_TIMEOUT_S)
    if connection.subscribed:
        return None
    hangup = explain_hangup(host=settings.mqtt_host, port=settings.mqtt_port, tls=settings.mqtt_tls)
    return connection.problem or hangup


def step_until(connection: BrokerConnection, done: Callable[[], bool], *, timeout_s: float) -> None:
    """Keep the connection going until `done`, its end, or `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not done() and time.monotonic() < deadline_s and connection.step(0.1):
        pass
