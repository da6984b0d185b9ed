"""What `mqtt-bridge check` says of several processes, and of bridges in one group: what they need more of, and what a
shared subscription does not do."""

from __future__ import annotations

from collections.abc import Iterator

from mqtt_bridge.connections import BridgeConnection
from mqtt_bridge.membership import client_ids, settings_of
from mqtt_bridge.settings import Settings
from mqtt_bridge.tools.findings import Finding


def members(settings: Settings) -> list[Settings]:
    """The settings of each process."""
    return [settings_of(settings, client_id) for client_id in client_ids(settings)]


def check_processes(settings: Settings) -> Iterator[Finding]:
    """What can be said without any server."""
    group = members(settings)[0].mqtt_shared_group
    if settings.bridge_processes > 1:
        names = client_ids(settings)
        yield Finding(
            "ok",
            f"{len(names)} processes with the client ids {names[0]} to {names[-1]} share the group {group}; where the"
            " broker ties rights to client ids, each of them needs those of the bridge",
        )
    if group:
        yield from _check_sharing(settings)


def _check_sharing(settings: Settings) -> Iterator[Finding]:
    unmet = "mqtt_retained" in settings.model_fields_set and settings.mqtt_retained != "never"
    yield Finding(
        "warning" if unmet else "ok",
        f"MQTT_RETAINED={settings.mqtt_retained} has no effect: retained messages are not replayed in a shared"
        " subscription (MQTT 5, 4.8.2).",
    )
    yield Finding(
        "warning",
        "Mosquitto does not save shared subscriptions: what is published between its restart and the bridge's return is"
        " lost while publishers see success. Restart it while nobody publishes, or use one process without a group.",
    )


def check_connections(connection: BridgeConnection, settings: Settings) -> Iterator[Finding]:
    """Whether the server has room for the connections of all processes; each opens its whole pool at its start."""
    with connection.cursor() as cursor:
        cursor.execute(_ROOM)
        (room,) = cursor.fetchone() or (0,)
    needed = settings.bridge_processes * settings.db_pool_size
    times = f"BRIDGE_PROCESSES={settings.bridge_processes} times " if settings.bridge_processes > 1 else ""
    share = f"{needed} connections are needed ({times}DB_POOL_SIZE={settings.db_pool_size})"
    if needed > room:
        remedy = "Raise max_connections, or the CONNECTION LIMIT of the role or database, or lower DB_POOL_SIZE."
        yield Finding("problem", f"database: {share}, and the server allows {room} at most. {remedy}")
    else:
        yield Finding("ok", f"{share}, of {room} that the server allows")


# reserved_connections is there since PostgreSQL 16.
_ROOM = """
SELECT least(
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true), '0')::int,
    (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user),
    (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database()))
"""
