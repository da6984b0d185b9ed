"""Imports point down only. The table is the map of the house: who may know whom.

A module may import modules of lower lines, and of its own line those that stand to its right. That rules out cycles,
and lets a reader follow a message through the package without jumping back.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = "mqtt_bridge"
ROOT = Path(__file__).parents[2] / PACKAGE

TABLE = [
    ["__main__", "cli", "pytest_plugin", "testing", "tools"],
    [
        "supervisor",
        "former_members",
        "commands",
        "member",
        "leash",
        "totals",
        "bridge",
        "tender",
        "health",
        "watchdog",
        "web",
        "logs",
    ],
    [
        "pipeline",
        "subscriber",
        "broker_connection",
        "broker_limits",
        "stock_client",
        "fast_client",
        "publish_packet",
        "publish_properties",
        "drainer",
        "batches",
        "diversion",
    ],
    ["sink", "transactions", "isolation", "natural_keys", "connections", "copying", "spool", "routes", "schema"],
    ["decoders", "acks", "ownership", "ledger", "retained", "dead_letters", "membership", "settings", "dsn"],
    [
        "topics",
        "metrics",
        "account",
        "rates",
        "pace",
        "complaints",
        "last_resort",
        "breaker",
        "dead_letter_share",
        "readings",
        "model",
        "errors",
    ],
    # Last, since it imports nothing: it holds the version.
    ["__init__"],
]
PLACES = {unit: (line, column) for line, units in enumerate(TABLE) for column, unit in enumerate(units)}
# Where a unit is that is not on the table: its absence is reported once, not by every module that knows it.
TOP, BOTTOM = (-1, 0), (len(TABLE), 0)


def unit_of(path: Path) -> str:
    """The module or subpackage directly below the package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def may_import(importer: str, imported: str) -> bool:
    """Lower line, or further right on the same one; a subpackage is at home with itself."""
    return importer == imported or PLACES.get(importer, TOP) < PLACES.get(imported, BOTTOM)


def imported_units(source: str, path: Path) -> set[tuple[str, int]]:
    """(unit, line) of every import of this package, wherever it stands: also in functions and TYPE_CHECKING blocks."""
    found: set[tuple[str, int]] = set()
    for node in ast.walk(ast.parse(source)):
        for name in _imported_names(node, path):
            parts = name.split(".")
            if parts[0] == PACKAGE:
                found.add((_existing_unit(parts[1:]), node.lineno))
    return found


def _imported_names(node: ast.AST, path: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    # A name that is imported may be a module (`from mqtt_bridge import acks`) or something in it.
    module = node.module or ""
    if node.level:
        package = [PACKAGE, *path.relative_to(ROOT).parent.parts]
        module = ".".join([*package[: len(package) - node.level + 1], *([module] if module else [])])
    return [f"{module}.{alias.name}" for alias in node.names]


def _existing_unit(parts: list[str]) -> str:
    """The unit that a dotted path below the package leads to; the package's own names are `__init__`'s."""
    if parts and ((ROOT / f"{parts[0]}.py").exists() or (ROOT / parts[0]).is_dir() or parts[0] in PLACES):
        return parts[0]
    return "__init__"


FILES = sorted(path for path in ROOT.rglob("*.py"))


def test_every_module_has_its_place_on_the_table() -> None:
    unknown = {unit_of(path) for path in FILES} - PLACES.keys()

    assert not unknown, f"Add {sorted(unknown)} to TABLE in {__file__}: what may they know, and who may know them?"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_below_it(path: Path) -> None:
    importer = unit_of(path)

    imports = imported_units(path.read_text(), path)

    upwards = [f"{path}:{line} imports {unit}" for unit, line in sorted(imports) if not may_import(importer, unit)]
    assert not upwards, "\n".join(
        [*upwards, f"Only lower lines, or further right on the same: see TABLE in {__file__}."]
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import mqtt_bridge.sink", {"sink"}),
        ("from mqtt_bridge import acks, settings", {"acks", "settings"}),
        ("from mqtt_bridge.decoders.text import decode", {"decoders"}),
        ("from mqtt_bridge import __version__", {"__init__"}),
        ("def later():\n    from mqtt_bridge.cli import main", {"cli"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mqtt_bridge.sink import Sink", {"sink"}),
        ("from . import demo", {"tools"}),
        ("from ..settings import Settings", {"settings"}),
        ("from .. import metrics", {"metrics"}),
        ("import json, mqtt_bridge_other", set()),
    ],
)
def test_imports_are_found_in_every_form(source: str, expected: set[str]) -> None:
    found = imported_units(source, ROOT / "tools" / "example.py")

    assert {unit for unit, _ in found} == expected


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("cli", "model", True),
        ("sink", "schema", True),
        ("schema", "sink", False),
        ("sink", "pipeline", False),
        ("decoders", "decoders", True),
        ("model", "errors", True),
        ("errors", "model", False),
    ],
)
def test_downwards_and_rightwards_is_allowed(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed
