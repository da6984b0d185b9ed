"""What trips the watchdog and what does not, on a clock that the tests turn: every part is a stand-in with knobs."""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import dataclass, field

import pytest
from structlog.testing import capture_logs

from mqtt_bridge import watchdog as watchdog_module
from mqtt_bridge.sink import SILENCE_S
from mqtt_bridge.watchdog import (
    CONNECTING_STUCK_S,
    GRACE_S,
    JUMP_S,
    LEAVE_MARGIN_S,
    STALLED_S,
    TENDER_STUCK_S,
    Watchdog,
    signs_of_life,
)
from tests.waiting import wait_until

STATEMENT_S = 30.0
WORKER_STUCK_S = STALLED_S + STATEMENT_S + SILENCE_S
BATCH_WAIT_S = 60.0
"""The most that BRIDGE_BATCH_WAIT_MS allows: a small batch waits so long for more."""
SHUTDOWN_S = 20.0
WORKER = 7


@dataclass
class Subscriber:
    turns: int = 0
    connecting: bool = False
    reconnects: int = 0

    def reconnect(self):
        self.reconnects += 1


@dataclass
class Pipeline:
    in_hand: dict = field(default_factory=dict)
    taken: int = 0
    waits_for_a_free_worker: bool = False
    held: set = field(default_factory=set)

    def batches_in_hand(self):
        return dict(self.in_hand)

    def holds(self, position):
        return position in self.held


@dataclass
class Acks:
    head: int | None = None


@dataclass
class Sink:
    answered_s: float | None = None
    heard_s: float = 0.0


@dataclass
class Connections:
    taken_steps: Counter = field(default_factory=Counter)
    waits_s: list = field(default_factory=list)
    """For how long each lent connection has waited for its statement."""
    cut: list = field(default_factory=list)
    size: int = 4

    @property
    def in_use(self):
        return len(self.waits_s)

    def steps(self, thread):
        return self.taken_steps[thread]

    def cut_silent(self, *, at_most_s=math.inf):
        limit_s = min(STATEMENT_S + SILENCE_S, at_most_s)
        silent = [waited_s for waited_s in self.waits_s if waited_s > limit_s]
        self.waits_s = [waited_s for waited_s in self.waits_s if waited_s <= limit_s]
        self.cut += silent
        return len(silent)


class House:
    """A bridge of stand-ins. By default the network thread and the tender turn, and the database answers."""

    def __init__(self):
        self.now_s = 1000.0
        self.subscriber, self.pipeline, self.acks = Subscriber(), Pipeline(), Acks()
        self.sink, self.connections = Sink(heard_s=self.now_s), Connections()
        self.network_turns = self.tender_turns = self.database_answers = True
        self.receiving = True
        self.tended = 0
        self.drained = None
        self.dead = []
        self.failures = []
        self.exits = []
        self.postponed = 0
        self.stood_down = False
        signs = signs_of_life(
            subscriber=self.subscriber,
            pipeline=self.pipeline,
            acks=self.acks,
            sink=self.sink,
            steps=self.connections.steps,
            drainer=lambda: self.drained,
            tender=lambda: self.tended,
            statement_timeout_s=STATEMENT_S,
            batch_wait_s=BATCH_WAIT_S,
            clock=lambda: self.now_s,
        )
        self.leaving = False
        self.stopped = threading.Event()
        self.watchdog = Watchdog(
            signs,
            sink=self.sink,
            connections=self.connections,
            dead_threads=lambda: self.dead,
            watching=lambda: self.receiving,
            leaving=lambda: self.leaving,
            leave_within_s=SHUTDOWN_S,
            stopped=self.stopped,
            fail=self.fail,
            last_resort=self,
            clock=lambda: self.now_s,
        )

    def postpone(self):
        self.postponed += 1

    def stand_down(self):
        self.stood_down = True

    def end(self, code):
        self.exits.append(code)

    def fail(self, reason):
        self.failures.append(reason)
        self.leaving = True

    def live(self, seconds, each=lambda: None):
        """So many seconds pass; `each` happens in every one of them."""
        for _ in range(round(seconds)):
            self.now_s += 1
            self.subscriber.turns += self.network_turns
            self.tended += self.tender_turns
            self.connections.waits_s = [waited_s + 1 for waited_s in self.connections.waits_s]
            if self.database_answers:
                self.sink.answered_s = self.sink.heard_s = self.now_s
            each()
            self.watchdog.look()

    @property
    def reasons(self):
        return list(self.watchdog.reasons)

    @property
    def well(self):
        return not (self.reasons or self.failures or self.subscriber.reconnects)


@pytest.fixture
def house():
    return House()


# -- what each part looks like when it hangs


def network_hangs(house):
    house.network_turns = False


def connecting_hangs(house):
    house.subscriber.connecting = True
    house.network_turns = False


def worker_hangs(house):
    house.pipeline.in_hand[WORKER] = (1, 500)


def queue_waits(house):
    house.pipeline.waits_for_a_free_worker = True


def head_is_lost(house):
    house.acks.head = 4711


def tender_hangs(house):
    house.tender_turns = False


STALLS = [
    (network_hangs, STALLED_S, "the network thread hangs"),
    (connecting_hangs, CONNECTING_STUCK_S, "the network thread does not come back from connecting to the broker"),
    (worker_hangs, WORKER_STUCK_S, "a worker hangs with a batch in hand although the database answers"),
    (queue_waits, STALLED_S + BATCH_WAIT_S, "messages wait although a worker is free"),
    (head_is_lost, STALLED_S, "the oldest message is not acknowledged although nobody has it in hand"),
    (tender_hangs, TENDER_STUCK_S, "the tender thread hangs"),
]
stalls = pytest.mark.parametrize(("fall_ill", "limit_s", "reason"), STALLS)


@stalls
def test_a_part_that_does_not_get_on_is_noticed_after_its_time_and_not_before(house, fall_ill, limit_s, reason):
    fall_ill(house)
    house.live(limit_s)  # the first of these seconds sees the sign, the others that it stays
    assert house.well

    with capture_logs() as logs:
        house.live(1)

    assert house.reasons == [reason]
    [told] = logs
    assert (told["log_level"], told["event"], told["reason"]) == ("error", "the bridge is stuck", reason)
    assert "MainThread" in told["stack"]
    assert "test_watchdog.py" in told["stack"]
    assert house.failures == []


@stalls
def test_a_stall_is_told_once_however_long_it_lasts(house, fall_ill, limit_s, reason):
    fall_ill(house)

    with capture_logs() as logs:
        house.live(limit_s + GRACE_S - 1)

    assert [log["event"] for log in logs] == ["the bridge is stuck"]


@stalls
def test_a_stall_that_outlasts_its_grace_ends_the_bridge_and_stays_red(house, fall_ill, limit_s, reason):
    fall_ill(house)

    house.live(limit_s + GRACE_S)
    assert house.failures == []
    house.live(10)

    assert house.failures == [reason]
    assert house.reasons == [reason]


@stalls
def test_nothing_is_watched_before_the_bridge_receives(house, fall_ill, limit_s, reason):
    house.receiving = False
    fall_ill(house)

    house.live(limit_s + GRACE_S + 10)

    assert house.well


@stalls
def test_a_suspended_process_is_not_taken_for_one_that_hangs(house, fall_ill, limit_s, reason):
    fall_ill(house)
    for _ in range(20):  # a machine that sleeps for an hour, and again after a few seconds awake
        house.live(2)
        house.now_s += 3600
        house.live(1)

    assert house.well


def test_a_process_that_is_suspended_in_the_middle_goes_on_counting_what_it_has_seen(house):
    network_hangs(house)

    house.live(STALLED_S / 2)
    house.now_s += 3600
    house.live(STALLED_S / 2)
    assert house.well
    house.live(3)

    assert house.reasons == ["the network thread hangs"]


@pytest.mark.parametrize("passed_s", [1.0, 3.0, JUMP_S])
def test_a_watchdog_that_is_slow_itself_still_notices(house, passed_s):
    network_hangs(house)

    for _ in range(round(STALLED_S / passed_s) + 2):
        house.now_s += passed_s
        house.tended += 1
        house.watchdog.look()

    assert house.reasons == ["the network thread hangs"]


def test_what_gets_on_again_within_its_grace_turns_green_and_ends_nothing(house):
    worker_hangs(house)
    house.live(WORKER_STUCK_S + GRACE_S / 2)
    assert house.reasons

    with capture_logs() as logs:
        del house.pipeline.in_hand[WORKER]
        house.live(GRACE_S)

    assert house.well
    assert [log["event"] for log in logs] == ["what was stuck gets on again"]


# -- what must not trip it


def test_an_idle_bridge_is_well(house):
    house.live(3600)

    assert house.well


def test_an_outage_of_the_database_for_ten_minutes_is_no_stall(house):
    house.database_answers = False
    house.pipeline.in_hand[WORKER] = (1, 500)
    house.pipeline.held = {4711}
    house.acks.head = 4711

    def try_again():
        house.connections.taken_steps[WORKER] += house.now_s % 30 == 0  # the longest delay between two tries

    house.live(600, each=try_again)

    assert house.well


def test_a_worker_that_waits_for_a_database_that_does_not_answer_is_not_blamed(house):
    house.live(10)
    house.database_answers = False
    worker_hangs(house)

    house.live(3600)

    assert house.well


def test_a_worker_that_hung_while_the_database_was_away_is_noticed_when_it_is_back(house):
    worker_hangs(house)
    house.database_answers = False
    house.live(600)
    assert house.well

    house.database_answers = True
    house.live(WORKER_STUCK_S + 1)

    assert house.reasons == ["a worker hangs with a batch in hand although the database answers"]


def test_a_slow_statement_that_ends_within_its_time_is_no_hang(house):
    worker_hangs(house)

    def one_statement_after_the_other():
        house.connections.taken_steps[WORKER] += house.now_s % (STATEMENT_S + SILENCE_S) == 0

    house.live(3600, each=one_statement_after_the_other)

    assert house.well


def test_a_backlog_that_is_older_than_a_minute_but_shrinks_is_no_stall(house):
    house.acks.head = 1
    house.pipeline.held = set(range(10_000))

    def a_batch_in_half_a_minute():
        if house.now_s % 30 == 0:
            house.acks.head += 10
            house.pipeline.taken += 1
            house.pipeline.in_hand[WORKER] = (house.pipeline.taken, 10)

    house.live(3600, each=a_batch_in_half_a_minute)

    assert house.well


def test_a_head_that_a_worker_has_in_hand_is_the_matter_of_that_worker(house):
    house.acks.head = 4711
    house.pipeline.held = {4711}

    house.live(3600)

    assert house.well


def test_a_batch_that_waits_for_more_messages_is_no_stall(house):
    def take_when_the_wait_is_over():
        house.pipeline.waits_for_a_free_worker = True
        house.pipeline.taken += house.now_s % BATCH_WAIT_S == 0

    house.live(3600, each=take_when_the_wait_is_over)

    assert house.well


def test_a_long_wait_between_two_tries_to_connect_is_no_hang(house):
    def turn_every_half_minute():
        house.subscriber.turns += house.now_s % 30 == 0

    house.network_turns = False
    house.live(3600, each=turn_every_half_minute)

    assert house.well


def test_tries_to_connect_that_each_take_minutes_are_no_hang(house):
    def resolve_then_nap():
        second = house.now_s % 230
        house.subscriber.connecting = second < 200
        house.subscriber.turns += second == 0

    house.network_turns = False
    house.live(3600, each=resolve_then_nap)

    assert house.well


# -- remedies


def test_a_stalled_acknowledgement_is_delivered_again_on_a_new_connection(house):
    head_is_lost(house)

    house.live(STALLED_S + 1)
    assert house.subscriber.reconnects == 1
    assert house.reasons

    house.acks.head = None  # the connection has ended
    house.live(1)

    assert house.reasons == []
    assert house.failures == []


def test_another_head_that_stalls_is_delivered_again_as_well(house):
    for head in (4711, 4712, 4713):
        house.acks.head = head
        house.live(STALLED_S + 1)
        house.acks.head = None
        house.live(5)

    assert house.subscriber.reconnects == 3
    assert house.failures == []


def test_a_head_that_stalls_again_after_it_was_delivered_again_ends_the_bridge(house):
    head_is_lost(house)
    house.live(STALLED_S + 1)
    house.acks.head = None
    house.live(5)

    head_is_lost(house)
    house.live(STALLED_S + GRACE_S + 1)

    assert house.subscriber.reconnects == 1
    assert house.failures == ["the oldest message is not acknowledged although nobody has it in hand"]


# -- the end


def test_a_dead_thread_ends_the_bridge_at_first_sight(house):
    house.dead = ["the network thread is dead"]

    with capture_logs() as logs:
        house.live(3)

    assert house.failures == ["the network thread is dead"]
    assert [(log["log_level"], log["event"]) for log in logs] == [("critical", "the bridge cannot go on")]


def test_a_bridge_that_cannot_leave_is_ended_once_its_time_is_over(house):
    house.leaving = True

    house.live(SHUTDOWN_S + LEAVE_MARGIN_S)
    assert house.exits == []
    with capture_logs() as logs:
        house.live(100)

    assert house.exits == [1]
    assert "MainThread" in logs[0]["stack"]


def test_a_process_that_is_suspended_while_it_leaves_keeps_its_time(house):
    house.leaving = True
    house.live(1)
    house.now_s += 3600

    house.live(SHUTDOWN_S)

    assert house.exits == []


def test_a_watchdog_that_stumbles_goes_on(house, monkeypatch):
    monkeypatch.setattr(watchdog_module, "EVERY_S", 0.0)
    looks = []

    def stumble_twice():
        looks.append(1)
        if len(looks) == 3:
            house.stopped.set()
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(house.watchdog, "look", stumble_twice)
    with capture_logs() as logs:
        house.watchdog.start()
        wait_until(lambda: not house.watchdog.alive, what="the watchdog to end")

    assert len(looks) == len(logs) == 3
    assert house.postponed == 4, "at the start, since its thread may never get a turn, and with every look"
    assert house.stood_down


# -- a database that is silent


def test_a_statement_is_cut_when_nobody_has_heard_of_the_database_for_a_while(house):
    house.live(10)
    house.database_answers = False
    house.connections.waits_s = [0.0]

    house.live(SILENCE_S)
    assert house.connections.cut == []
    with capture_logs() as logs:
        house.live(1)

    assert house.connections.cut == [SILENCE_S + 1]
    assert [log["event"].partition(":")[0] for log in logs] == ["a database connection was cut"]


def test_what_was_sent_into_the_silence_is_cut_as_well(house):
    house.database_answers = False
    house.live(10)
    house.connections.waits_s = [0.0]

    house.live(SILENCE_S + 1)

    assert house.connections.cut == [SILENCE_S + 1]


def test_a_statement_that_is_slow_while_the_database_answers_others_keeps_its_time(house):
    house.connections.waits_s = [0.0]

    house.live(STATEMENT_S + SILENCE_S)
    assert house.connections.cut == []
    house.live(1)

    assert house.connections.cut == [STATEMENT_S + SILENCE_S + 1]


def test_a_database_that_refuses_is_not_silent(house):
    house.database_answers = False
    house.connections.waits_s = [0.0]

    def refuse():
        house.sink.heard_s = house.now_s

    house.live(STATEMENT_S, each=refuse)

    assert house.connections.cut == []


def test_a_database_that_is_slower_than_the_silence_lets_its_second_try_end(house):
    """Otherwise a server that needs 20 s for everything would be given up for ever."""
    house.database_answers = False
    committed = []

    def a_statement_that_takes_20_s():
        if not house.connections.waits_s:
            house.connections.waits_s = [0.0]
        elif house.connections.waits_s == [20.0]:
            committed.append(house.now_s)
            house.connections.waits_s = []
            house.sink.answered_s = house.sink.heard_s = house.now_s

    house.live(600, each=a_statement_that_takes_20_s)

    assert len(committed) >= 600 // 40 - 1


def test_a_statement_is_not_cut_where_it_holds_the_last_connection_so_that_no_probe_can_be_sent(house):
    house.database_answers = False
    house.connections.size = 1
    house.connections.waits_s = [0.0]

    house.live(STATEMENT_S + SILENCE_S)

    assert house.connections.cut == []


def test_a_process_that_was_suspended_cuts_nothing_before_it_has_looked_for_answers(house):
    house.connections.waits_s = [0.0]
    house.live(3)
    house.now_s += 3600
    house.connections.waits_s = [3603.0]
    house.watchdog.look()
    house.connections.waits_s = []  # the answer had been there all the time

    house.live(10)

    assert house.connections.cut == []


def test_a_drainer_that_does_not_get_on_although_the_database_answers_is_stuck(house):
    house.drained = 1

    house.live(WORKER_STUCK_S + 2)

    assert house.watchdog.reasons == ("the drainer hangs although the database answers",)


def test_a_drainer_without_anything_to_do_or_that_gets_on_is_well(house):
    house.live(2 * WORKER_STUCK_S)
    house.drained = 0
    for house.drained in range(1, 5):
        house.live(WORKER_STUCK_S - 2)

    assert house.watchdog.reasons == ()


def test_a_start_that_is_given_up_waits_for_no_lock_of_somebody_else(house):
    house.receiving = False
    house.connections.waits_s = [0.0]
    house.live(10)
    assert house.connections.cut == []

    house.leaving = True
    house.live(2)

    assert len(house.connections.cut) == 1


def test_a_batch_that_is_stored_while_the_bridge_leaves_keeps_its_time(house):
    house.connections.waits_s = [0.0]

    house.leaving = True
    house.live(2)

    assert house.connections.cut == []
