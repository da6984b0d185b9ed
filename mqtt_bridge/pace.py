"""How busy it is, from nothing to full: who may wait for company waits the longer, the more of it is to be expected.

To wake up for a single message costs some ten microseconds. At a hundred a second that is nothing, and to wait would
only make them late; at ten thousand it is most of the work, and a millisecond brings ten of them together.

Threads: none of its own; whoever calls holds a lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FULL_PER_S = 10_000
"""Messages a second from which on it counts as full."""
EVERY_S = 0.05
"""How often the rate is taken: long enough for some messages, short enough to follow a burst."""


class Pace:
    """Follows a count of messages."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._count = 0
        self._since_s = clock()
        self.busy = 0.0
        """0 when nothing comes, 1 from `FULL_PER_S` on."""

    def note(self, count: int) -> None:
        """So many messages have come since the start."""
        now_s = self._clock()
        if now_s - self._since_s >= EVERY_S:
            per_s = (count - self._count) / (now_s - self._since_s)
            self.busy = min(1.0, per_s / FULL_PER_S)
            self._count, self._since_s = count, now_s
