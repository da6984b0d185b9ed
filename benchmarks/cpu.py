"""CPU time and memory of process trees, from /proc. Linux only, as are the promises of the figures.

The time of a tree is that of its living processes and of their children that have ended and were waited for. One tick
of that clock is 10 ms: a run of seconds is exact to a per cent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_KB = os.sysconf("SC_PAGE_SIZE") // 1024


@dataclass(frozen=True, slots=True)
class _Process:
    parent: int
    cpu_s: float
    """User and system time, that of dead children included."""
    rss_kb: int


def cpu_s(roots: Iterable[int], *, without: Iterable[int] = ()) -> float:
    """CPU seconds that these trees have used so far, but for the processes `without`."""
    processes = _processes()
    return sum(processes[pid].cpu_s for pid in _trees(processes, roots) - set(without))


def rss_kb(roots: Iterable[int]) -> int:
    """Resident memory of these trees, shared pages counted in each process."""
    processes = _processes()
    return sum(processes[pid].rss_kb for pid in _trees(processes, roots))


class Others:
    """How many cores were busy with something else since it was made, on average: what figures have to be doubted by.

    Time that the host of a virtual machine took away counts as busy with something else.
    """

    def __init__(self) -> None:
        self._began_s, self._before_s = time.monotonic(), self._now_s()

    def cores(self) -> float:
        """All that was busy, but for this process and its children."""
        return max(0.0, (self._now_s() - self._before_s) / (time.monotonic() - self._began_s))

    @staticmethod
    def _now_s() -> float:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        return (user + nice + system + irq + softirq + steal) / TICKS - cpu_s([os.getpid()])


class Meter:
    """CPU seconds by role, from `start` to `read`. A role is a name and the roots of its trees."""

    def __init__(self, roles: Mapping[str, Iterable[int]], *, without: Iterable[int] = ()) -> None:
        self._roles = {name: list(roots) for name, roots in roles.items()}
        self._without = list(without)
        self._before = self._now()

    def read(self) -> dict[str, float]:
        """CPU seconds of each role since it was made."""
        now = self._now()
        return {name: now[name] - self._before[name] for name in now}

    def _now(self) -> dict[str, float]:
        return {name: cpu_s(roots, without=self._without) for name, roots in self._roles.items()}


def _processes() -> dict[int, _Process]:
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                text = (path / "stat").read_text(errors="replace")
            except OSError:  # it has ended
                continue
            # The name, in parentheses, may hold anything. proc(5): field 3 is the first after it.
            fields = text.rpartition(")")[2].split()
            found[int(path.name)] = _Process(
                parent=int(fields[1]),
                cpu_s=sum(map(int, fields[11:15])) / TICKS,
                rss_kb=int(fields[21]) * _PAGE_KB,
            )
    return found


def _trees(processes: Mapping[int, _Process], roots: Iterable[int]) -> set[int]:
    children: dict[int, list[int]] = {}
    for pid, process in processes.items():
        children.setdefault(process.parent, []).append(pid)
    found: set[int] = set()
    todo = [pid for pid in roots if pid in processes]
    while todo:
        pid = todo.pop()
        found.add(pid)
        todo += children.get(pid, [])
    return found
