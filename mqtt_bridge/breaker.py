"""Are refused rows the fault of the messages, or of the database?

A refused row costs its message: it becomes a dead letter. But when everything that comes, from many topics, is refused
for one and the same reason, somebody has changed the table, and turning the whole stream into dead letters helps
nobody. The breaker then pauses the stream, until a row is stored again.

The bar is high on purpose: one topic that sends nonsense must never stop the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

ROWS = 100
TOPICS = 3
SECONDS = 10.0


class Breaker:
    """Trips when at least `ROWS` rows of at least `TOPICS` topics, over `SECONDS`, were refused alike and none stored.

    The workers share one; the lock guards all fields.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._since_s = 0.0
        self._rows = 0
        self._topics: set[bytes] = set()

    def stored(self) -> None:
        """Something was stored: whatever was refused was the messages' own fault."""
        if self._reason is not None:
            with self._lock:
                self._reason = None

    def refused(self, reason: str, *, rows: int, topics: Iterable[bytes]) -> bool:
        """Everything of a batch was refused for this one reason. True when the stream should pause."""
        with self._lock:
            if reason != self._reason:
                self._reason, self._since_s, self._rows = reason, self._clock(), 0
                self._topics.clear()
            self._rows += rows
            self._topics.update(list(topics)[:TOPICS])
            return self._rows >= ROWS and len(self._topics) >= TOPICS and self._clock() - self._since_s >= SECONDS
