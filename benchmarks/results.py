"""The raw results: one JSON file for a commit, `DATE-COMMIT.json`. Parts that are measured again replace the old ones.

{"format": 1, "commit", "dirty", "scale", "machine": {...},
 "measurements": {NAME: {"measured_at", "seconds", "load_before", "figures": {...}}}, "verdict": [...]}
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("results")
FORMAT = 1

Results = dict[str, Any]


def fresh(*, commit: str, dirty: bool, scale: str, machine: dict[str, Any]) -> Results:
    """Results without any measurement."""
    return {
        "format": FORMAT,
        "commit": commit,
        "dirty": dirty,
        "scale": scale,
        "machine": machine,
        "measurements": {},
        "verdict": [],
    }


def figures(results: Results, name: str) -> dict[str, Any] | None:
    """Of a measurement; None where it was not made."""
    found = results["measurements"].get(name)
    return None if found is None else found["figures"]


def open_or_begin(folder: Path, begun: Results) -> tuple[Path, Results]:
    """The file of the same commit, state and scale with what is in it, else a new one for today."""
    for path in sorted(folder.glob(f"*-{_state(begun)}.json"), reverse=True):
        found = read(path)
        if found["format"] == FORMAT and found["scale"] == begun["scale"]:
            return path, found | {"machine": begun["machine"]}
    scale = "" if begun["scale"] == "full" else f"-{begun['scale']}"
    return folder / f"{datetime.now(UTC):%Y-%m-%d}{scale}-{_state(begun)}.json", begun


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
    """The newest file of a full run, by its name; None where there is none."""
    found = [path for path in sorted(folder.glob("*.json")) if read(path)["scale"] == "full"]
    return found[-1] if found else None


def _state(results: Results) -> str:
    return results["commit"] + ("-dirty" if results["dirty"] else "")
