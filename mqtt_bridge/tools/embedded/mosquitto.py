"""Finds Mosquitto, or on Debian and Ubuntu unpacks it (see `debian`). Elsewhere the error names what to install."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from mqtt_bridge.tools.embedded import debian
from mqtt_bridge.tools.embedded.account import Account, EmbeddedServerError, cache_directory

_PACKAGES = ("mosquitto", "mosquitto-clients")

# Where distributions and Homebrew put a broker, beside what PATH says: /usr/sbin is not on everybody's.
_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/usr/bin", "/usr/local/bin", "/opt/homebrew/sbin", "/opt/homebrew/bin")

_REMEDY = (
    "The MQTT broker Mosquitto is not there: apt-get install mosquitto mosquitto-clients; dnf install mosquitto; "
    "brew install mosquitto."
)


@dataclass(frozen=True, slots=True)
class Mosquitto:
    """The programs, and the folders of their libraries (empty where the system knows them)."""

    broker: Path
    publisher: Path | None
    """`mosquitto_pub`, where the clients are there."""
    libraries: tuple[Path, ...] = ()

    @property
    def environment(self) -> tuple[str, ...]:
        """What stands before the command, as `env` takes it."""
        return debian.environment(self.libraries)

    @property
    def command(self) -> tuple[str, ...]:
        """The broker, ready for more arguments."""
        return (*(("env", *self.environment) if self.environment else ()), str(self.broker))

    def publish_line(self, *arguments: str) -> str | None:
        """A shell line that runs mosquitto_pub, None where it is not there."""
        if self.publisher is None:
            return None
        prefix = "".join(f"{name}={shlex.quote(value)} " for name, _, value in self._variables())
        return prefix + shlex.join([str(self.publisher), *arguments])

    def _variables(self) -> list[tuple[str, str, str]]:
        return [variable.partition("=") for variable in self.environment]


def find_mosquitto(account: Account) -> Mosquitto:
    """An installed Mosquitto that this account can run, else an unpacked one; EmbeddedServerError with the remedy."""
    installed = _installed()
    if installed is not None and _works(installed, account):
        return installed
    target = cache_directory() / "mosquitto"
    if not target.exists():
        debian.unpack(*_PACKAGES, into=target, remedy=_REMEDY)
    unpacked = _unpacked(target)
    if not _works(unpacked, account):
        raise EmbeddedServerError(f"{_REMEDY} The one unpacked in {target} does not run; remove that folder.")
    return unpacked


def _installed() -> Mosquitto | None:
    broker = _which("mosquitto")
    return None if broker is None else Mosquitto(broker, _which("mosquitto_pub"))


def _which(name: str) -> Path | None:
    found = shutil.which(name) or shutil.which(name, path=":".join(_FOLDERS))
    return None if found is None else Path(found)


def _works(mosquitto: Mosquitto, account: Account) -> bool:
    # `mosquitto -h` ends with 3 by design of 2.0; what a missing library or permission gives is 126 or 127.
    return account.can_run("/bin/sh", "-c", '"$0" "$@" -h >/dev/null 2>&1; [ $? -lt 126 ]', *mosquitto.command)


def _unpacked(target: Path) -> Mosquitto:
    publisher = target / "usr/bin/mosquitto_pub"
    return Mosquitto(target / "usr/sbin/mosquitto", publisher if publisher.exists() else None, debian.libraries(target))
