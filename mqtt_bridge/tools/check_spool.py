"""What `mqtt-bridge check` says of the disk buffer: can it be used, what is in it, and is it the one that is missed?

Nothing is made: a directory or file that is not there yet is left to the bridge. A file that is there is opened as the
bridge would open it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mqtt_bridge.connections import BridgeConnection
from mqtt_bridge.errors import SpoolElsewhere
from mqtt_bridge.settings import Settings
from mqtt_bridge.spool import FILE_NAME, Spool, SpoolError, SpoolInUse
from mqtt_bridge.tools.findings import Finding


def check_spool(settings: Settings, *, processes: int = 1) -> Iterator[Finding]:
    """Whether the directory can be used, and its disk has the room that the spools of all processes may take."""
    directory = settings.bridge_spool_dir
    if directory is None:
        return
    place = directory if directory.exists() else directory.parent
    if not place.is_dir() or not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        yield Finding("problem", f"BRIDGE_SPOOL_DIR={directory}: no directory that the bridge may read and write.")
        return
    yield _content(settings, directory)
    free_mb = shutil.disk_usage(place).free >> 20
    if settings.bridge_spool != "off" and free_mb < processes * settings.bridge_spool_max_mb:
        cap = f"BRIDGE_SPOOL_MAX_MB={settings.bridge_spool_max_mb}{f', {processes} times' if processes > 1 else ''}"
        yield Finding("warning", f"{cap}: its disk has {free_mb} MiB left. Free space, or lower it.")


def _content(settings: Settings, directory: Path) -> Finding:
    try:
        spool = open_spool(settings, directory)
    except SpoolInUse:
        return Finding("ok", f"the spool in {directory} is in use by a running bridge")
    except SpoolError as error:
        return Finding("problem", f"BRIDGE_SPOOL_DIR: {error}")
    messages = spool.messages if spool else 0
    return Finding("ok", f"the spool in {directory} can be used; {messages} messages wait in it")


def open_spool(settings: Settings, directory: Path) -> Spool | None:
    """What is there, opened and closed again; None where there is no file. Raises SpoolError."""
    if not (directory / FILE_NAME).exists():
        return None
    spool = Spool(directory, client_id=settings.mqtt_client_id, max_bytes=settings.bridge_spool_max_mb << 20)
    spool.open()
    spool.close()
    return spool


def check_disk(connection: BridgeConnection, settings: Settings) -> Iterator[Finding]:
    """Whether the disk is at hand that may hold acknowledged messages, as far as the database knows."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT spool_id FROM mqtt_bridge.owners WHERE client_id = %s", (settings.mqtt_client_id,))
        (wanted,) = cursor.fetchone() or (None,)
    if wanted is not None and wanted != _present(settings, wanted):
        yield Finding("problem", f"{SpoolElsewhere(wanted)}")


def _present(settings: Settings, wanted: str) -> str | None:
    """The id of the spool that is there; the one that is wanted where nobody can tell."""
    try:
        spool = open_spool(settings, settings.bridge_spool_dir) if settings.bridge_spool_dir else None
    except SpoolError:
        return wanted  # in use, or not fit for use, which is said elsewhere
    return spool.id if spool else None
