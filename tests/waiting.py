"""Waiting for what happens elsewhere: in another thread, a broker, a database."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    predicate: Callable[[], T],
    *,
    timeout_s: float = 10.0,
    what: str = "the condition",
    interval_s: float = 0.01,
) -> T:
    """Return the first true value of `predicate`; AssertionError naming `what` when it stays false for `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := predicate()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"Waited {timeout_s:g} s for {what}; last seen: {value!r}")
        time.sleep(interval_s)
    return value
