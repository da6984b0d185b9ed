"""What `mqtt-bridge check` finds, one line each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "warning", "problem"]
    """A problem keeps the bridge from working, a warning is a risk that its owner should know of."""
    text: str

    def __str__(self) -> str:
        return f"{ {'ok': 'ok      ', 'warning': 'WARNING ', 'problem': 'PROBLEM '}[self.level] }{self.text}"
