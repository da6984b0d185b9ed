"""The raw results: one JSON file for a commit, `DATE-COMMIT.json`. Parts that are measured again replace the old ones.

{"format": 1, "commit", "dirty", "scale", "cores" (null: all of them), "machine": {...},
 "measurements": {NAME: {"measured_at", "seconds", "others_cores", "figures": {...}}}, "verdict": [...]}
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("results")
FORMAT = 1

Results = dict[str, Any]


def fresh(*, commit: str, dirty: bool, scale: str, machine: dict[str, Any], cores: int | None = None) -> Results:
    """Results without any measurement."""
    return {
        "format": FORMAT,
        "commit": commit,
        "dirty": dirty,
        "scale": scale,
        "cores": cores,
        "machine": machine,
        "measurements": {},
        "verdict": [],
    }


def figures(results: Results, name: str) -> dict[str, Any] | None:
    """Of a measurement; None where it was not made."""
    found = results["measurements"].get(name)
    return None if found is None else found["figures"]


def open_or_begin(folder: Path, begun: Results) -> tuple[Path, Results]:
    """The file of the same commit and conditions with what is in it, else a new one for today."""
    for path in sorted(folder.glob("*.json"), reverse=True):
        found = read(path)
        if all(found.get(name) == begun[name] for name in _CONDITIONS):
            return path, found | {"machine": begun["machine"]}
    return folder / f"{datetime.now(UTC):%Y-%m-%d}-{_name(begun)}.json", begun


def write(path: Path, results: Results) -> None:
    """All of it or nothing: a run that is broken off leaves the last state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    beside.rename(path)


def read(path: Path) -> Results:
    """The content of a file."""
    content: Results = json.loads(path.read_text())
    return content


def latest(folder: Path = FOLDER) -> Path | None:
    """The file of the newest full run on all cores; None where there is none."""
    found = [(path, read(path)) for path in folder.glob("*.json")]
    full = {path: _newest(content) for path, content in found if content["scale"] == "full" and not content["cores"]}
    return max(full, key=lambda path: full[path]) if full else None


_CONDITIONS = ("format", "commit", "dirty", "scale", "cores")
"""What has to be equal for figures to stand in one file."""


def _newest(results: Results) -> str:
    return max((str(part["measured_at"]) for part in results["measurements"].values()), default="")


def _name(results: Results) -> str:
    parts = [
        results["commit"],
        "dirty" if results["dirty"] else "",
        "" if results["scale"] == "full" else results["scale"],
        f"{results['cores']}-cores" if results["cores"] else "",
    ]
    return "-".join(filter(None, parts))
