"""How many messages a second: counts of the last ten seconds, sampled once a second."""

from __future__ import annotations

from collections import deque

WINDOW = 11
"""Samples kept: ten intervals."""


class Rates:
    """Received and stored messages a second. One thread samples, any may read."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=WINDOW)

    def sample(self, now_s: float, *, received: int, stored: int) -> None:
        """Note the counts at `now_s`, a monotonic time."""
        self._samples.append((now_s, received, stored))

    def per_second(self) -> tuple[float, float]:
        """Received and stored per second over the window; zeros before the second sample."""
        samples = list(self._samples)
        if len(samples) < 2:
            return 0.0, 0.0
        (began_s, received, stored), (ended_s, received_now, stored_now) = samples[0], samples[-1]
        seconds = max(ended_s - began_s, 1e-9)
        return (received_now - received) / seconds, (stored_now - stored) / seconds
