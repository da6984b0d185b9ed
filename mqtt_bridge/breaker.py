"""Are refused rows the fault of the messages, or of the database?

A refused row costs its message: it becomes a dead letter. But when everything that comes, from many topics, is refused
for one and the same reason, somebody has changed the table, and turning the whole stream into dead letters helps
nobody. The breaker then pauses the stream, until a row is stored again.

The bar is high on purpose: one topic that sends nonsense must never stop the others. And the pause is never complete:
now and then one batch is let through, as dead letters, for what comes behind it may well be stored.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

ROWS = 100
TOPICS = 3
SECONDS = 10.0
LET_THROUGH_EVERY_S = 10.0


class Breaker:
    """Pauses when at least `ROWS` rows of at least `TOPICS` topics, over `SECONDS`, were refused alike and none stored.

    The workers share one; the lock guards all fields.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._since_s = 0.0
        self._let_through_s = 0.0  # when a batch was last let through although everything is refused
        self._rows = 0
        self._topics: set[bytes] = set()

    def stored(self) -> None:
        """Something was stored: whatever was refused was the messages' own fault."""
        if self._reason is not None:
            with self._lock:
                self._reason = None

    def refused(self, reason: str, *, rows: int, topics: Iterable[bytes]) -> bool:
        """Everything of a batch was refused for this one reason. True when it should be held and tried again."""
        now = self._clock()
        with self._lock:
            if reason != self._reason:
                self._reason, self._since_s, self._rows = reason, now, 0
                self._topics.clear()
            self._rows += rows
            self._topics.update(list(topics)[:TOPICS])
            enough = self._rows >= ROWS and len(self._topics) >= TOPICS
            alarming = enough and now - self._since_s >= SECONDS
            if alarming and now - self._let_through_s < LET_THROUGH_EVERY_S:
                return True
            self._let_through_s = now
            return False
