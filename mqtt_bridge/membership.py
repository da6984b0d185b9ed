"""What the processes of one bridge are called, and how the settings of one of them differ from those of the bridge.

With BRIDGE_PROCESSES=N the client ids are MQTT_CLIENT_ID-1 to -N: stable, so that each process comes back to its own
session. They share one group of a shared subscription, and each has a spool of its own.

Pure functions of the settings.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from mqtt_bridge.settings import Settings


def client_ids(settings: Settings) -> tuple[str, ...]:
    """The client ids of all processes; of a single one MQTT_CLIENT_ID itself."""
    if settings.bridge_processes == 1:
        return (settings.mqtt_client_id,)
    return tuple(f"{settings.mqtt_client_id}-{number}" for number in range(1, settings.bridge_processes + 1))


def settings_of(settings: Settings, client_id: str) -> Settings:
    """The settings of the process with this client id: one of the present ones, or one of another BRIDGE_PROCESSES."""
    return settings.model_copy(
        update={
            "mqtt_client_id": client_id,
            "bridge_processes": 1,
            "mqtt_shared_group": _shared_group(settings, client_id),
            "bridge_spool_dir": _spool_dir(settings, client_id),
            "http_port": 0,
        }
    )


def variables_of(settings: Settings, client_id: str) -> dict[str, str]:
    """The same as variables, for the environment of that process; empty means unset."""
    own = settings_of(settings, client_id)
    return {
        "MQTT_CLIENT_ID": client_id,
        "BRIDGE_PROCESSES": "1",
        "MQTT_SHARED_GROUP": own.mqtt_shared_group or "",
        "BRIDGE_SPOOL_DIR": str(own.bridge_spool_dir or ""),
        # HTTP is the supervisor's, and so is the token.
        "HTTP_PORT": "0",
        "HTTP_TOKEN": "",
        "HTTP_TOKEN_FILE": "",
    }


def _shared_group(settings: Settings, client_id: str) -> str | None:
    """A single process is in a group only where it is told to be; several need one."""
    if settings.mqtt_shared_group or client_id == settings.mqtt_client_id:
        return settings.mqtt_shared_group
    return settings.mqtt_client_id


def _spool_dir(settings: Settings, client_id: str) -> Path | None:
    """A single process has the directory for itself, several have one each in it."""
    if settings.bridge_spool_dir is None or client_id == settings.mqtt_client_id:
        return settings.bridge_spool_dir
    return settings.bridge_spool_dir / quote(client_id, safe="")
