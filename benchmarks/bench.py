"""What a measurement is given: servers, sizes, contestants, and somebody to tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.contestant import REFERENCE, Contestant, Unavailable
from benchmarks.scale import Scale
from benchmarks.servers import Servers


@dataclass(frozen=True, slots=True)
class Bench:
    """For one run of the benchmarks."""

    servers: Servers
    scale: Scale
    contestants: dict[str, Contestant]
    say: Callable[[str], None]
    """Takes what happens just now; the next sentence replaces it."""

    def reference(self) -> Contestant | None:
        """The system that figures are compared with; None, and said so, where it cannot be had."""
        reference = self.contestants.get(REFERENCE)
        if reference is None:
            return None
        try:
            reference.install()
        except Unavailable as reason:
            self.say(f"{REFERENCE} cannot be measured: {reason}")
            return None
        return reference
