"""As whom, and from where, the servers' programs are run.

PostgreSQL refuses to run as root, and Mosquitto drops root by itself. So a root starts both as an account without
privileges; for everybody else that is simply their own.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mqtt_bridge.errors import BridgeError


class EmbeddedServerError(BridgeError):
    """An embedded server cannot be found, started or stopped. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Account:
    """The account that servers run as; `uid` and `gid` are None where that is simply our own."""

    uid: int | None = None
    gid: int | None = None

    @classmethod
    def unprivileged(cls) -> Account:
        """Our own account, or where that is root another existing one: nobody, else any that is not root."""
        if os.geteuid() != 0:
            return cls()
        others = sorted(
            (entry for entry in pwd.getpwall() if entry.pw_uid != 0), key=lambda entry: entry.pw_name != "nobody"
        )
        if not others:
            raise EmbeddedServerError("PostgreSQL refuses to run as root, and there is no other account: add one.")
        return cls(others[0].pw_uid, others[0].pw_gid)

    def popen(
        self, command: Sequence[str | Path], *, stdin: int, output: int | None = None, new_session: bool = False
    ) -> subprocess.Popen[str]:
        """`subprocess.Popen` as this account, in text mode, in a folder that it can enter."""
        return subprocess.Popen(
            [str(part) for part in command],
            stdin=stdin,
            stdout=output,
            stderr=output,
            text=True,
            cwd="/",
            user=self.uid,
            group=self.gid,
            extra_groups=None if self.uid is None else [],
            start_new_session=new_session,
        )

    def run(self, *command: str | Path) -> str:
        """Run a short command as this account; its standard output. Raises EmbeddedServerError if it fails."""
        try:
            process = self.popen(command, stdin=subprocess.DEVNULL, output=subprocess.PIPE)
        except OSError as error:
            raise EmbeddedServerError(f"{command[0]} cannot be run: {error}.") from error
        with process:
            output, errors = process.communicate(timeout=60)
        if process.returncode:
            raise EmbeddedServerError(f"{command[0]} failed ({process.returncode}): {errors.strip() or output.strip()}")
        return output

    def can_run(self, *command: str | Path) -> bool:
        """Whether a short command works for this account."""
        with contextlib.suppress(EmbeddedServerError):
            self.run(*command)
            return True
        return False


def cache_directory() -> Path:
    """A folder for unpacked programs. As root not in the home: the account that runs them could not reach it."""
    path = Path("/var/cache/mqtt-bridge") if os.geteuid() == 0 else Path.home() / ".cache" / "mqtt-bridge"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EmbeddedServerError(f"{path} cannot be made: {error}.") from error
    return path
