"""In-order release of PUBACKs: examples, and random interleavings against a model that is too simple to be wrong."""

from __future__ import annotations

import threading
from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from mqtt_bridge.acks import AckTracker


def opened():
    """A tracker with an open connection, and the list of packet ids that it sends there."""
    acks, sent = AckTracker(), []
    acks.open(sent.extend)
    return acks, sent


def test_a_puback_waits_until_every_earlier_delivery_is_finished():
    acks, sent = opened()
    for position in (1, 2, 3):
        acks.add(position, 100 + position)

    acks.finish([3])
    acks.finish([2])
    assert sent == []

    acks.finish([1])
    assert sent == [101, 102, 103]


def test_a_delivery_that_was_committed_before_is_acknowledged_at_once_but_not_before_its_turn():
    acks, sent = opened()

    acks.add(1, 11, finished=True)
    assert sent == [11]

    acks.add(2, 12)
    acks.add(3, 13, finished=True)
    assert sent == [11]

    acks.finish([2])
    assert sent == [11, 12, 13]


def test_what_an_old_connection_delivered_is_not_acknowledged_on_the_next():
    acks, old = opened()
    acks.add(1, 11)
    acks.add(2, 12)

    acks.close()
    acks.finish([1])
    new = []
    acks.open(new.extend)
    acks.finish([2])

    assert old == []
    assert new == []
    assert acks.outstanding == 0


def test_a_redelivery_is_acknowledged_on_the_connection_that_brought_it_once_the_original_is_finished():
    acks, old = opened()
    acks.add(7, 11)
    acks.close()
    new = []
    acks.open(new.extend)
    acks.add(7, 11)

    acks.finish([7])

    assert (old, new) == ([], [11])


def test_finishing_twice_acknowledges_once():
    acks, sent = opened()
    acks.add(1, 11)

    acks.finish([1])
    acks.finish([1])

    assert sent == [11]


def test_a_delivery_added_after_the_end_of_its_connection_is_forgotten():
    acks, sent = opened()
    acks.close()

    acks.add(1, 11)
    acks.add(2, 12, finished=True)

    assert (sent, acks.outstanding) == ([], 0)


def test_a_barrier_proves_what_was_acknowledged_before_it_and_nothing_later():
    acks, _ = opened()
    for position in (1, 2, 3):
        acks.add(position, 10 + position)
    acks.finish([1, 2])
    mark = acks.mark()
    acks.finish([3])

    assert acks.prove(mark) == [1, 2]
    assert acks.unproven == 1
    assert acks.prove(mark) == []
    assert acks.prove(acks.mark()) == [3]


def test_what_is_unacknowledged_and_what_is_unproven_are_told_apart():
    acks, _ = opened()
    for position in (1, 2, 3):
        acks.add(position, position)

    acks.finish([1, 3])

    assert (acks.unacknowledged, acks.unproven, acks.outstanding) == (2, 1, 3)


def test_a_delivery_on_its_way_to_being_acknowledged_is_outstanding():
    # To believe that the broker holds nothing while it does would end the wait for its retained messages.
    acks, leaving, go_on = AckTracker(), threading.Event(), threading.Event()
    acks.open(lambda _: leaving.set() or go_on.wait())
    acks.add(1, 11)
    worker = threading.Thread(target=acks.finish, args=([1],))
    worker.start()
    assert leaving.wait(10)

    seen = []
    reader = threading.Thread(target=lambda: seen.append(acks.outstanding))
    reader.start()
    reader.join(0.1)  # without the lock it would have read by now
    go_on.set()
    reader.join()
    worker.join()

    assert seen == [1]


def test_proofs_start_anew_with_each_connection():
    acks, _ = opened()
    acks.add(1, 11, finished=True)
    acks.open(lambda _: None)
    acks.add(2, 12, finished=True)

    assert acks.mark() == 1
    assert acks.prove(1) == [2]


def test_workers_that_finish_side_by_side_do_not_swap_acknowledgements():
    acks, sent = opened()
    total, workers = 2000, 4
    for position in range(total):
        acks.add(position, position)
    start = threading.Barrier(workers)

    def finish_every_fourth(first):
        start.wait()
        for position in range(first, total, workers):
            acks.finish([position])

    threads = [threading.Thread(target=finish_every_fourth, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sent == list(range(total))


class Connection:
    """What one connection received and sent, as an observer would write it down."""

    def __init__(self):
        self.received = []  # (position, packet id)
        self.sent = []  # packet ids
        self.proven = 0  # of those sent
        self.marks = []  # how many were sent when a barrier went out
        self.is_open = True


class AckMachine(RuleBasedStateMachine):
    """Deliveries come, finish, come again on other connections; barriers go out and are answered, or never are."""

    deliveries = Bundle("deliveries")

    def __init__(self):
        super().__init__()
        self.acks = AckTracker()
        self.connections = []
        self.finished = set()
        self.positions = count(1)
        self.packet_ids = count(1)

    @property
    def here(self):
        connection = self.connections[-1] if self.connections else None
        return connection if connection and connection.is_open else None

    def expected(self):
        """The finished prefix of what this connection has received."""
        prefix = []
        for position, packet_id in self.here.received:
            if position not in self.finished:
                break
            prefix.append(packet_id)
        return prefix

    @rule()
    def open(self):
        if self.here:
            self.here.is_open = False
        connection = Connection()
        self.connections.append(connection)
        self.acks.open(connection.sent.extend)

    @precondition(lambda self: self.here)
    @rule()
    def close(self):
        self.here.is_open = False
        self.acks.close()

    @rule(target=deliveries)
    def deliver(self):
        position = next(self.positions)
        self._add(position)
        return position

    @precondition(lambda self: self.here)
    @rule(position=deliveries)
    def redeliver(self, position):
        if position not in [known for known, _ in self.here.received]:
            self._add(position)

    def _add(self, position):
        packet_id = next(self.packet_ids)
        self.acks.add(position, packet_id, finished=position in self.finished)
        if self.here:
            self.here.received.append((position, packet_id))

    @rule(positions=st.lists(deliveries, max_size=4))
    def finish(self, positions):
        self.finished.update(positions)
        self.acks.finish(positions)

    @precondition(lambda self: self.here)
    @rule()
    def send_barrier(self):
        assert self.acks.mark() == len(self.here.sent)
        self.here.marks.append(len(self.here.sent))

    @precondition(lambda self: self.here and self.here.marks)
    @rule()
    def answer_barrier(self):
        connection = self.here
        mark = connection.marks.pop(0)

        proven = self.acks.prove(mark)

        assert proven == [position for position, _ in connection.received[connection.proven : mark]]
        connection.proven = mark

    @invariant()
    def what_was_sent_is_the_finished_prefix_of_the_receive_order(self):
        if self.here:
            assert self.here.sent == self.expected()

    @invariant()
    def a_closed_connection_sends_nothing_more(self):
        for connection in self.connections:
            ids = [packet_id for _, packet_id in connection.received]
            assert connection.sent == ids[: len(connection.sent)]
        closed = [len(c.sent) for c in self.connections if not c.is_open]
        assert closed[: len(getattr(self, "closed", []))] == getattr(self, "closed", [])
        self.closed = closed

    @invariant()
    def the_figures_are_right(self):
        connection = self.here
        sent, proven, received = (
            (len(connection.sent), connection.proven, len(connection.received)) if connection else (0, 0, 0)
        )
        assert self.acks.unacknowledged == received - sent
        assert self.acks.unproven == sent - proven
        assert self.acks.outstanding == received - proven
        waiting = [position for position, _ in connection.received[sent:]] if connection else []
        assert self.acks.head == next(iter(waiting), None)


TestAckMachine = AckMachine.TestCase
TestAckMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class RunMachine(RuleBasedStateMachine):
    """Whole runs added at once send the same as their deliveries added one by one."""

    def __init__(self):
        super().__init__()
        self.at_once, self.one_by_one = AckTracker(), AckTracker()
        self.sent = [], []
        self.positions, self.packet_ids = count(1), count(1)
        self.known = []

    @property
    def both(self):
        return self.at_once, self.one_by_one

    @rule()
    def open(self):
        for acks, sent in zip(self.both, self.sent, strict=True):
            acks.open(sent.extend)

    @rule()
    def close(self):
        for acks in self.both:
            acks.close()

    @rule(size=st.integers(1, 5))
    def deliver(self, size):
        positions = range(next(self.positions), next(self.positions) + size)
        self.positions = count(positions[-1] + 1)
        packet_ids = [next(self.packet_ids) for _ in positions]

        self.at_once.add_run(positions, packet_ids)
        for position, packet_id in zip(positions, packet_ids, strict=True):
            self.one_by_one.add(position, packet_id)
        self.known += positions

    @rule(finished=st.booleans())
    def deliver_one(self, finished):
        position, packet_id = next(self.positions), next(self.packet_ids)
        for acks in self.both:
            acks.add(position, packet_id, finished=finished)
        self.known.append(position)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def finish(self, data):
        positions = data.draw(st.lists(st.sampled_from(self.known[-12:]), max_size=6))
        for acks in self.both:
            acks.finish(positions)

    @rule()
    def prove(self):
        assert self.at_once.prove(self.at_once.mark()) == self.one_by_one.prove(self.one_by_one.mark())

    @invariant()
    def they_are_the_same(self):
        assert self.sent[0] == self.sent[1]
        for figure in ("head", "unacknowledged", "unproven", "outstanding"):
            assert getattr(self.at_once, figure) == getattr(self.one_by_one, figure)


TestRunMachine = RunMachine.TestCase
TestRunMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
