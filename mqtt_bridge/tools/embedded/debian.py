"""Programs from Debian's and Ubuntu's packages, in a folder: downloaded and unpacked by apt's own tools, not installed.

Works the same for root and for ordinary users. No service is started, the system's package lists stay as they are, and
nothing is left to uninstall but the folder. What is unpacked finds its libraries by `library_path`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mqtt_bridge.tools.embedded.account import EmbeddedServerError

_TIMEOUT_S = 300


def unpack(packages: Sequence[str], target: Path) -> None:
    """Unpack these packages, and those they need and the system lacks, into `target`, all or nothing.

    Nothing happens where the folder exists. EmbeddedServerError says why it cannot be done.
    """
    if target.exists():
        return
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise EmbeddedServerError("There is no apt-get to fetch it with.")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir(mode=0o755)
        _download(packages, Path(scratch))
        for package in Path(scratch).glob("*.deb"):
            _run(["dpkg", "-x", str(package), str(fresh)], cwd=Path(scratch))
        if not target.exists():
            fresh.rename(target)


def library_path(target: Path) -> tuple[Path, ...]:
    """The folders of the libraries in an unpacked folder, for LD_LIBRARY_PATH."""
    return tuple(sorted({library.parent for library in target.rglob("*.so.*")}))


def _download(packages: Sequence[str], scratch: Path) -> None:
    """What an installation would add, by apt's own simulation (names differ from release to release), and these."""
    options = _options(scratch)
    simulate = ["apt-get", *options, "install", "--simulate", "--no-install-recommends", *packages]

    def fetch() -> None:
        plan = _run(simulate, cwd=Path("/"))
        needed = sorted({*re.findall(r"^Inst (\S+)", plan, re.MULTILINE), *packages})
        _run(["apt-get", *options, "download", *needed], cwd=scratch)

    try:
        fetch()
    except EmbeddedServerError:  # no lists, as in fresh containers; what is installed passes the simulation even so
        _run(["apt-get", *options, "-q", "update"], cwd=Path("/"))
        fetch()


def _options(scratch: Path) -> list[str]:
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
            command, cwd=cwd, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EmbeddedServerError(f"{command[0]} could not fetch it: {error}.") from error
    if finished.returncode:
        raise EmbeddedServerError(f"{command[0]} could not fetch it: {finished.stderr.strip()}")
    return finished.stdout
