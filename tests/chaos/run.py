"""One run: servers, links, publisher and bridge; the faults of the schedule, one after the other; the comparison.

The publisher runs ahead by a few seconds of messages at most, so that no fault falls into silence.
A fault is done when the bridge has recovered from the one before so far that it can be hit (a connection to cut, a
process that receives); when it has not within `RECOVER_S`, the fault is counted as missed.

Everything runs in the caller's thread but for what publisher and proxies do in their own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import psycopg2

from mqtt_bridge.tools.embedded import Broker, Postgres
from tests.acceptance.traffic import query
from tests.chaos.bridge import Bridge
from tests.chaos.link import Link
from tests.chaos.publisher import END, Publisher
from tests.chaos.result import Result, compare
from tests.chaos.schedule import Fault, Kind, Parameters, schedule

AHEAD_S = 4.0
"""How far the publisher may run ahead of a fault, in seconds of its rate."""
RECOVER_S = 20.0
SETTLE_S = 60.0
"""Without any progress for so long, the end is not waited for any more."""
POLL_S = 0.05
SHOW_EVERY_S = 1.0

Show = Callable[[str], None]


class Run:
    """`Run(parameters, show=...).run()`; `show` gets a line of progress about every second."""

    def __init__(self, parameters: Parameters, *, show: Show = lambda _: None) -> None:
        self._parameters = parameters
        self._show = show
        self._shown_s = 0.0
        self._wanted = True  # the bridge is meant to run
        self._done: Counter[Kind] = Counter()
        self._missed: Counter[Kind] = Counter()
        self.log = ""
        """What the bridges wrote, once `run` has returned."""

    def run(self) -> Result:
        """Take everything up, do it, compare, take everything down."""
        began_s = time.monotonic()
        with ExitStack() as stack:
            self._take_up(stack)
            self._bridge.start()
            self._wait_until_ready()
            faults = schedule(self._parameters)
            if self._parameters.backlog:
                self._publish_a_backlog()
            for fault, following in zip(faults, [*faults[1:], None], strict=True):
                self._go_on_until(fault.at, ahead_to=following.at if following else self._parameters.messages)
                self._do(fault)
            self._go_on_until(self._parameters.messages)
            self._publisher.finish()
            settled = self._settle()
            self._stop_the_bridge()
            return self._result(settled=settled, seconds=time.monotonic() - began_s)

    # -- taking it up

    def _take_up(self, stack: ExitStack) -> None:
        parameters = self._parameters
        self._postgres = stack.enter_context(Postgres())
        self._broker = stack.enter_context(Broker())
        self._database = self._postgres.dsn()
        ports = self._broker.port, self._postgres.port
        if parameters.cuts or parameters.stalls or parameters.db_delay_ms:
            self._broker_link = stack.enter_context(Link("127.0.0.1", self._broker.port))
            self._database_link = stack.enter_context(
                Link("127.0.0.1", self._postgres.port, delay_s=parameters.db_delay_ms / 1000)
            )
            ports = self._broker_link.port, self._database_link.port
        self._bridge = stack.enter_context(self._make_bridge("chaos-bridge", *ports))
        self._thief = stack.enter_context(self._make_bridge("chaos-thief", *ports))
        rate = None if parameters.backlog else parameters.rate
        self._publisher = stack.enter_context(Publisher(self._broker, payload=parameters.payload, rate=rate))

    def _make_bridge(self, name: str, broker_port: int, database_port: int) -> Bridge:
        parameters = self._parameters
        tiny = {"BRIDGE_QUEUE_SIZE": 100, "BRIDGE_BATCH_SIZE": 20} if parameters.full_queue else {}
        return Bridge(
            name,
            without_ledger=parameters.without_ledger,
            DATABASE_URL=self._database.replace(f":{self._postgres.port}/", f":{database_port}/"),
            MQTT_HOST="127.0.0.1",
            MQTT_PORT=broker_port,
            MQTT_PROTOCOL=parameters.protocol,
            MQTT_TOPICS="chaos/{device}/telemetry",
            MQTT_CLIENT_ID="chaos-bridge",
            BRIDGE_WORKERS=parameters.workers,
            **tiny,
        )

    def _wait_until_ready(self) -> None:
        ready = self._wait(lambda: (self._bridge.observe() or {}).get("reasons") == [], timeout_s=60.0)
        if not ready:
            raise AssertionError(f"The bridge did not become ready:\n{self._bridge.log}")

    def _publish_a_backlog(self) -> None:
        self._stop_the_bridge()
        self._wanted = False
        messages = self._parameters.messages
        self._publisher.allow(messages)
        self._wait(lambda: self._publisher.published >= messages, timeout_s=600.0)
        self._publisher.leave()
        self._publisher.join()
        self._wanted = True
        self._bridge.start()

    # -- going on

    def _go_on_until(self, count: int, *, ahead_to: int = 0) -> None:
        """Until so many messages are published (of a backlog: stored), or nothing goes on any more.

        What is done then happens while more are published: to `ahead_to`, but for `AHEAD_S` at most, and a second's
        worth at least.
        """
        if self._parameters.backlog:
            if count < self._parameters.messages:
                self._wait(lambda: self._count_stored() >= count, timeout_s=SETTLE_S)
            return
        rate = int(self._parameters.rate)
        ahead = max(count + rate, min(ahead_to, int(count + AHEAD_S * rate)))
        self._publisher.allow(min(ahead, self._parameters.messages))
        self._wait(lambda: self._publisher.published >= count, timeout_s=None)

    def _wait(self, predicate: Callable[[], bool], *, timeout_s: float | None) -> bool:
        """Whether it came true in time. Starts the bridge again where it has ended, as a supervisor would."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not predicate():
            if deadline_s is not None and time.monotonic() > deadline_s:
                return False
            self._revive()
            self._show_progress()
            time.sleep(POLL_S)
        return True

    def _revive(self) -> None:
        if self._wanted and not self._bridge.running:
            self._bridge.note_end()
            self._bridge.start()

    def _show_progress(self) -> None:
        if time.monotonic() - self._shown_s < SHOW_EVERY_S:
            return
        self._shown_s = time.monotonic()
        self._bridge.observe()
        done = ", ".join(f"{kind} {count}" for kind, count in self._done.items())
        self._show(
            f"published {self._publisher.published:,} of {self._parameters.messages:,}, "
            f"stored {self._count_stored():,}; {done or 'no fault yet'}"
        )

    def _count_stored(self) -> int:
        """-1 where the database does not answer."""
        try:
            return int(query(self._database, "SELECT count(*) FROM readings WHERE device <> %s", END)[0][0])
        except psycopg2.Error:
            return -1

    # -- faults

    def _do(self, fault: Fault) -> None:
        actions: dict[Kind, Callable[[], bool]] = {
            "kill": self._kill,
            "db_crash": self._crash_the_database,
            "broker_restart": self._restart_the_broker,
            "cut_broker": lambda: self._cut(self._broker_link, "broker"),
            "cut_db": lambda: self._cut(self._database_link, "database"),
            "stall_broker": lambda: self._stall(self._broker_link, "broker", fault.seconds),
            "stall_db": lambda: self._stall(self._database_link, "database", fault.seconds),
            "steal": self._steal,
        }
        done = actions[fault.kind]()
        (self._done if done else self._missed)[fault.kind] += 1

    def _recovered(self, question: Callable[[dict[str, Any]], bool]) -> bool:
        """Whether the bridge says yes, in the time it is given."""

        def answer() -> bool:
            status = self._bridge.observe()
            return status is not None and question(status)

        return self._wait(answer, timeout_s=RECOVER_S)

    def _receives(self) -> bool:
        return self._recovered(lambda status: status["messages"]["received"] > 0)

    def _kill(self) -> bool:
        if not self._receives():
            return False
        self._bridge.kill()
        self._bridge.start()
        return True

    def _crash_the_database(self) -> bool:
        self._postgres.restart("immediate")
        return True

    def _restart_the_broker(self) -> bool:
        allowed = self._publisher.leave()
        self._broker.restart()
        self._publisher.join()
        self._publisher.allow(allowed)
        return True

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

    def _steal(self) -> bool:
        """A second bridge takes over; the first has to go. Then the second goes, and the first comes back."""
        if not self._receives():
            return False
        self._thief.start()
        first_s = time.monotonic()
        while self._bridge.running and time.monotonic() < first_s + RECOVER_S:
            self._publisher.allow(min(self._publisher.published + 200, self._parameters.messages))
            time.sleep(POLL_S)
        robbed = not self._bridge.running
        if robbed:
            self._bridge.note_end()
        else:
            self._bridge.kill()
        self._thief.stop()
        self._bridge.start()
        return robbed

    # -- the end

    def _settle(self) -> bool:
        """Whether the very last message was stored, and nothing is in flight; waits as long as there is progress."""
        stored = self._count_stored()
        while not self._wait(lambda: self._settled() or self._count_stored() > stored, timeout_s=SETTLE_S):
            return False
        return self._settled() or self._settle()

    def _settled(self) -> bool:
        try:
            ended = query(self._database, "SELECT 1 FROM readings WHERE device = %s LIMIT 1", END)
        except psycopg2.Error:
            return False
        status = self._bridge.observe() if ended else None
        return status is not None and status["messages"]["in_flight"] == 0

    def _stop_the_bridge(self) -> None:
        self._revive()
        self._bridge.stop()

    def _result(self, *, settled: bool, seconds: float) -> Result:
        self.log = self._bridge.log + self._thief.log
        parameters = self._parameters
        ledger_rows = int(query(self._database, "SELECT count(*) FROM mqtt_bridge.ledger")[0][0])
        return Result(
            parameters=parameters,
            published=self._publisher.published,
            repeated_by_publisher=self._publisher.repeated,
            comparison=compare(self._database, self._publisher.published, constant=parameters.payload == "constant"),
            settled=settled,
            faults=dict(self._done),
            missed=dict(self._missed),
            recognised=self._bridge.recognised + self._thief.recognised,
            commits_in_doubt=self.log.count("whose commit was in doubt had been committed"),
            tracebacks=self.log.count("Traceback (most recent call last)"),
            ledger_rows=ledger_rows,
            largest_rss_bytes=max(self._bridge.largest_rss_bytes, self._thief.largest_rss_bytes),
            seconds=round(seconds, 1),
            exits=dict(self._bridge.exits + self._thief.exits),
        )
