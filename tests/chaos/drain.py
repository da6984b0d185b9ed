"""How long it takes to catch up, and how fast: from the moment the database is back, or the bridge of a backlog."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Drained:
    """A backlog that was worked off."""

    seconds: float
    """From the moment it could begin until nothing was behind any more."""
    first_s: float
    """From the moment it could begin until the first message of it was stored: reconnecting, mostly."""
    messages: int
    """Stored meanwhile."""
    rate: float
    """Messages a second, from the first one on."""


class Drain:
    """Begins when it is made. `note` it often: nothing is known between two notes."""

    def __init__(self, *, stored: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`stored` is how many messages are stored already."""
        self._clock = clock
        self._began_s = clock()
        self._began_with = stored
        self._first: tuple[float, int] | None = None
        self.drained: Drained | None = None
        """None while it goes on."""

    def note(self, *, stored: int, wanted: int) -> None:
        """So many are stored now; it is over when these are `wanted`."""
        if self.drained is not None:
            return
        now_s = self._clock()
        if self._first is None and stored > self._began_with:
            self._first = now_s, stored
        if self._first is not None and stored >= wanted:
            first_s, first_count = self._first
            self.drained = Drained(
                seconds=round(now_s - self._began_s, 2),
                first_s=round(first_s - self._began_s, 2),
                messages=stored - self._began_with,
                rate=round((stored - first_count) / (now_s - first_s), 1) if now_s > first_s else 0.0,
            )
