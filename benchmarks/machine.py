"""What the figures were measured on, and of which state of the source."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.servers import Servers, connect
from mqtt_bridge.tools.embedded.account import Account
from mqtt_bridge.tools.embedded.mosquitto import find_mosquitto

ROOT = Path(__file__).parents[1]
PACKAGES = ("paho-mqtt", "psycopg2-binary", "orjson")
RESULTS = "benchmarks/results"


def describe(servers: Servers) -> dict[str, Any]:
    """Processor, memory, kernel, versions; settings of PostgreSQL that decide about durability and speed."""
    return {
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int((_first("/proc/meminfo", "MemTotal") or "0").split()[0]) / 1024**2, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: version(name) for name in PACKAGES},
        "postgres": _postgres(servers),
        "mosquitto": _mosquitto(),
    }


def commit() -> tuple[str, bool]:
    """The commit that is checked out, abbreviated, and whether files differ from it, results left out."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", f":!{RESULTS}", ":!README.md")
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    return head, bool(changed)


def _git(*arguments: str) -> str:
    finished = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return finished.stdout.strip()


def _first(path: str, name: str) -> str | None:
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _postgres(servers: Servers) -> dict[str, str]:
    names = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_wal_size")
    with closing(connect(servers.postgres.dsn())) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT name, current_setting(name) FROM unnest(%s) name", (list(names),))
        return dict(cursor.fetchall())


def _mosquitto() -> str:
    """What it says first when asked for help: the version is nowhere else."""
    command = find_mosquitto(Account.unprivileged()).command
    said = subprocess.run([*command, "-h"], check=False, capture_output=True, text=True)
    return (said.stdout or said.stderr).partition("\n")[0].removeprefix("mosquitto version ").strip()
