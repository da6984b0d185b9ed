"""A trouble that lasts is logged when it begins, when it changes, and once a minute; not at every try."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

REPEAT_S = 60.0


class Complaint:
    """The last trouble that was logged. Any thread may ask; one lock guards both fields."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._text = ""
        self._logged_s = 0.0

    def is_news(self, text: str) -> bool:
        """Whether `text` should be logged now; if so it counts as logged."""
        now = self._clock()
        with self._lock:
            if text == self._text and now - self._logged_s < REPEAT_S:
                return False
            self._text, self._logged_s = text, now
            return True

    def clear(self) -> bool:
        """The trouble is over. Whether anything had been logged, so that its end should be logged too."""
        with self._lock:
            had_complained, self._text = bool(self._text), ""
            return had_complained
