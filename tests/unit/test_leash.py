"""The tie between a process and its supervisor, over a real pair of sockets."""

from __future__ import annotations

import socket
import threading

import pytest

from mqtt_bridge.leash import ASK, STOP, Answer, Leash
from tests.observations import make_balance, make_observation

ANSWER = Answer(make_observation(make_balance(received=3, stored=2, in_flight=1)), ["a worker thread is dead"])


class Held:
    """A process that is held, and the end that holds it."""

    def __init__(self, answer=lambda: ANSWER):
        self.stopped = threading.Event()
        self.end, theirs = socket.socketpair()
        self.end.settimeout(10)
        self.leash = Leash(theirs.detach(), stop=self.stopped.set, answer=answer)
        self.leash.start()

    def read_line(self):
        with self.end.makefile("rb") as stream:
            return stream.readline()


@pytest.fixture
def hold():
    made = []

    def make(**options):
        made.append(Held(**options))
        return made[-1]

    yield make
    for held in made:
        held.end.close()
        assert held.stopped.wait(10)


def test_an_answer_arrives_as_it_was_given():
    assert Answer.decoded(ANSWER.encoded()) == ANSWER


def test_who_asks_is_answered_each_time_in_one_line(hold):
    held = hold()

    held.end.sendall(ASK)
    first = held.read_line()
    held.end.sendall(ASK)

    assert Answer.decoded(first) == Answer.decoded(held.read_line()) == ANSWER
    assert not held.stopped.is_set()


def test_told_to_stop_the_process_stops_and_answers_on(hold):
    held = hold()

    held.end.sendall(STOP + ASK)

    assert Answer.decoded(held.read_line()) == ANSWER
    assert held.stopped.is_set()


def test_when_the_supervisor_is_gone_the_process_stops(hold):
    held = hold()

    held.end.close()

    assert held.stopped.wait(10)


def test_a_process_that_cannot_answer_stops_so_that_another_takes_its_place(hold):
    def fail():
        raise ZeroDivisionError

    held = hold(answer=fail)

    held.end.sendall(ASK)

    assert held.stopped.wait(10)
    assert held.read_line() == b""
