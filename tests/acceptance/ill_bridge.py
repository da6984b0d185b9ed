"""`mqtt-bridge` with an illness: `python -m tests.acceptance.ill_bridge ILLNESS run`.

What hangs or dies is patched in from here, at the message with the payload `{"seq": 25}`; the product has no such
switch. The watchdog's patience is made short, so that a test need not wait for minutes.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from mqtt_bridge import subscriber, watchdog
from mqtt_bridge.acks import AckTracker
from mqtt_bridge.batches import Work
from mqtt_bridge.cli import main
from mqtt_bridge.last_resort import OwnProcess
from mqtt_bridge.ledger import Entry
from mqtt_bridge.model import Message, Run, Tally, Translation
from mqtt_bridge.pipeline import Pipeline
from mqtt_bridge.routes import Router
from mqtt_bridge.spool import Spool, SpoolError
from mqtt_bridge.transactions import Stored
from tests.waiting import wait_until

ILL_AT = b'{"seq": 25}'
PATIENCE = {
    "STALLED_S": 3.0,
    "SILENCE_S": 2.0,
    "CONNECTING_STUCK_S": 4.0,
    "TENDER_STUCK_S": 4.0,
    "GRACE_S": 4.0,
    "LEAVE_MARGIN_S": 1.0,
}

_translate, _receive, _finish, _settle = Router.translate, Pipeline.receive, AckTracker.finish, Pipeline._settle


def _hang() -> NoReturn:
    while True:
        threading.Event().wait()


def _translate_or(fail: Callable[[], NoReturn]) -> None:
    def translate(self: Router, message: Message, tally: Tally) -> Translation:
        return fail() if message.payload == ILL_AT else _translate(self, message, tally)

    Router.translate = translate  # type: ignore[method-assign]


def _receive_or(fail: Callable[[], NoReturn]) -> None:
    def receive(self: Pipeline, run: Run) -> None:
        fail() if ILL_AT in run.payloads else _receive(self, run)

    Pipeline.receive = receive  # type: ignore[method-assign]


def _loop_for_ever() -> NoReturn:
    while True:
        pass


def _backtrack_for_ever() -> NoReturn:
    re.match("(a+)+$", "a" * 64 + "b")
    raise AssertionError("it came to an end")


def none_at_all() -> None:
    """Well, but with little patience."""


def the_decoder_loops() -> None:
    """One worker never comes back from a message, and burns its processor."""
    _translate_or(_loop_for_ever)


def the_interpreter_is_held() -> None:
    """Code in C runs for ever and lets no other thread have a turn, not even the watchdog."""
    _translate_or(_backtrack_for_ever)


def the_worker_dies() -> None:
    """One worker ends, holding its batch."""
    _translate_or(sys.exit)


def the_network_thread_hangs() -> None:
    """As if in a lock, in the middle of a packet."""
    _receive_or(_hang)


def the_network_thread_dies() -> None:
    """Of something that is no Exception, without a word."""
    _receive_or(sys.exit)


def connecting_hangs() -> None:
    """The second connection is never made, as when a name server hangs; the first ends at the message."""
    connect = subscriber.BrokerConnection.open
    connections = []

    def receive(self: Pipeline, run: Run) -> None:
        if ILL_AT in run.payloads:
            raise OSError("the connection ends here")
        _receive(self, run)

    def open_once(self: subscriber.BrokerConnection) -> None:
        connections.append(self)
        connect(self) if len(connections) == 1 else _hang()

    Pipeline.receive = receive  # type: ignore[method-assign]
    subscriber.BrokerConnection.open = open_once  # type: ignore[method-assign]


def an_acknowledgement_is_lost() -> None:
    """The tracker once does not hear that something is finished: nothing later is acknowledged any more."""
    lost: list[int] = []

    def finish(self: AckTracker, positions: Iterable[int]) -> None:
        heard = list(positions)
        if not lost and heard:
            lost.append(heard.pop(0))
        _finish(self, heard)

    AckTracker.finish = finish  # type: ignore[method-assign]


def a_worker_hangs_with_the_lock() -> None:
    """What everybody needs is never given back: the network thread, HTTP and the orderly end hang with it."""

    def settle(self: Pipeline, work: Work, entry: Entry | None, stored: Stored | None) -> None:
        if any(message.payload == ILL_AT for message in work.messages):
            with self._lock:
                _hang()
        _settle(self, work, entry, stored)

    Pipeline._settle = settle  # type: ignore[method-assign]


def the_queue_is_forgotten() -> None:
    """Nobody is woken for a message, and nobody who waits looks again."""

    def receive(self: Pipeline, run: Run) -> None:
        if ILL_AT in run.payloads:
            wait_until(lambda: not self._queue and not self.batches_in_hand(), what="all workers to wait")
            self._arrived.notify = lambda n=1: None  # type: ignore[method-assign]
        _receive(self, run)

    Pipeline.receive = receive  # type: ignore[method-assign]


def a_batch_may_be_on_the_disk() -> None:
    """The disk fails while it makes a batch durable: nobody can tell whether it is there."""
    append = Spool.append

    def fail(self: Spool, entry: Entry, messages: Sequence[Message]) -> bool:
        if any(message.payload == ILL_AT for message in messages):
            raise SpoolError("the disk has failed")
        return append(self, entry, messages)

    Spool.append = fail  # type: ignore[method-assign]


ILLNESSES = [
    none_at_all,
    the_decoder_loops,
    the_interpreter_is_held,
    the_worker_dies,
    the_network_thread_hangs,
    the_network_thread_dies,
    connecting_hangs,
    an_acknowledgement_is_lost,
    a_worker_hangs_with_the_lock,
    the_queue_is_forgotten,
    a_batch_may_be_on_the_disk,
]

if __name__ == "__main__":
    for name, seconds in PATIENCE.items():
        setattr(watchdog, name, seconds)
    OwnProcess.__init__.__defaults__ = (5.0,)
    {illness.__name__: illness for illness in ILLNESSES}[sys.argv.pop(1)]()
    main()
