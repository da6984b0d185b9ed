"""Programs of Debian and Ubuntu without an installation: unpacked with apt's own tools into a cache folder.

The same way for root and for ordinary users: nothing is installed, hence no service is started, and nothing is left
to uninstall but that folder.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from mqtt_bridge.tools.embedded.account import EmbeddedServerError

_APT_TIMEOUT_S = 300


def unpack(*packages: str, into: Path, remedy: str) -> None:
    """Download what apt says is missing for these packages, and unpack it, all or nothing.

    EmbeddedServerError, beginning with `remedy`, where that cannot be done.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise EmbeddedServerError(remedy)
    try:
        _unpack(packages, into)
    except _NotFetched as error:
        raise EmbeddedServerError(f"{remedy} {error}") from error


def libraries(unpacked: Path) -> tuple[Path, ...]:
    """The folders of the libraries in it, which the system does not know."""
    return tuple(sorted({library.parent for library in unpacked.rglob("*.so.*")}))


def environment(folders: tuple[Path, ...]) -> tuple[str, ...]:
    """What has to stand in the environment of a program that needs them, as `env` takes it."""
    return (f"LD_LIBRARY_PATH={':'.join(map(str, folders))}",) if folders else ()


class _NotFetched(Exception):
    """apt-get or dpkg failed; says which, and why."""


def _unpack(wanted: tuple[str, ...], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / "unpacked"
        fresh.mkdir(mode=0o755)
        options = _apt_options(Path(scratch))
        packages = _missing_packages(wanted, options)
        _run(["apt-get", *options, "download", *packages], cwd=Path(scratch))
        for package in Path(scratch).glob("*.deb"):
            _run(["dpkg", "-x", str(package), str(fresh)], cwd=Path(scratch))
        try:
            fresh.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster
                raise


def _missing_packages(wanted: tuple[str, ...], options: list[str]) -> list[str]:
    """What an installation would add, by apt's own simulation: names differ from release to release."""
    simulate = ["apt-get", *options, "install", "--simulate", "--no-install-recommends", *wanted]
    try:
        plan = _run(simulate, cwd=Path("/"))
    except _NotFetched:  # no lists, as in fresh containers, or outdated ones
        _run(["apt-get", *options, "-q", "update"], cwd=Path("/"))
        plan = _run(simulate, cwd=Path("/"))
    return sorted({*re.findall(r"^Inst (\S+)", plan, re.MULTILINE), *wanted})


def _apt_options(scratch: Path) -> list[str]:
    """Lists and downloads in our own folder: no root needed, the system's stay as they are."""
    lists = scratch / "lists"
    archives = scratch / "archives"
    for folder in (lists, archives):
        (folder / "partial").mkdir(parents=True)
    settings = {
        "Dir::State::Lists": str(lists),
        "Dir::Cache::Archives": str(archives),
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        # Root's downloads would run as _apt, which cannot reach our folder.
        "APT::Sandbox::User": "",
    }
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def _run(command: list[str], *, cwd: Path) -> str:
    try:
        finished = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=_APT_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _NotFetched(f"{command[0]} could not fetch it: {error}.") from error
    if finished.returncode:
        raise _NotFetched(f"{command[0]} could not fetch it: {finished.stderr.strip()}")
    return finished.stdout
