"""Is an unusual share of the messages becoming dead letters? A warning, never more: one message must not stop others.

A new firmware that sends what no route reads, or a constraint that somebody has added, shows at once in the log as
the first dead letter of its kind. What that line cannot tell is how much is concerned: one device of a thousand, or
all of them. This can, once a minute.

A span ends when it has lasted for a minute and at least `LEAST` messages have come to their end in it: a minute, so
that a burst from one device does not count as the state of the whole; so many messages, so that a site with three
messages a minute is judged by more than three, if later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

SPAN_S = 60.0
LEAST = 100
HIGH = 0.1


class Share(NamedTuple):
    """What became of the messages of one span."""

    messages: int
    dead_letters: int

    @property
    def high(self) -> bool:
        """Whether somebody should look."""
        return self.dead_letters >= HIGH * self.messages

    def __str__(self) -> str:
        return f"{self.dead_letters / self.messages:.0%}"


class DeadLetterShare:
    """Counts spans, one after another. Not locked: the pipeline calls it under its own lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._messages = 0
        self._dead_letters = 0

    def count(self, messages: int, *, dead_letters: int) -> Share | None:
        """So many messages have come to their end, so many of them as dead letters; the span, if it ends with them."""
        self._messages += messages
        self._dead_letters += dead_letters
        now_s = self._clock()
        if now_s - self._began_s < SPAN_S or self._messages < LEAST:
            return None
        share = Share(self._messages, self._dead_letters)
        self._began_s, self._messages, self._dead_letters = now_s, 0, 0
        return share
