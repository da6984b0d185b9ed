"""Starts `mqtt-bridge` commands as subprocesses: the processes of a bridge, and the retirement of client ids.

Each has the settings of its client id by its environment, and is tied to a descriptor that it inherits (`leash`). In
sessions of their own, so that a Ctrl-C for the terminal's foreground reaches who has started them alone.

Threads: none of its own; any may call.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

from mqtt_bridge.member import Launch
from mqtt_bridge.membership import variables_of
from mqtt_bridge.settings import Settings

QUIET_S = 2.0
"""`mqtt-bridge retire --quiet` for former client ids."""


class Commands:
    """The commands of one bridge."""

    def __init__(
        self, settings: Settings, inheritance: Mapping[str, str], *, abandoned_spool: str | None = None
    ) -> None:
        """`inheritance` is the environment that makes these settings; `abandoned_spool` as for the bridge."""
        self._settings = settings
        self._inheritance = inheritance
        self._options = [f"--abandon-spool={abandoned_spool}"] if abandoned_spool else []

    def launcher(self, client_id: str) -> Launch:
        """A function that starts the process of this client id."""

        def launch(leash: int) -> subprocess.Popen[bytes]:
            command = _command(
                "run", f"--member-of={self._settings.mqtt_client_id}", f"--leash={leash}", *self._options
            )
            return subprocess.Popen(
                command,
                env=self._environment(client_id),
                stdin=subprocess.DEVNULL,
                pass_fds=(leash,),
                start_new_session=True,
            )

        return launch

    def retire(self, client_id: str, leash: int) -> subprocess.Popen[str]:
        """Starts `mqtt-bridge retire` for this client id; what it prints can be read."""
        return subprocess.Popen(
            _command("retire", "--yes", f"--quiet={QUIET_S:g}", f"--leash={leash}", "--", client_id),
            env=self._environment(client_id),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=(leash,),
            start_new_session=True,
        )

    def _environment(self, client_id: str) -> dict[str, str]:
        return {**self._inheritance, **variables_of(self._settings, client_id)}


def _command(*arguments: str) -> list[str]:
    warnings = [f"-W{option}" for option in sys.warnoptions]
    return [sys.executable, *warnings, "-m", "mqtt_bridge", *arguments]
