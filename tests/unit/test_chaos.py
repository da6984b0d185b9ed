"""The chaos harness sees what it is there for: a lost message, a second copy, one that was overtaken, a fault that
falls where it means nothing."""

from __future__ import annotations

import itertools
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.chaos.__main__ import _parser
from tests.chaos.comparison import Comparison, compare, displacement
from tests.chaos.drain import Drain
from tests.chaos.link import Link
from tests.chaos.proofs import Outcome, options, proofs, table
from tests.chaos.publisher import CYCLE, END, reading
from tests.chaos.schedule import OF_THE_DATABASE, Parameters, schedule
from tests.chaos.store import Row
from tests.waiting import wait_until

# -- the comparison


def rows(parameters: Parameters, published: int) -> list[Row]:
    """What has to be stored."""
    readings = [reading(number, parameters) for number in range(published)]
    return [(device, "seq", float(value)) for device, value, _ in readings]


def compared(parameters: Parameters, stored: list[Row], *, published: int, ended: int = 0) -> Comparison:
    return compare(stored, parameters, published=published, ended=ended, dead_letters=Counter())


@pytest.mark.parametrize("payload", ["unique", "constant", "cyclic"])
def test_what_is_stored_once_is_neither_lost_nor_duplicated_nor_different(payload):
    parameters = Parameters(payload=payload)

    found = compared(parameters, rows(parameters, 70_000), published=70_000)

    assert (found.stored, found.lost, found.duplicated, found.different) == (70_000, 0, 0, 0)


@pytest.mark.parametrize("payload", ["unique", "constant", "cyclic"])
def test_one_message_that_is_lost_is_seen(payload):
    parameters = Parameters(payload=payload)

    found = compared(parameters, rows(parameters, 1000)[:-1], published=1000)

    assert (found.lost, found.duplicated) == (1, 0)


@pytest.mark.parametrize("payload", ["unique", "constant", "cyclic"])
def test_one_message_that_is_stored_twice_is_seen(payload):
    parameters = Parameters(payload=payload)
    stored = rows(parameters, 1000)

    found = compared(parameters, [*stored, stored[7]], published=1000)

    assert (found.lost, found.duplicated) == (0, 1)


@pytest.mark.parametrize("payload", ["unique", "cyclic"])
def test_one_that_is_lost_does_not_make_up_for_another_that_is_stored_twice(payload):
    parameters = Parameters(payload=payload)
    stored = rows(parameters, 1000)

    found = compared(parameters, [*stored[1:], stored[7]], published=1000)

    assert (found.stored, found.lost, found.duplicated) == (1000, 1, 1)


def test_what_nobody_has_published_is_different_and_so_is_a_dead_letter():
    parameters = Parameters()
    stored = [*rows(parameters, 10), ("d3", "seq", 4.0)]

    found = compare(stored, parameters, published=10, ended=0, dead_letters=Counter({"broken": 2}))

    assert (found.different, found.lost, found.duplicated) == (3, 0, 0)


def test_the_last_messages_are_compared_but_not_counted():
    parameters = Parameters()
    stored = [*rows(parameters, 10), (END, "seq", 0.0), (END, "seq", 0.0)]

    found = compared(parameters, stored, published=10, ended=2)

    assert (found.stored, found.lost, found.duplicated) == (10, 1, 1)


def test_a_message_of_qos_0_may_be_lost_but_not_stored_twice():
    parameters = Parameters(qos0=0.5)
    stored = rows(parameters, 1000)
    unacknowledged = [row for row in stored if row[0].startswith("q")]
    assert 400 < len(unacknowledged) < 600
    acknowledged = [row for row in stored if row not in unacknowledged]

    found = compared(parameters, [*acknowledged, unacknowledged[0], unacknowledged[0]], published=1000)

    assert (found.lost, found.qos0_lost, found.duplicated) == (0, len(unacknowledged) - 1, 1)


def test_cyclic_payloads_repeat_exactly_when_packet_ids_do():
    parameters = Parameters(payload="cyclic")

    assert reading(CYCLE + 5, parameters) == reading(5, parameters)
    assert len({reading(number, parameters) for number in range(CYCLE)}) == CYCLE


def test_displacement_is_how_far_a_message_was_overtaken_by_a_later_one_of_its_own_device():
    in_order: list[Row] = [("d0", "seq", 0.0), ("d1", "seq", 1.0), ("d0", "seq", 20.0), ("d1", "seq", 21.0)]

    assert displacement(in_order) == 0
    assert displacement([in_order[3], in_order[0], in_order[2], in_order[1]]) == 20
    assert displacement([in_order[1], in_order[0], in_order[3], in_order[2]]) == 0


# -- the schedule


def test_the_same_parameters_have_the_same_faults_and_another_seed_has_others():
    assert schedule(Parameters()) == schedule(Parameters())
    assert schedule(Parameters()) != schedule(Parameters(seed=2))


def test_every_fault_that_is_asked_for_is_scheduled_in_the_midst_of_the_messages():
    parameters = Parameters(messages=1000, kills=3, early_kills=1, db_crashes=2, cuts=4, stalls=1, steals=1)

    faults = schedule(parameters)

    kinds = Counter(fault.kind for fault in faults)
    assert (kinds["kill"], kinds["early_kill"], kinds["db_crash"], kinds["steal"]) == (3, 1, 2, 1)
    assert kinds["cut_broker"] == kinds["cut_db"] == 4
    assert all(0 < fault.at < 1000 for fault in faults)


@pytest.mark.parametrize("seed", range(5))
def test_an_outage_is_in_the_middle_with_a_kill_in_its_middle_and_no_other_fault_of_the_database_within(seed):
    parameters = Parameters(
        messages=10_000, rate=100.0, outage=50.0, kills=5, cuts=20, db_crashes=9, stalls=5, seed=seed
    )

    faults = schedule(parameters)

    begin = next(fault for fault in faults if fault.kind == "outage")
    assert (begin.at, begin.seconds) == (2500, 50.0)
    assert any(fault.kind == "kill" and fault.at == 5000 for fault in faults)
    assert not [fault for fault in faults if fault.kind in OF_THE_DATABASE and 2500 <= fault.at < 7500]
    assert [fault for fault in faults if fault.kind == "cut_broker" and 2500 <= fault.at < 7500]


def test_an_outage_that_is_longer_than_the_messages_last_is_refused():
    assert "at least" in (Parameters(messages=1000, rate=100.0, outage=10.0).problem or "")
    assert Parameters(messages=2000, rate=100.0, outage=10.0).problem is None


# -- a link


@pytest.fixture
def link() -> Iterator[Link]:
    """To a server that sends everything back, on any number of connections."""

    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(1024):
                self.request.sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        with Link("127.0.0.1", server.server_address[1]) as link:
            yield link
        server.shutdown()
        thread.join()


def test_what_is_sent_on_a_frozen_connection_never_arrives_while_others_go_on(link):
    with connected(link) as frozen, connected(link) as other:
        assert ask(frozen, b"1") == ask(other, b"2") == b"echo"

        link.freezing = True
        frozen.sendall(b"lost")
        wait_until(lambda: not link.freezing, what="something to be sent")

        assert ask(other, b"3") == b"echo"
        frozen.settimeout(0.1)
        with pytest.raises(TimeoutError):
            frozen.recv(1)


def connected(link: Link) -> socket.socket:
    return socket.create_connection((link.host, link.port), timeout=5)


def ask(connection: socket.socket, data: bytes) -> bytes:
    """`echo` where the data come back."""
    connection.sendall(data)
    return b"echo" if connection.recv(1024) == data else b"something else"


# -- the drain


def test_a_drain_begins_with_the_first_message_that_is_stored_and_ends_when_nothing_is_behind():
    clock = itertools.count(100.0, 2.0)
    drain = Drain(stored=1000, clock=lambda: next(clock))

    for stored in (1000, 1500, 3500, 5500):
        drain.note(stored=stored, wanted=5000)
    drain.note(stored=9999, wanted=5000)

    assert drain.drained is not None
    assert (drain.drained.seconds, drain.drained.first_s) == (8.0, 4.0)
    assert (drain.drained.messages, drain.drained.rate) == (4500, 1000.0)


# -- the large runs


def test_every_large_run_has_a_name_of_its_own_and_can_be_run():
    runs = proofs(minutes=10)

    assert len({proof.name for proof in runs}) == len(runs)
    assert [proof.parameters.problem for proof in runs if proof.parameters.problem] == []


def test_the_command_line_of_a_large_run_means_its_parameters():
    for proof in proofs(minutes=10):
        parsed = vars(_parser().parse_args(list(options(proof.parameters))))

        assert {name: parsed[name] for name in Parameters.__dataclass_fields__} == {
            name: getattr(proof.parameters, name) for name in Parameters.__dataclass_fields__
        }


def test_a_run_that_breaks_down_is_in_the_table_and_is_no_proof():
    outcome = Outcome(proofs(minutes=10)[0], None, "it fell over")

    assert not outcome.good
    assert "**broke down**" in table([outcome])
    assert len({line.count("|") for line in table([outcome]).splitlines()}) == 1
