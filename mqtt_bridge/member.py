"""One of several processes of a bridge, as its supervisor has it: started, asked, and started again when it dies.

Invariants: there is one process at a time. No process is started once `request_stop` was called, nor after one has
ended for a reason that the next would end for as well (`FINAL`). Nobody waits for an answer for longer than he says.

Threads: `mqtt-bridge-member-ID` starts the process, reads its answers and waits for its end; any may ask.
"""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from mqtt_bridge.leash import ASK, STOP, Answer

log = structlog.get_logger(__name__)

FINAL = frozenset({2, 3})
"""Exit codes of wrong settings, and of a client id that another process has taken over: see `cli`."""
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
"""Before the first restart, and before one of many; jittered down to half of it."""
STEADY_S = 60.0
"""What has run for so long does not count as having failed to start."""
FAILING = 4
"""Deaths in a row, none of them steady, after which it cannot be kept running."""
SILENT_S = 60.0
"""A process that has not answered for so long is not healthy; its own watchdog should have ended it."""
UNANSWERED = 16
"""Requests under way at most: a process that is silent is not asked any further."""

Launch = Callable[[int], "subprocess.Popen[bytes]"]


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of a process at one moment."""

    client_id: str
    pid: int | None
    """None where it does not run."""
    restarts: int
    answer: Answer | None
    """None where it did not answer in time."""
    silent_s: float
    """For how long it has not answered although it was asked; 0.0 where it does."""
    failing: bool
    """Whether it cannot be kept running."""

    @property
    def unready(self) -> list[str]:
        """Why it cannot take part at the moment."""
        if self.answer is not None:
            return list(self.answer.observation.status["reasons"])
        return ["its process does not answer" if self.pid else "its process has ended, and is about to be started"]

    @property
    def unhealthy(self) -> list[str]:
        """Why somebody should step in."""
        reasons = list(self.answer.unhealthy) if self.answer else []
        if self.failing:
            reasons.append("its process ends again and again soon after its start")
        if self.silent_s >= SILENT_S:
            reasons.append("its process has not answered for a minute")
        return reasons


@dataclass(frozen=True, slots=True)
class Ticket:
    """Which answer somebody waits for."""

    start: int
    """Of the process that was asked; one that has taken its place was not."""
    number: int


class Member:
    """The process of one client id, from `start` to `request_stop`."""

    def __init__(self, client_id: str, launch: Launch, *, on_final: Callable[[int], object]) -> None:
        """`launch` starts a process that inherits the descriptor it is given; `on_final` hears of a `FINAL` code."""
        self.client_id = client_id
        self._launch = launch
        self._on_final = on_final
        self._thread = threading.Thread(target=self._run, name=f"mqtt-bridge-member-{client_id}", daemon=True)
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._changed = threading.Condition()  # an answer has come, or the process has ended
        # Guarded by it:
        self._process: subprocess.Popen[bytes] | None = None
        self._leash: socket.socket | None = None
        self._asked = self._answered = 0  # of the present process
        self._answer: Answer | None = None  # the newest of the present process
        self._silent_since_s: float | None = None
        self._started_s = 0.0
        self._starts = 0
        self._deaths = 0  # in a row, without a steady run
        self.exit_code = 0
        """Of the process that ran when it was told to stop; 0 where none did."""

    # -- its life

    def start(self) -> None:
        """Start the first process; returns at once. Once."""
        self._thread.start()

    def request_stop(self) -> None:
        """Tell the process to stop in good order, and start none any more. Idempotent."""
        with self._changed:  # either it is told here, or whoever starts it sees that it is to stop
            first = not self._stopping.is_set()
            self._stopping.set()
            if first:
                self._send(STOP)

    def kill(self) -> None:
        """End the process now, and start none any more."""
        self._stopping.set()
        with self._changed:
            if self._process is not None:
                self._process.kill()

    def wait(self, timeout_s: float) -> bool:
        """Whether the last process has ended, and none will be started any more."""
        return self._ended.wait(timeout_s)

    # -- how it is

    def ask(self) -> Ticket:
        """Have it tell how it is; `see` takes the ticket."""
        with self._changed:
            if self._leash is not None and self._asked - self._answered < UNANSWERED:
                self._asked += 1
                self._send(ASK)
            return Ticket(self._starts, self._asked)

    def see(self, ticket: Ticket, timeout_s: float) -> Sight:
        """What is seen of it, with the answer to `ticket` if that comes in time."""
        with self._changed:

            def is_another() -> bool:
                return self._process is None or self._starts != ticket.start

            self._changed.wait_for(lambda: is_another() or self._answered >= ticket.number, timeout_s)
            answered = not is_another() and self._answered >= ticket.number
            now_s = time.monotonic()
            if is_another() or answered:
                self._silent_since_s = None
            elif self._silent_since_s is None:
                self._silent_since_s = now_s
            steady = self._process is not None and now_s - self._started_s >= STEADY_S
            return Sight(
                client_id=self.client_id,
                pid=self._process.pid if self._process else None,
                restarts=max(0, self._starts - 1),
                answer=self._answer if answered else None,
                silent_s=now_s - (self._silent_since_s or now_s),
                failing=self._deaths >= FAILING and not steady,
            )

    def _send(self, request: bytes) -> None:
        if self._leash is not None:
            with suppress(OSError):  # it is about to end, which its thread sees
                self._leash.send(request, socket.MSG_DONTWAIT)

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                code = self._live()
                if self._stopping.is_set():
                    self.exit_code = code
                elif code in FINAL:
                    self._on_final(code)
                    break
                else:
                    self._stopping.wait(self._note_death(code))
        finally:
            self._ended.set()

    def _live(self) -> int:
        """Start a process and stay with it to its end; the exit code."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            log.error("a process of the bridge cannot be started", client_id=self.client_id, error=str(error))
            return 1
        with ours:
            with theirs:
                try:
                    process = self._launch(theirs.fileno())
                except OSError as error:
                    log.error("a process of the bridge cannot be started", client_id=self.client_id, error=str(error))
                    return 1
            with self._changed:
                self._process, self._leash = process, ours
                self._asked = self._answered = 0
                self._started_s = time.monotonic()
                self._starts += 1
                if self._stopping.is_set():
                    self._send(STOP)
            self._read(ours)
            with self._changed:
                self._leash = None
                ours.close()  # should it only have stopped answering, it stops now
        code = process.wait()
        with self._changed:
            self._process = self._answer = None
            self._changed.notify_all()
        return code

    def _read(self, leash: socket.socket) -> None:
        rest = b""
        try:
            while received := leash.recv(65_536):
                *lines, rest = (rest + received).split(b"\n")
                for line in lines:
                    self._take(Answer.decoded(line))
        except OSError:
            pass  # it has ended
        except Exception:
            log.exception("a process of the bridge answers what cannot be read: it is stopped and started again")

    def _take(self, answer: Answer) -> None:
        with self._changed:
            self._answer = answer
            self._answered += 1
            self._changed.notify_all()

    def _note_death(self, code: int) -> float:
        """Seconds until the next start."""
        with self._changed:
            steady = time.monotonic() - self._started_s >= STEADY_S
            self._deaths = 1 if steady else self._deaths + 1
            longest_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._deaths - 1, 16))
        delay_s = longest_s * random.uniform(0.5, 1.0)
        log.warning(
            "a process of the bridge has ended and is started again; what it had not acknowledged is delivered again",
            client_id=self.client_id,
            **_cause(code),
            deaths_in_a_row=self._deaths,
            restart_in_s=round(delay_s, 2),
        )
        return delay_s


def _cause(code: int) -> Mapping[str, object]:
    if code >= 0:
        return {"exit_code": code}
    with suppress(ValueError):
        return {"signal": signal.Signals(-code).name}
    return {"signal": -code}


def see_all(members: Sequence[Member], timeout_s: float) -> list[Sight]:
    """What is seen of all of them, asked at once; together they have `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    tickets = [member.ask() for member in members]
    return [
        member.see(ticket, max(0.0, deadline_s - time.monotonic()))
        for member, ticket in zip(members, tickets, strict=True)
    ]
