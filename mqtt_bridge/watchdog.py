"""Notices what no longer gets on, says so with the stacks of all threads, and has it mended or the process ended.

A thread that hangs cannot be killed in Python. What can be done: a stalled acknowledgement is mended by a new
connection to the broker; for all else the process ends with code 1, and its supervisor starts it again. Nothing is
settled or acknowledged on the way: the broker delivers again what was not committed, the ledger recognises what was.

Every part shows a sign that changes as long as it gets on. The watchdog counts for how long it has itself seen a sign
unchanged: what is slow changes its sign now and then, what is idle shows none, and a process that was suspended has
not been looked at meanwhile.

Invariants: no outage of broker or database is ever a stall; nothing here waits for a lock that a thread which hangs
may hold for ever.

Thread: `mqtt-bridge-watchdog`. `reasons` may be read by any other.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from mqtt_bridge.acks import AckTracker
from mqtt_bridge.connections import Connections
from mqtt_bridge.last_resort import LastResort
from mqtt_bridge.pipeline import Pipeline
from mqtt_bridge.sink import SILENCE_S, Sink
from mqtt_bridge.subscriber import Subscriber

log = structlog.get_logger(__name__)

EVERY_S = 1.0
JUMP_S = 10.0
"""When so much has passed since the last look, the process was suspended or starved: no part had a chance to get on."""
STALLED_S = 60.0
"""A part that could get on and has not for a minute is stuck: nothing that it does without a server takes seconds."""
CONNECTING_STUCK_S = 300.0
"""Connecting ends by time-outs of 5 s each, but looking a name up has none: with three name servers, six search domains
and two tries of 5 s each the resolver may take three minutes."""
TENDER_STUCK_S = 300.0
"""The tender's statements are cut, but making the connections of a large pool has many time-outs of 5 s."""
ANSWERED_WITHIN_S = 10.0
"""The database answers, if it has done so within the time of two probes."""
GRACE_S = 60.0
"""From the first sight of a stall to the end of the process: /healthz is red meanwhile, so that an orchestrator may act
first; a remedy can work; and what was only very slow gets on after all."""
LEAVE_MARGIN_S = 15.0
"""Beyond `BRIDGE_SHUTDOWN_S`: every step of a stop has a deadline, and the short ones add up to less."""


@dataclass(frozen=True, slots=True, eq=False)
class Sign:
    """What changes as long as a part gets on."""

    reason: str
    """What is wrong when it does not."""
    show: Callable[[], Mapping[object, object]]
    """The present signs, by thread or the like; without those of which no change is expected now."""
    still_s: float
    """For so long a sign may stay the same."""
    counts: Callable[[], bool] = lambda: True
    """Whether time counts now: not while somebody else is to blame."""
    remedy: Callable[[], object] | None = None
    """Tried once for each sign that stays the same; must not block."""


@dataclass(slots=True)
class _Watched:
    sign: object
    still_s: float = 0.0
    told: bool = False


class Watchdog:
    """Looks once a second, from `start` until `stopped` is set."""

    def __init__(
        self,
        signs: Sequence[Sign],
        *,
        sink: Sink,
        connections: Connections,
        dead_threads: Callable[[], Sequence[str]],
        watching: Callable[[], bool],
        leaving: Callable[[], bool],
        leave_within_s: float,
        stopped: threading.Event,
        fail: Callable[[str], object],
        last_resort: LastResort,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`watching`: whether all parts should get on by now; `leaving`: whether the bridge is about to end.

        `fail` ends the bridge in what order is possible. Where that takes longer than `leave_within_s` and a margin,
        `last_resort` ends the process.
        """
        self._signs = signs
        self._sink = sink
        self._connections = connections
        self._dead_threads = dead_threads
        self._watching = watching
        self._leaving = leaving
        self._leave_within_s = leave_within_s + LEAVE_MARGIN_S
        self._stopped = stopped
        self._fail = fail
        self._last_resort = last_resort
        self._clock = clock
        self._looked_s = clock()
        self._leaving_s = 0.0
        self._watched: dict[tuple[Sign, object], _Watched] = {}
        self._remedied: dict[Sign, object] = {}  # the sign for which the remedy was tried last
        self._thread = threading.Thread(target=self._run, name="mqtt-bridge-watchdog", daemon=True)
        self.reasons: tuple[str, ...] = ()
        """What is stuck. Replaced whole, so that any thread may read it."""

    def start(self) -> None:
        """Start the thread; once."""
        self._last_resort.postpone()  # here already: the thread may never get its first turn
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopped.wait(EVERY_S):
            self._last_resort.postpone()
            try:
                self.look()
            except Exception:  # who watches the others must go on
                log.exception("the watchdog stumbled: it goes on in a second")
        self._last_resort.stand_down()

    def look(self) -> None:
        """One look at everything."""
        now_s = self._clock()
        passed_s, self._looked_s = now_s - self._looked_s, now_s
        if passed_s > JUMP_S:
            return
        self._cut_silent_connections(now_s)
        if self._leaving():
            self._see_it_leave(passed_s)
        elif self._watching():
            for reason in self._dead_threads():
                self._give_up(reason)
            self._look_for_stalls(passed_s)

    # -- stalls

    def _look_for_stalls(self, passed_s: float) -> None:
        before, self._watched = self._watched, {}
        for sign in self._signs:
            for part, shown in sign.show().items():
                watched = before.get((sign, part))
                self._watched[sign, part] = self._go_on_watching(sign, watched, shown, passed_s)
        if self.reasons and not any(watched.told for watched in self._watched.values()):
            log.warning("what was stuck gets on again", reasons=list(self.reasons))
        self.reasons = tuple(dict.fromkeys(sign.reason for (sign, _), watched in self._watched.items() if watched.told))
        for (sign, _), watched in self._watched.items():
            if watched.still_s >= sign.still_s + GRACE_S:
                self._give_up(sign.reason)

    def _go_on_watching(self, sign: Sign, watched: _Watched | None, shown: object, passed_s: float) -> _Watched:
        if watched is None or watched.sign != shown:
            return _Watched(shown)
        watched.still_s += passed_s if sign.counts() else 0.0
        if watched.still_s >= sign.still_s and not watched.told:
            watched.told = True
            self.reasons = (*self.reasons, sign.reason)  # before the log, which may be what hangs
            log.error("the bridge is stuck", reason=sign.reason, stack=stacks())
            self._try_remedy(sign, shown)
        return watched

    def _try_remedy(self, sign: Sign, shown: object) -> None:
        if sign.remedy is not None and self._remedied.get(sign) != shown:
            self._remedied[sign] = shown
            sign.remedy()

    def _give_up(self, reason: str) -> None:
        if not self._leaving():
            log.critical("the bridge cannot go on", reason=reason, stack=stacks())
            self._fail(reason)

    def _see_it_leave(self, passed_s: float) -> None:
        if not self._watching():
            # The start is given up, and nobody needs its answer any more: it may wait for a lock of somebody else.
            self._connections.cut_silent(at_most_s=EVERY_S)
        self._leaving_s += passed_s
        if self._leaving_s > self._leave_within_s:
            self._leaving_s = -math.inf  # once
            log.critical("the bridge does not come to its end: it is ended without", stack=stacks())
            self._last_resort.end(1)

    # -- a silent database

    def _cut_silent_connections(self, now_s: float) -> None:
        """Wake those who wait for a server that is there but does not answer.

        A statement may take as long as its time-out; but when nobody, not even a probe, has heard of the server for
        `SILENCE_S`, waiting that long is in vain. Only once in a silence: a server that is so slow that every statement
        takes longer would otherwise never be let finish one. And not while all connections are lent out: then no probe
        could be sent, and nobody has asked.
        """
        asked = self._connections.in_use < self._connections.size
        in_vain = asked and SILENCE_S < now_s - self._sink.heard_s <= 2 * SILENCE_S
        if self._connections.cut_silent(at_most_s=SILENCE_S if in_vain else math.inf):
            log.warning("a database connection was cut: the server is there but does not answer", stack=stacks())


def signs_of_life(
    *,
    subscriber: Subscriber,
    pipeline: Pipeline,
    acks: AckTracker,
    sink: Sink,
    steps: Callable[[int], object],
    drainer: Callable[[], object],
    tender: Callable[[], object],
    statement_timeout_s: float,
    batch_wait_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Sign]:
    """The signs of the parts of one bridge.

    `steps`: something that changes as a worker thread gets on with storing its batch. `drainer`, `tender`: something
    that changes with all that they do; None while the drainer has nothing to do.
    """

    def answers() -> bool:
        return sink.answered_s is not None and clock() - sink.answered_s < ANSWERED_WITHIN_S

    def batches() -> dict[object, object]:
        in_hand = pipeline.batches_in_hand()
        return {worker: (batch, steps(worker)) for worker, batch in in_hand.items()}

    def lost_head() -> dict[object, object]:
        head = acks.head
        return {} if head is None or pipeline.holds(head) else {"head": head}

    def draining() -> dict[object, object]:
        drained = drainer()
        return {} if drained is None else {"drainer": drained}

    # A statement that the server does not end in time is cut, and that is a step.
    storing_s = STALLED_S + statement_timeout_s + SILENCE_S
    return [
        Sign(
            "the network thread hangs",
            lambda: {} if subscriber.connecting else {"turn": subscriber.turns},
            STALLED_S,
        ),
        Sign(
            "the network thread does not come back from connecting to the broker",
            lambda: {"turn": subscriber.turns} if subscriber.connecting else {},
            CONNECTING_STUCK_S,
        ),
        Sign(
            "a worker hangs with a batch in hand although the database answers",
            batches,
            storing_s,
            answers,
        ),
        Sign("the drainer hangs although the database answers", draining, storing_s, answers),
        Sign(
            "messages wait although a worker is free",
            lambda: {"taken": pipeline.taken} if pipeline.waits_for_a_free_worker else {},
            STALLED_S + batch_wait_s,
        ),
        Sign(
            "the oldest message is not acknowledged although nobody has it in hand",
            lost_head,
            STALLED_S,
            answers,
            subscriber.reconnect,
        ),
        Sign("the tender thread hangs", lambda: {"tender": tender()}, TENDER_STUCK_S),
    ]


def stacks() -> str:
    """The stacks of all threads, to be read by whoever asks why one of them hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
