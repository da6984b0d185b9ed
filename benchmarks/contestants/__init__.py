"""The systems that are measured side by side: a module a system, found by being here."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.contestant import Contestant


def all_contestants() -> dict[str, Contestant]:
    """Every contestant by its name: the bridge first, the others by name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = [contestant for module in modules for contestant in getattr(module, "CONTESTANTS", ())]
    found.sort(key=lambda contestant: (not contestant.name.startswith("mqtt-bridge"), contestant.name))
    return {contestant.name: contestant for contestant in found}
