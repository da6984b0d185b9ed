"""Which replays are wanted, and when they are over: examples, then a broker that sends them when it likes."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mqtt_bridge.acks import AckTracker
from mqtt_bridge.retained import QUIET_S, Remembered, Retained

ALWAYS, IF_NEW, NEVER = 0, 1, 2


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


class Bridge:
    """A `Retained` in a connection that has begun, with a SUBACK for its filters."""

    def __init__(self, *, filters=("a/+", "b/#"), policy="once", is_v5=False, stored=(), withheld=()):
        self.clock = Clock()
        self.retained = Retained(filters, policy=policy, is_v5=is_v5, clock=self.clock)
        self.retained.load(Remembered(frozenset(stored), frozenset(withheld)))
        self.retained.connected(session_present=False)
        self.retained.subscribing()
        self.retained.granted(filters)

    def wait(self, seconds=QUIET_S):
        self.clock.now_s += seconds

    def ask(self, *, held=0):
        self.retained.probe()
        self.retained.probed(held)

    def note(self):
        """What the tender does once everything is durable; the filters that are stored by then."""
        self.retained.remembered = self.retained.remembering()
        return set(self.retained.remembered.stored)


# -- what the database remembers


def test_what_is_remembered_is_a_line_for_each_filter():
    remembered = Remembered(frozenset({"b/#", "a/+"}), frozenset({"stored c"}))

    assert str(remembered) == "stored a/+\nstored b/#\nwithheld stored c"
    assert Remembered.parse(str(remembered)) == remembered


@pytest.mark.parametrize("text", [None, "", "\n\n", "a/+", "lost a/+", "stored"])
def test_what_says_nothing_about_a_filter_is_no_hindrance(text):
    remembered = Remembered.parse(text)

    assert "a/+" not in remembered.stored | remembered.withheld


def test_a_filter_may_hold_what_python_takes_for_the_end_of_a_line():
    remembered = Remembered(frozenset({"a\u2028b/+", "a\x0bb"}))

    assert Remembered.parse(str(remembered)) == remembered


def test_a_filter_that_is_not_configured_any_more_is_forgotten():
    bridge = Bridge(filters=("a/+",), stored=("a/+", "gone/#"), withheld=("gone/too",))

    assert bridge.retained.remembering() == Remembered(frozenset({"a/+"}))


# -- what is asked for


@pytest.mark.parametrize(
    ("policy", "stored", "withheld", "expected"),
    [
        ("once", (), (), IF_NEW),
        ("once", ("a/+",), (), NEVER),
        ("once", (), ("a/+",), IF_NEW),  # granted to this process already
        ("always", (), (), ALWAYS),
        ("always", ("a/+",), (), ALWAYS),
        ("never", (), (), NEVER),
        ("never", (), ("a/+",), NEVER),
    ],
)
def test_mqtt_5_is_asked_for_what_is_needed(policy, stored, withheld, expected):
    bridge = Bridge(policy=policy, is_v5=True, stored=stored, withheld=withheld)

    assert bridge.retained.handling("a/+") == expected


def test_what_the_session_was_never_sent_is_asked_for_though_the_subscription_is_there():
    retained = Retained(["a/+"], policy="once", is_v5=True)
    retained.load(Remembered(withheld=frozenset({"a/+"})))

    retained.connected(session_present=True)

    assert retained.handling("a/+") == ALWAYS


@pytest.mark.parametrize("policy", ["once", "always", "never"])
def test_nothing_is_followed_for_a_shared_subscription(policy):
    bridge = Bridge(filters=(), policy=policy, is_v5=True)

    bridge.retained.granted(["$share/group/a/+"])

    assert not bridge.retained.due
    assert bridge.retained.remembering() == Remembered()
    assert bridge.retained.handling("$share/group/a/+") == NEVER


# -- what is wanted


@pytest.mark.parametrize("is_v5", [True, False])
def test_never_wants_no_replay_and_always_wants_every_one(is_v5):
    assert not Bridge(policy="never", is_v5=is_v5).retained.wants(b"a/1")
    assert Bridge(policy="always", is_v5=is_v5, stored=("a/+",)).retained.wants(b"a/1")


def test_over_mqtt_3_1_1_the_replays_of_a_stored_filter_are_not_wanted():
    bridge = Bridge(stored=("b/#",))

    assert [bridge.retained.wants(topic) for topic in (b"a/1", b"b", b"b/1/2", b"c")] == [True, False, False, True]


def test_a_topic_that_is_not_utf_8_is_matched_by_its_levels():
    bridge = Bridge(stored=("b/#",))

    assert bridge.retained.wants(b"a/\xff")
    assert not bridge.retained.wants(b"b/\xff")


def test_over_mqtt_5_what_arrives_was_asked_for():
    assert Bridge(is_v5=True, stored=("a/+",)).retained.wants(b"a/1")


def test_replays_that_a_predecessor_asked_for_may_come_before_our_subscribe():
    retained = Retained(["a/+", "b/#"], policy="once", is_v5=False)
    retained.load(Remembered(frozenset({"a/+"})))

    retained.connected(session_present=True)

    assert not retained.wants(b"a/1")
    assert retained.wants(b"b/1")


def test_replays_of_a_subscribe_that_was_sent_before_the_filter_was_stored_are_wanted():
    bridge = Bridge()
    bridge.wait()
    bridge.ask()
    bridge.note()
    assert bridge.retained.wants(b"a/1")

    bridge.retained.connected(session_present=False)
    bridge.retained.subscribing()

    assert not bridge.retained.wants(b"a/1")


# -- when replays are over


def test_replays_are_over_when_none_has_come_for_a_while_and_the_broker_holds_nothing():
    bridge = Bridge()
    assert not bridge.retained.due
    bridge.wait()
    assert bridge.retained.due

    bridge.ask()

    assert not bridge.retained.due
    assert bridge.note() == {"a/+", "b/#"}


def test_a_barrier_that_was_sent_before_the_quiet_time_was_over_proves_nothing():
    bridge = Bridge()
    bridge.wait(QUIET_S - 0.1)
    bridge.retained.probe()
    bridge.wait()

    bridge.retained.probed(0)

    assert bridge.note() == set()


@pytest.mark.parametrize("when", ["before the barrier", "before its answer"])
def test_a_replay_makes_the_quiet_time_begin_anew(when):
    bridge = Bridge()
    bridge.wait()
    if when == "before the barrier":
        bridge.retained.wants(b"a/1")
        assert not bridge.retained.due
    bridge.retained.probe()
    if when == "before its answer":
        bridge.retained.wants(b"a/1")
    bridge.retained.probed(0)
    assert bridge.note() == set()

    bridge.wait()
    bridge.ask()

    assert bridge.note() == {"a/+", "b/#"}


def test_a_new_connection_makes_the_quiet_time_begin_anew():
    bridge = Bridge()
    bridge.wait()

    bridge.retained.connected(session_present=True)
    assert not bridge.retained.due
    bridge.wait()
    bridge.ask()

    assert bridge.note() == {"a/+", "b/#"}


def test_without_a_suback_replays_are_never_over():
    bridge = Bridge()
    bridge.retained.connected(session_present=False)
    bridge.wait()
    assert not bridge.retained.due

    bridge.ask()

    assert bridge.note() == set()


def test_a_filter_that_was_refused_is_not_stored():
    bridge = Bridge()
    bridge.retained.connected(session_present=False)
    bridge.retained.granted(["b/#"])
    bridge.wait()

    bridge.ask()

    assert bridge.note() == {"b/#"}


@pytest.mark.parametrize(
    ("held", "over"),
    [
        ((100, 9), True),
        ((100, 10), False),  # a window of ten that is full looks like this
        ((9,), False),  # and nine may be all that this broker sends ahead
        ((5, 5), False),
        ((5, 4), True),
        ((1, 1), False),
        ((1, 0), True),
    ],
)
def test_a_window_with_room_means_that_nothing_is_queued(held, over):
    bridge = Bridge()
    bridge.wait()

    for count in held:
        bridge.ask(held=count)

    assert bridge.note() == ({"a/+", "b/#"} if over else set())


def test_another_connection_may_have_another_window():
    bridge = Bridge()
    bridge.ask(held=100)
    bridge.retained.connected(session_present=True)
    bridge.wait()

    bridge.ask(held=5)

    assert bridge.note() == set()


def test_always_stores_as_well():
    bridge = Bridge(policy="always")
    bridge.wait()

    bridge.ask()

    assert bridge.note() == {"a/+", "b/#"}


def test_never_stores_nothing_asks_nothing_and_keeps_what_was_stored():
    bridge = Bridge(policy="never", stored=("b/#",))
    bridge.wait()
    assert not bridge.retained.due

    bridge.ask()

    assert bridge.note() == {"b/#"}


def test_what_is_withheld_is_known_before_it_is_subscribed_to():
    retained = Retained(["a/+", "b/#"], policy="never", is_v5=True)

    retained.load(Remembered(frozenset({"b/#"}), frozenset({"gone"})))

    assert retained.remembering() == Remembered(frozenset({"b/#"}), frozenset({"a/+"}))


def test_what_was_withheld_is_stored_later():
    bridge = Bridge(withheld=("a/+",))
    bridge.wait()

    bridge.ask()

    assert bridge.note() == {"a/+", "b/#"}
    assert bridge.retained.remembered.withheld == set()


# -- everything at once

FILTERS = ("a/+", "b/#")
TOPICS = {"a/+": [b"a/%d" % number for number in range(4)], "b/#": [b"b", b"b/1", b"b/1/2"]}


class Broker:
    """One session: queue, window, replays. Wires to and from the client, read when the test says so.

    One that is slow sends its replays after SUBACK, by and by.
    """

    def __init__(self, *, window, slow):
        self.window = window
        self.slow = slow
        self.ids = itertools.count(1)
        self.lose_session()

    def lose_session(self):
        self.subscriptions = set()
        self.replays = deque()  # topics whose replay will be queued
        self.queue = deque()  # (topic, retain)
        self.in_flight = {}  # id -> (topic, retain)
        self.cut()

    def cut(self):
        self.to_client, self.to_broker = deque(), deque()

    def connect(self):
        self.cut()
        self.to_client += [("publish", packet_id) for packet_id in self.in_flight]
        self.fill()

    def publish(self, topic):
        if self.subscriptions:
            self.send(topic, retain=False)

    def send(self, topic, *, retain):
        self.queue.append((topic, retain))
        self.fill()

    def fill(self):
        while self.queue and len(self.in_flight) < self.window:
            packet_id = next(self.ids)
            self.in_flight[packet_id] = self.queue.popleft()
            self.to_client.append(("publish", packet_id))

    def read(self):
        kind, value = self.to_broker.popleft()
        if kind == "puback":
            del self.in_flight[value]
            self.fill()
        elif kind == "barrier":
            self.to_client.append(("unsuback", value))
        else:
            self.subscribe(value)
            self.to_client.append(("suback", None))

    def subscribe(self, handlings):
        for name, handling in handlings.items():
            if handling == ALWAYS or (handling == IF_NEW and name not in self.subscriptions):
                self.replays += TOPICS[name]
            self.subscriptions.add(name)
        if not self.slow:
            self.replay(len(self.replays))

    def replay(self, count):
        for _ in range(min(count, len(self.replays))):
            self.send(self.replays.popleft(), retain=True)


class RetainedMachine(RuleBasedStateMachine):
    """The bridge's part of the work between that broker and a database; processes die, sessions are lost."""

    IS_V5 = False

    @initialize(
        window=st.integers(1, 12), slow=st.booleans(), policy=st.sampled_from(["once", "once", "always", "never"])
    )
    def begin(self, window, slow, policy):
        self.clock = Clock()
        self.broker = Broker(window=window, slow=slow)
        self.noted = Remembered()  # in the database
        self.stored = set()  # topics whose replay is in the database
        self.positions = itertools.count(1)
        self.begin_process(policy)
        self.connect(session_present=False)

    def begin_process(self, policy):
        self.retained = Retained(FILTERS, policy=policy, is_v5=self.IS_V5, clock=self.clock)
        self.retained.load(self.noted)
        self.acks = AckTracker()
        self.held = []  # (position, topic, retain), received and not committed
        self.confirmed = False
        self.barrier = None
        self.note()

    def connect(self, *, session_present):
        self.broker.connect()
        self.acks.open(lambda packet_ids: self.broker.to_broker.extend(("puback", each) for each in packet_ids))
        self.retained.connected(session_present=session_present)
        self.confirmed &= session_present
        self.barrier = None
        if self.IS_V5 or not self.confirmed:
            self.retained.subscribing()
            # MQTT 3.1.1 knows no Retain Handling.
            handlings = {name: self.retained.handling(name) if self.IS_V5 else ALWAYS for name in FILTERS}
            self.broker.to_broker.append(("subscribe", handlings))

    # -- the wires

    @precondition(lambda self: self.broker.to_broker)
    @rule(count=st.integers(1, 12))
    def the_broker_reads(self, count):
        for _ in range(min(count, len(self.broker.to_broker))):
            self.broker.read()

    @precondition(lambda self: self.broker.replays)
    @rule(count=st.integers(1, 4))
    def the_broker_replays(self, count):
        self.broker.replay(count)

    @precondition(lambda self: self.broker.to_client)
    @rule(count=st.integers(1, 12))
    def the_bridge_reads(self, count):
        for _ in range(min(count, len(self.broker.to_client))):
            self.take_in(*self.broker.to_client.popleft())

    def take_in(self, kind, value):
        if kind == "suback":
            self.retained.granted(FILTERS)
            self.confirmed = True
        elif kind == "unsuback":
            self.acks.prove(value)
            self.retained.probed(self.acks.outstanding)
            self.barrier = None
        else:
            topic, retain = self.broker.in_flight[value]
            position = next(self.positions)
            wanted = not retain or self.retained.wants(topic)
            self.acks.add(position, value)
            self.held.append((position, topic, retain and wanted))

    @rule()
    def send_a_barrier(self):
        if self.barrier is None and (self.acks.unproven or self.retained.due):
            self.barrier = self.acks.mark()
            self.broker.to_broker.append(("barrier", self.barrier))
            self.retained.probe()

    # -- the rest of the bridge

    @precondition(lambda self: self.held)
    @rule(count=st.integers(1, 12))
    def commit(self, count):
        batch, self.held = self.held[:count], self.held[count:]
        self.stored |= {topic for _, topic, retain in batch if retain}
        self.acks.finish([position for position, *_ in batch])

    @rule()
    def note(self):
        remembering = self.retained.remembering()
        if not any(retain for *_, retain in self.held):
            self.noted = self.retained.remembered = remembering

    @rule(seconds=st.sampled_from([1.0, QUIET_S, 2 * QUIET_S]))
    def time_passes(self, seconds):
        if seconds >= QUIET_S:
            self.broker.replay(len(self.broker.replays))  # slow, but not as slow as that
        self.clock.now_s += seconds

    @rule(random=st.randoms(use_true_random=False))
    def be_busy(self, random):
        """A little of everything that goes on while nothing goes wrong."""
        for _ in range(random.randint(10, 30)):
            step = random.choice(
                [
                    lambda: self.the_broker_reads(random.randint(1, 12)),
                    lambda: self.the_broker_replays(random.randint(1, 4)),
                    lambda: self.the_bridge_reads(random.randint(1, 12)),
                    lambda: self.commit(random.randint(1, 12)),
                    lambda: self.time_passes(random.choice([1.0, QUIET_S])),
                    self.send_a_barrier,
                    self.note,
                ]
            )
            step()
            self.what_counts_as_stored_is_stored()

    @rule(topic=st.sampled_from([topic for topics in TOPICS.values() for topic in topics]), count=st.integers(1, 15))
    def devices_publish(self, topic, count):
        for _ in range(count):
            self.broker.publish(topic)

    # -- misfortunes

    @rule()
    def cut(self):
        self.connect(session_present=bool(self.broker.subscriptions))

    @rule(luck=st.integers(1, 4))
    def lose_session(self, luck):
        if luck == 1:
            self.broker.lose_session()
            self.connect(session_present=False)

    @rule(policy=st.sampled_from(["once", "once", "always", "never"]))
    def kill(self, policy):
        self.begin_process(policy)
        self.connect(session_present=bool(self.broker.subscriptions))

    # -- what holds

    @invariant()
    def what_counts_as_stored_is_stored(self):
        if hasattr(self, "noted"):
            assert {topic for name in self.noted.stored for topic in TOPICS[name]} <= self.stored

    def teardown(self):
        """Under `once`, and left in peace, everything is stored at last, and known to be."""
        if not hasattr(self, "noted"):
            return
        self.kill("once")
        for _ in range(3):
            while self.broker.to_client or self.broker.to_broker or self.held or self.broker.replays:
                self.the_broker_replays(len(self.broker.replays))
                self.the_broker_reads(len(self.broker.to_broker))
                self.the_bridge_reads(len(self.broker.to_client))
                self.commit(len(self.held))
            self.time_passes(QUIET_S)
            self.send_a_barrier()
        self.note()
        assert self.noted == Remembered(frozenset(FILTERS))


class RetainedMachineV5(RetainedMachine):
    """The same where the broker can be asked for no replays."""

    IS_V5 = True


TestRetainedMachine = RetainedMachine.TestCase
TestRetainedMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestRetainedMachineV5 = RetainedMachineV5.TestCase
TestRetainedMachineV5.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
