"""A PostgreSQL with a small disk: one folder of it is a tmpfs of a few megabytes, for a tablespace to fill.

The server runs in a user and mount namespace of its own, where it may mount without any privilege outside; nothing is
left behind, whatever ends it. Where the system allows no such namespaces, root mounts the folder itself. Where neither
is possible the server does not start, and the test fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mqtt_bridge.tools.embedded import Postgres
from mqtt_bridge.tools.embedded.account import Account

_NAMESPACE = ("unshare", "--user", "--map-current-user", "--keep-caps", "--mount")
_MOUNT_AND_RUN = 'mount -t tmpfs -o size="$0" tmpfs "$1" && shift && exec "$@"'


class TinyDisk(Postgres):
    """Its folder `disk` holds `size` (as `8m`)."""

    def __init__(self, *, size: str = "8m") -> None:
        super().__init__()
        self._size = size
        self._unprivileged = Account.unprivileged().can_run(*_NAMESPACE, "true")
        self._mounted = False

    @property
    def disk(self) -> Path:
        """Where the tablespace goes."""
        return self.directory / "disk"

    def close(self) -> None:
        """As `Postgres`, and the disk is gone."""
        self.stop()
        if self._mounted:
            subprocess.run(["umount", self.disk], check=True)
            self._mounted = False
        super().close()

    def _prepare(self) -> None:
        super()._prepare()
        self.disk.mkdir(exist_ok=True)
        account = Account.unprivileged()
        if account.uid is not None:
            shutil.chown(self.disk, account.uid, account.gid)
        if not self._unprivileged and not self._mounted:
            owner = f"uid={account.uid},gid={account.gid}" if os.geteuid() == 0 else "uid=0"
            options = f"size={self._size},{owner}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.disk], check=True)
            self._mounted = True

    def _command(self, port: int) -> Sequence[str | Path]:
        command = super()._command(port)
        if not self._unprivileged:
            return command
        return [*_NAMESPACE, "/bin/sh", "-c", _MOUNT_AND_RUN, self._size, self.disk, *command]
