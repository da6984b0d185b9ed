"""How each fault is done, and that it is really done.

A fault waits until the bridge has recovered from the one before so far that it can be hit: a connection to cut, a
process that receives. When it has not within `RECOVER_S`, the fault counts as missed. While the database is away there
may be nothing to hit for long, nor is there when a backlog is worked off: what finds nothing then is skipped, and
counted apart.
"""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from tests.chaos.link import Link
from tests.chaos.schedule import OF_THE_DATABASE, Fault, Kind
from tests.chaos.stage import Stage

RECOVER_S = 45.0
"""Longer than the longest delay between two tries of the bridge."""
RECOVER_IN_OUTAGE_S = 5.0
POLL_S = 0.05


class Wait(Protocol):
    """How a run waits, while it looks after everything else."""

    def __call__(self, predicate: Callable[[], bool], *, timeout_s: float) -> bool:
        """Whether it came true in time."""


class Faults:
    """Does faults, one after the other, in the run's thread."""

    def __init__(self, stage: Stage, wait: Wait) -> None:
        self._stage = stage
        self._wait = wait
        self._dice = random.Random(stage.parameters.seed)
        self._outage_ends_s: float | None = None
        self._kept_port: socket.socket | None = None
        self.done: Counter[Kind] = Counter()
        self.missed: Counter[Kind] = Counter()
        self.skipped: Counter[Kind] = Counter()
        """Nothing to hit, since the database was away, or all of a backlog stored."""

    def do(self, fault: Fault) -> None:
        """Do it, and count it."""
        if fault.kind in OF_THE_DATABASE and self.outage:
            self.wait_for_the_end_of_the_outage()
        stage = self._stage
        actions: dict[Kind, Callable[[], bool]] = {
            "kill": self._kill,
            "early_kill": lambda: self._kill_early(fault.seconds),
            "db_crash": self._crash_the_database,
            "outage": lambda: self._begin_the_outage(fault.seconds),
            "broker_restart": self._restart_the_broker,
            "cut_broker": lambda: self._cut(stage.broker_link, "broker"),
            "cut_db": lambda: self._cut(stage.database_link, "database"),
            "stall_broker": lambda: self._stall(stage.broker_link, "broker", fault.seconds),
            "stall_db": lambda: self._stall(stage.database_link, "database", fault.seconds),
            "freeze_db": lambda: self._freeze(stage.database_link),
            "steal": self._steal,
        }
        idle = self._nothing_to_hit  # an outage may end while a connection is waited for
        done = actions[fault.kind]()
        idle = idle or self._nothing_to_hit
        (self.done if done else self.skipped if idle else self.missed)[fault.kind] += 1

    @property
    def _nothing_to_hit(self) -> bool:
        return self.outage or self._worked_off

    @property
    def _worked_off(self) -> bool:
        """Whether all of a backlog is stored."""
        publisher = self._stage.publisher
        published = publisher.published - publisher.unacknowledged
        return self._stage.parameters.backlog and self._stage.store.stored >= published

    def _recovered(self, question: Callable[[dict[str, Any]], bool]) -> bool:
        """Whether the bridge says yes, in the time it is given."""

        def answer() -> bool:
            status = self._stage.bridge.observe()
            return status is not None and question(status)

        return self._wait(answer, timeout_s=RECOVER_IN_OUTAGE_S if self.outage else RECOVER_S)

    def _receives(self) -> bool:
        """Whether it has received messages; without a database it is enough that it is there."""

        def receives(status: dict[str, Any]) -> bool:
            each = status.get("processes", [status])
            return all(process["messages"]["received"] for process in each) or self._nothing_to_hit

        return self._recovered(receives) and not self._worked_off

    # -- the bridge

    def _kill(self) -> bool:
        if not self._receives():
            return False
        self._kill_it()
        return True

    def _kill_it(self) -> None:
        """The bridge; of several processes any one, or the supervisor."""
        bridge = self._stage.bridge
        if self._stage.parameters.processes == 1:
            bridge.kill()
        elif bridge.running:
            bridge.kill_one(self._dice)
        if not bridge.running:
            bridge.start()

    def _kill_early(self, after_s: float) -> bool:
        if not self._kill():
            return False
        self._wait(lambda: False, timeout_s=after_s)
        self._kill_it()
        return True

    def _steal(self) -> bool:
        """A second bridge takes over; the first has to go. Then the second goes, and the first comes back."""
        if not self._receives():
            return False
        stage = self._stage
        stage.thief.start()
        first_s = time.monotonic()
        while stage.bridge.running and time.monotonic() < first_s + RECOVER_S:
            stage.publisher.allow(min(stage.publisher.published + 200, stage.parameters.messages))
            time.sleep(POLL_S)
        robbed = not stage.bridge.running
        if robbed:
            stage.bridge.note_end()
        else:
            stage.bridge.kill()
        stage.thief.stop()
        stage.bridge.start()
        return robbed

    # -- the servers

    def _crash_the_database(self) -> bool:
        self._stage.postgres.restart("immediate")
        return True

    def _restart_the_broker(self) -> bool:
        stage = self._stage
        allowed = stage.publisher.leave()
        stage.broker.restart()
        done = self._resubscribed()
        stage.publisher.join()
        stage.publisher.allow(allowed)
        return done

    def _resubscribed(self) -> bool:
        """Wait for the processes of a shared subscription, of which Mosquitto remembers nothing through a restart: what
        is published before one of them has subscribed again is a hole that no client can close."""
        if self._stage.parameters.processes == 1:
            return True
        return self._recovered(lambda status: not any("not subscribed" in reason for reason in status["reasons"]))

    # -- the links

    def _cut(self, link: Link, side: str) -> bool:
        if not self._recovered(lambda status: status[side]["connected"] and link.connections > 0):
            return False
        link.cut()
        return True

    def _stall(self, link: Link, side: str, seconds: float) -> bool:
        if not self._recovered(lambda status: status[side]["connected"] and link.connections > 0):
            return False
        link.stall()
        self._wait(lambda: False, timeout_s=seconds)
        link.cut()
        link.resume()
        return True

    def _freeze(self, link: Link) -> bool:
        link.freezing = True
        return self._wait(lambda: not link.freezing, timeout_s=RECOVER_S)

    # -- an outage goes on while other faults are done

    @property
    def outage(self) -> bool:
        """Whether the database is away for long."""
        return self._outage_ends_s is not None

    def _begin_the_outage(self, seconds: float) -> bool:
        self._stage.postgres.stop("immediate")
        # Bound and not listened on: connections are refused, and no other run's database can take the address.
        self._kept_port = socket.socket()
        self._kept_port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the past may linger
        self._kept_port.bind(("127.0.0.1", self._stage.postgres.port))
        self._outage_ends_s = time.monotonic() + seconds
        return True

    def end_the_outage_when_due(self) -> bool:
        """Whether it has just been ended. Call it often."""
        if self._outage_ends_s is None or time.monotonic() < self._outage_ends_s:
            return False
        assert self._kept_port is not None
        self._kept_port.close()
        self._stage.postgres.start()
        self._outage_ends_s = None
        return True

    def wait_for_the_end_of_the_outage(self) -> None:
        """Return when the database is back; at once where it is there."""
        if self._outage_ends_s is not None:
            self._wait(lambda: not self.outage, timeout_s=self._outage_ends_s - time.monotonic() + RECOVER_S)
