"""One run: the faults of the schedule, one after the other, while messages are published; then the comparison.

The publisher runs ahead by a few seconds of messages at most, so that no fault falls into silence.

At the end, when everything is settled, the bridge is killed once more and a last process receives some more messages:
what was wrongly forgotten would now be delivered again and show as a duplicate, and what this process counts is known
beforehand. When it has left, somebody else asks the broker for what it still holds.

Nothing is waited for without an end: without progress for `STUCK_S` or `SETTLE_S` the run fails, or ends and says so.

Everything runs in the caller's thread but for what publisher and proxies do in their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from mqtt_bridge.settings import Settings
from tests.chaos.comparison import Comparison, compare
from tests.chaos.drain import Drain
from tests.chaos.faults import POLL_S, Faults
from tests.chaos.leftovers import left_in_session, left_in_spool
from tests.chaos.machine import this_machine
from tests.chaos.result import Result
from tests.chaos.schedule import Fault, Parameters, schedule
from tests.chaos.stage import Stage

AHEAD_S = 4.0
"""How far the publisher may run ahead of a fault, in seconds of its rate."""
STUCK_S = 120.0
"""Without a message published for so long, although it should be, the run fails."""
SETTLE_S = 60.0
"""Without any progress for so long, the end is not waited for any more."""
REFUSED = 2
"""The exit code of a bridge whose settings are wrong: it would end the same way each time."""
LAST_MESSAGES = 200
"""Received by the last process."""
SHOW_EVERY_S = 1.0

Show = Callable[[str], None]


class Stuck(Exception):
    """The run cannot go on: not the bridge is to blame, but what it runs with. The message says where."""


class Run:
    """`Run(parameters, show=...).run()`; `show` gets a line of progress about every second."""

    def __init__(self, parameters: Parameters, *, show: Show = lambda _: None) -> None:
        self._parameters = parameters
        self._show = show
        self._shown_s = 0.0
        self._wanted = True  # the bridge is meant to run
        self._stage = Stage(parameters)
        self._faults = Faults(self._stage, self._wait)
        self._drain: Drain | None = None
        self._account_problems: list[str] = []
        self._final_rss_bytes = 0
        self.log = ""
        """What the bridges wrote, once `run` has ended, however it did."""

    def run(self) -> Result:
        """Take everything up, do it, compare, take everything down."""
        began_s = time.monotonic()
        with self._stage as stage:
            try:
                stage.bridge.start()
                self._require(self._is_ready(), "the bridge to be ready")
                if self._parameters.backlog:
                    self._publish_a_backlog()
                self._go_through(schedule(self._parameters))
                stage.publisher.end(1)
                settled = self._settle()
                if settled:
                    self._try_a_last_process()
                self._stop_the_bridge()
                return self._result(settled=settled, seconds=time.monotonic() - began_s)
            finally:
                self.log = stage.bridge.log + stage.thief.log

    # -- going on

    def _publish_a_backlog(self) -> None:
        self._stop_the_bridge()
        self._wanted = False
        self._publish(self._parameters.messages)
        self._stage.publisher.leave()
        self._stage.publisher.join()
        self._wanted = True
        self._drain = Drain(stored=0)
        self._stage.bridge.start()

    def _go_through(self, faults: list[Fault]) -> None:
        for fault, following in pairwise([*faults, None]):
            self._go_on_until(fault.at, ahead_to=following.at if following else self._parameters.messages)
            self._faults.do(fault)
        self._go_on_until(self._parameters.messages)
        self._faults.wait_for_the_end_of_the_outage()

    def _go_on_until(self, count: int, *, ahead_to: int = 0) -> None:
        """Until so many messages are published (of a backlog: stored), or nothing goes on any more.

        What is done then happens while more are published: to `ahead_to`, but for `AHEAD_S` at most, and a second's
        worth at least.
        """
        if self._parameters.backlog:
            if count < self._parameters.messages:
                self._wait(lambda: self._stage.store.stored >= count, timeout_s=SETTLE_S)
            return
        rate = int(self._parameters.rate)
        ahead = max(count + rate, min(ahead_to, int(count + AHEAD_S * rate)))
        self._publish(count, ahead_to=ahead)

    def _publish(self, count: int, *, ahead_to: int = 0) -> None:
        """Until so many messages are published; then the publisher goes on to `ahead_to` by itself."""
        publisher = self._stage.publisher
        publisher.allow(min(max(count, ahead_to), self._parameters.messages))
        while publisher.published < count:
            before = publisher.published
            self._require(self._wait(lambda: publisher.published > before, timeout_s=STUCK_S), "the publisher")  # noqa: B023

    def _wait(self, predicate: Callable[[], bool], *, timeout_s: float) -> bool:
        """Whether it came true in time. Meanwhile looks after everything else."""
        deadline_s = time.monotonic() + timeout_s
        while not predicate():
            if time.monotonic() > deadline_s:
                return False
            self._look_after()
            time.sleep(POLL_S)
        return True

    def _look_after(self) -> None:
        """Start the bridge again where it has ended, as a supervisor would; end an outage; note what goes on."""
        self._stage.publisher.check()
        self._revive()
        if self._faults.end_the_outage_when_due():
            self._drain = Drain(stored=self._stage.store.stored)
        self._note_the_drain()
        self._show_progress()

    def _revive(self) -> None:
        if self._wanted and not self._stage.bridge.running:
            code = self._stage.bridge.note_end()
            self._require(code != REFUSED, "the bridge to take its settings")
            self._stage.bridge.start()

    def _note_the_drain(self) -> None:
        if self._drain is not None and self._drain.drained is None:
            publisher = self._stage.publisher
            # What was published in the last half second is under way at any time.
            behind = 0 if self._parameters.backlog else int(self._parameters.rate / 2)
            wanted = publisher.published - publisher.unacknowledged - behind
            self._drain.note(stored=self._stage.store.stored, wanted=wanted)

    def _show_progress(self) -> None:
        if time.monotonic() - self._shown_s < SHOW_EVERY_S:
            return
        self._shown_s = time.monotonic()
        self._stage.bridge.observe()
        done = ", ".join(f"{kind} {count}" for kind, count in self._faults.done.items())
        self._show(
            f"published {self._stage.publisher.published:,} of {self._parameters.messages:,}, "
            f"stored {self._stage.store.stored:,}; {done or 'no fault yet'}"
        )

    def _require(self, reached: bool, what: str) -> None:
        if not reached:
            raise Stuck(f"Waited for {what}, in vain. The bridge said:\n{self._stage.bridge.log[-4000:]}")

    # -- the end

    def _is_ready(self) -> bool:
        bridge = self._stage.bridge
        return self._wait(lambda: (bridge.observe() or {}).get("reasons") == [], timeout_s=SETTLE_S)

    def _settle(self) -> bool:
        """Whether the very last message was stored, and nothing is under way; waits as long as there is progress."""
        while not self._is_settled():
            before = self._progress()
            if not self._wait(lambda: self._is_settled() or self._progress() != before, timeout_s=SETTLE_S):  # noqa: B023
                return False
        self._final_rss_bytes = self._stage.bridge.rss_bytes
        return True

    def _progress(self) -> tuple[int, int]:
        return self._stage.store.stored, self._stage.store.ended

    def _is_settled(self) -> bool:
        if self._stage.store.ended < self._stage.publisher.ended:
            return False
        status = self._stage.bridge.observe()
        return status is not None and not status["messages"]["in_flight"] and not status["spool"]["messages"]

    def _try_a_last_process(self) -> None:
        """Whose account is known beforehand."""
        stage = self._stage
        before = stage.store.count_now()
        stage.bridge.kill()
        stage.bridge.start()
        if not self._is_ready():
            self._account_problems.append("the last process did not become ready")
            return
        stage.publisher.end(LAST_MESSAGES)
        if not self._settle():
            self._account_problems.append("the last process did not settle")
            return
        self._check_account(stage.store.count_now() - before)

    def _check_account(self, rows: int) -> None:
        """What the last process counts against what it was sent; redeliveries may be any number."""
        status = self._stage.bridge.observe()
        assert status is not None, "it has just answered"
        messages: dict[str, Any] = status["messages"]
        expected = dict.fromkeys(messages, 0) | {"duplicate": messages["duplicate"], "stored": LAST_MESSAGES}
        expected["received"] = LAST_MESSAGES + messages["duplicate"]
        if messages != expected:
            self._account_problems.append(f"the last process counts {messages}, expected are {expected}")
        if not rows == status["rows_stored"] == LAST_MESSAGES:
            self._account_problems.append(f"the last process counts {status['rows_stored']} rows; there are {rows} new")

    def _stop_the_bridge(self) -> None:
        self._revive()
        self._stage.bridge.stop()

    def _result(self, *, settled: bool, seconds: float) -> Result:
        stage, faults, parameters = self._stage, self._faults, self._parameters
        bridge, thief, publisher = stage.bridge, stage.thief, stage.publisher
        publishing_s = publisher.newest_s - (publisher.first_s or 0.0)
        log = bridge.log + thief.log
        return Result(
            parameters=parameters,
            machine=this_machine(postgres=stage.store.server_version()),
            published=publisher.published,
            published_per_s=round(publisher.published / max(0.001, publishing_s), 1),
            repeated_by_publisher=publisher.repeated,
            comparison=self._compare(),
            reach=self._reach(),
            settled=settled,
            left_at_broker=self._left_at_broker(),
            left_in_spool=sum(map(left_in_spool, stage.spool_directories)),
            account_problems=(*self._account_problems, *bridge.unbalanced, *thief.unbalanced),
            faults=dict(faults.done),
            missed=dict(faults.missed),
            skipped=dict(faults.skipped),
            recognised=bridge.recognised + thief.recognised,
            commits_in_doubt=log.count("whose commit was in doubt had been committed"),
            dropped_by_broker=stage.broker_log.count("are being dropped"),
            tracebacks=log.count("Traceback (most recent call last)"),
            ledger_rows=stage.store.ledger_rows(),
            drained=self._drain.drained if self._drain else None,
            spool_messages=max(bridge.largest_spool_messages, thief.largest_spool_messages),
            spool_bytes=max(bridge.largest_spool_bytes, thief.largest_spool_bytes),
            peak_rss_bytes=max(bridge.peak_rss_bytes, thief.peak_rss_bytes),
            final_rss_bytes=self._final_rss_bytes,
            cpu_s=round(bridge.cpu_s + thief.cpu_s, 2),
            seconds=round(seconds, 1),
            exits=dict(bridge.exits + thief.exits),
        )

    def _reach(self) -> int | None:
        parameters = self._parameters
        if parameters.freezes or parameters.processes > 1:  # while one process is away, the others go on
            return None
        return Settings().bridge_batch_size * parameters.workers

    def _left_at_broker(self) -> int | None:
        """Over the sessions of all processes; None where one of them has none."""
        protocol = self._parameters.protocol
        found = [left_in_session(self._stage.broker, each, protocol=protocol) for each in self._stage.client_ids]
        return None if None in found else sum(count or 0 for count in found)

    def _compare(self) -> Comparison:
        return compare(
            self._stage.store.rows_in_order(),
            self._parameters,
            published=self._stage.publisher.published,
            ended=self._stage.publisher.ended,
            dead_letters=self._stage.store.dead_letters(),
        )
