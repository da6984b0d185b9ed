"""Samples the memory of a process tree, on a thread of its own, with notes of what happened when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

from benchmarks.cpu import rss_kb


class MemorySampler:
    """A context manager. `roots` is asked each time, so a process that is started later is seen."""

    def __init__(self, roots: Callable[[], Iterable[int]], *, every_s: float) -> None:
        self._roots, self._every_s = roots, every_s
        self._began_s = time.monotonic()
        self.samples: list[tuple[float, float]] = []
        """(seconds since the start, megabytes)."""
        self.marks: dict[str, float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="benchmarks-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def mark(self, name: str) -> None:
        """Note that this happens now."""
        self.marks[name] = time.monotonic() - self._began_s

    def as_json(self) -> dict[str, Any]:
        """Samples and marks, and the most of each stretch between two marks."""
        edges = [0.0, *sorted(self.marks.values()), float("inf")]
        names = ["start", *sorted(self.marks, key=lambda name: self.marks[name])]
        most = {
            name: max((mb for at, mb in self.samples if begin <= at < end), default=None)
            for name, begin, end in zip(names, edges, edges[1:], strict=False)
        }
        return {
            "samples": [[round(at, 2), round(mb, 1)] for at, mb in self.samples],
            "marks": self.marks,
            "most_mb": most,
        }

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            self.samples.append((time.monotonic() - self._began_s, rss_kb(self._roots()) / 1024))
