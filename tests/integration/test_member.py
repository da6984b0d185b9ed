"""The process of a member: started, asked, started again; with small programs in the place of the bridge."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from structlog.testing import capture_logs

from mqtt_bridge import member as module
from mqtt_bridge.leash import Answer
from mqtt_bridge.member import FAILING, Member, see_all
from tests.observations import make_observation
from tests.waiting import wait_until

ANSWER = Answer(make_observation(), [])
OBEDIENT = f"""
import socket, sys
leash = socket.socket(fileno=int(sys.argv[1]))
while (request := leash.recv(1)) == b"?":
    leash.sendall({ANSWER.encoded()!r})
sys.exit(4 if request == b"!" else 5)
"""
TALKS_NONSENSE = """
import socket, sys
leash = socket.socket(fileno=int(sys.argv[1]))
leash.recv(1)
leash.sendall(b"nonsense\\n")
leash.recv(1)
"""


class House:
    """Members, and what became of them."""

    def __init__(self):
        self.members: list[Member] = []
        self.final: list[int] = []
        self.starts: list[int] = []

    def take_in(self, *programs):
        """Each start runs the next program, and the last one for ever."""
        rest = list(programs)

        def launch(leash):
            program = rest.pop(0) if len(rest) > 1 else rest[0]
            if isinstance(program, OSError):
                raise program
            process = subprocess.Popen([sys.executable, "-c", program, str(leash)], pass_fds=(leash,))
            self.starts.append(process.pid)
            return process

        member = Member(f"hall-{len(self.members) + 1}", launch, on_final=self.final.append)
        self.members.append(member)
        member.start()
        return member


@pytest.fixture
def house(monkeypatch):
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(module, "LONGEST_DELAY_S", 0.02)
    house = House()
    yield house
    for member in house.members:
        member.kill()
        assert member.wait(10)


def see(member, timeout_s=10.0):
    return member.see(member.ask(), timeout_s)


def running(member):
    """It as soon as it runs and answers."""
    return wait_until(lambda: (sight := see(member)).answer and sight, what="an answer")


def test_a_process_that_runs_tells_how_it_is(house):
    member = house.take_in(OBEDIENT)

    sight = running(member)

    assert sight.answer == ANSWER
    assert (sight.client_id, sight.pid, sight.restarts) == ("hall-1", house.starts[0], 0)
    assert (sight.unready, sight.unhealthy) == ([], [])


def test_told_to_stop_it_leaves_and_is_not_started_again(house):
    member = house.take_in(OBEDIENT)
    running(member)

    member.request_stop()
    member.request_stop()

    assert member.wait(10)
    assert member.exit_code == 4
    assert len(house.starts) == 1
    assert see(member).pid is None


def test_one_that_is_killed_is_started_again_with_a_warning_and_is_healthy_all_the_time(house):
    member = house.take_in(OBEDIENT)
    first = running(member)

    with capture_logs() as logs:
        os.kill(first.pid, signal.SIGKILL)
        second = wait_until(lambda: (sight := see(member)).restarts and sight.answer and sight, what="a restart")

    assert second.pid != first.pid
    assert second.unhealthy == []
    [warning] = [line for line in logs if line["log_level"] == "warning"]
    assert (warning["client_id"], warning["signal"], warning["deaths_in_a_row"]) == ("hall-1", "SIGKILL", 1)


@pytest.mark.parametrize("code", [2, 3])
def test_one_whose_end_is_final_is_not_started_again(house, code):
    member = house.take_in(f"import sys; sys.exit({code})")

    assert member.wait(10)
    assert house.final == [code]
    assert len(house.starts) == 1


def test_one_that_cannot_be_kept_running_is_not_healthy_and_tried_on(house):
    member = house.take_in(*["raise SystemExit(1)"] * FAILING, OBEDIENT)

    failing = wait_until(lambda: (sight := see(member)).unhealthy and sight, what="it to be not healthy")

    assert failing.unhealthy == ["its process ends again and again soon after its start"]
    assert running(member).restarts == FAILING


def test_a_steady_run_ends_the_series_of_deaths(house, monkeypatch):
    monkeypatch.setattr(module, "STEADY_S", 0.0)
    member = house.take_in(*["raise SystemExit(1)"] * (FAILING + 2), OBEDIENT)

    assert running(member).unhealthy == []


def test_one_that_cannot_be_started_is_tried_again(house):
    member = house.take_in(OSError("no memory"), OBEDIENT)

    assert running(member).pid == house.starts[0]


def test_one_that_is_silent_costs_no_more_than_the_time_that_was_given_and_is_not_healthy_after_a_while(
    house, monkeypatch
):
    silent, other = house.take_in(OBEDIENT), house.take_in(OBEDIENT)
    os.kill(running(silent).pid, signal.SIGSTOP)
    running(other)

    began_s = time.monotonic()
    sights = [see_all(house.members, 0.2) for _ in range(2 * module.UNANSWERED)][-1]

    assert time.monotonic() - began_s < 30
    assert [sight.unready for sight in sights] == [["its process does not answer"], []]
    assert sights[0].unhealthy == []
    monkeypatch.setattr(module, "SILENT_S", 0.1)
    assert see(silent, 0.0).unhealthy == ["its process has not answered for a minute"]
    os.kill(sights[0].pid, signal.SIGCONT)
    assert running(silent).unhealthy == []


def test_one_that_talks_nonsense_is_stopped_and_started_again(house):
    member = house.take_in(TALKS_NONSENSE, OBEDIENT)
    wait_until(lambda: see(member, 0.1).pid, what="the first process")

    assert running(member).restarts == 1


def test_killed_it_is_gone_and_nobody_takes_its_place(house):
    member = house.take_in(OBEDIENT)
    running(member)

    member.kill()

    assert member.wait(10)
    assert member.exit_code == -signal.SIGKILL
    assert len(house.starts) == 1


def test_stopped_before_its_first_process_there_is_none(house):
    entered, leave = threading.Event(), threading.Event()

    def launch(leash):
        entered.set()
        assert leave.wait(10)
        return subprocess.Popen([sys.executable, "-c", OBEDIENT, str(leash)], pass_fds=(leash,))

    member = Member("hall-1", launch, on_final=house.final.append)
    house.members.append(member)
    member.start()
    assert entered.wait(10)

    member.request_stop()  # while it is being started
    leave.set()

    assert member.wait(10)
    assert member.exit_code == 4
