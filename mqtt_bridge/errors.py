"""The errors of the bridge, one small tree.

`BridgeError` is the root. `SettingsError` ends the program with exit code 2, `MessageError` costs one message (it
becomes a dead letter), `SinkError` is about the database as a whole: retry or pause, never a dead letter.
"""

from __future__ import annotations

from dataclasses import dataclass

from mqtt_bridge.model import Stage


class BridgeError(Exception):
    """Root of everything the bridge raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with the configuration."""

    setting: str
    """Name of the setting (`MQTT_PORT`), or the place in a file (`routes.toml: route "a": topic`)."""
    value: str
    """The value as given; secrets are shown as `***`; empty when nothing was given."""
    problem: str
    """What is wrong with it, one sentence."""
    remedy: str
    """What to do about it, one sentence in the imperative."""

    def __str__(self) -> str:
        shown = f"={self.value}" if self.value else ""
        return f"{self.setting}{shown}: {self.problem} {self.remedy}".strip()


class SettingsError(BridgeError):
    """The configuration is wrong. Carries every problem found, not just the first."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class MessageError(BridgeError):
    """One message cannot be stored: it becomes a dead letter with this stage and reason."""

    def __init__(self, reason: str, *, stage: Stage = "decode", route: str | None = None) -> None:
        self.reason = reason
        self.stage: Stage = stage
        self.route = route
        super().__init__(reason)


class SinkError(BridgeError):
    """The database as a whole cannot store now. The message says what is wrong and what to do."""


class SchemaError(SinkError):
    """Objects are missing from the database, or are not what the routes need. The message holds the DDL."""


class Fenced(BridgeError):
    """Another process has taken over this client id: this one must stop at once (exit code 3)."""
