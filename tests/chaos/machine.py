"""Where a run was made: the machine, the versions, the commit. Figures mean little without."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mqtt_bridge.tools.embedded.account import Account
from mqtt_bridge.tools.embedded.mosquitto import find_mosquitto

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Machine:
    """Machine and versions, as people name them."""

    cpus: int
    python: str
    mosquitto: str
    postgres: str
    commit: str
    """The abbreviated id, with `+` where files differ from it; `unknown` outside a clone."""

    def __str__(self) -> str:
        return (
            f"{self.cpus} cores, Python {self.python}, Mosquitto {self.mosquitto}, PostgreSQL {self.postgres}, "
            f"commit {self.commit}"
        )


def this_machine(*, postgres: str) -> Machine:
    """Everything but the version of PostgreSQL, which its server knows."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cpus, platform.python_version(), _mosquitto(), postgres, _commit())


def _mosquitto() -> str:
    command = [*find_mosquitto(Account()).command, "-h"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\S+)", output)
    return found[1] if found else "unknown"


def _commit() -> str:
    try:
        commit = _git("rev-parse", "--short=9", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    output = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return output.strip()
