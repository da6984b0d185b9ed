"""A trouble that lasts is logged when it begins, when it changes, and once a minute; not at every try."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

REPEAT_S = 60.0
REMEMBERED = 100
"""Different texts remembered: several threads may complain in turn, each in its own words."""


class Complaint:
    """What was logged lately. Any thread may ask; the lock guards what is remembered."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._logged_s: dict[str, float] = {}  # what was logged, and when

    def is_news(self, text: str) -> bool:
        """Whether `text` should be logged now; if so it counts as logged."""
        now = self._clock()
        with self._lock:
            logged_s = self._logged_s.get(text)
            if logged_s is not None and now - logged_s < REPEAT_S:
                return False
            if len(self._logged_s) >= REMEMBERED:
                self._logged_s.clear()
            self._logged_s[text] = now
            return True

    def clear(self) -> bool:
        """The trouble is over. Whether anything had been logged, so that its end should be logged too."""
        with self._lock:
            had_complained = bool(self._logged_s)
            self._logged_s.clear()
            return had_complained
