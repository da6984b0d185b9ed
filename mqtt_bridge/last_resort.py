"""Ends the process when nothing in it can any more: used by the watchdog, in a process that is the bridge's own.

Code in C that never gives the interpreter back (an expression that backtracks for ever, a number of a million digits)
stops every thread of Python, the watchdog's too. So the kernel watches the watchdog: unless it comes by in time, a
signal has the stacks of all threads written, and the process ended, both in C.

What counts is the time of the processor, not that of a clock: a process that is suspended, or that merely waits, spends
none. SIGPROF is the signal of that timer (setitimer(2)). Its default course would be the end of the process, but not
for the first process of a container, to which the kernel delivers no signal by default: hence a handler of the C
library, `_exit`, which takes the number of the signal for the exit code.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal

HELD_S = 60.0
"""Processor time without a look of the watchdog, which looks every second; a minute where only one thread runs."""

_STDERR = 2  # the descriptor: no Python runs when it is written to


class LastResort:
    """Does nothing: the process belongs to somebody else, as in a test or in the demo."""

    def postpone(self) -> None:
        """All is well so far; the next call is due within `HELD_S` of processor time."""

    def stand_down(self) -> None:
        """Nobody will call `postpone` any more, and that is well."""

    def end(self, code: int) -> None:
        """End the process now, whatever hangs."""


class OwnProcess(LastResort):
    """The real one."""

    def __init__(self, held_s: float = HELD_S) -> None:
        self._held_s = held_s
        self._has_timer = hasattr(signal, "setitimer")  # not on Windows
        if self._has_timer:
            _handle_with_exit(signal.SIGPROF)
            faulthandler.register(signal.SIGPROF, file=_STDERR, all_threads=True, chain=True)  # first the stacks

    def postpone(self) -> None:
        """See `LastResort`."""
        if self._has_timer:
            signal.setitimer(signal.ITIMER_PROF, self._held_s)

    def stand_down(self) -> None:
        """See `LastResort`."""
        if self._has_timer:
            signal.setitimer(signal.ITIMER_PROF, 0.0)

    def end(self, code: int) -> None:
        """See `LastResort`."""
        os._exit(code)


def _handle_with_exit(number: int) -> None:
    """signal(2), from which no Python runs: that would have to wait for the interpreter."""
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    library.signal(number, ctypes.cast(library._exit, ctypes.c_void_p))
