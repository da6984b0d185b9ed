"""Brokers that do not behave like Mosquitto: nothing is lost, and what can be recognised is stored once.

The broker is scripted, the database real. The bridge is the whole of it, in this process; where it has to be killed
it is a process of its own. All messages are identical, so that only their packet ids tell them apart.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from mqtt_bridge.bridge import Bridge
from mqtt_bridge.settings import load
from tests.acceptance.traffic import query
from tests.program import Program
from tests.proxy import TcpProxy
from tests.scripted_broker import ScriptedBroker
from tests.waiting import wait_until

TOPIC, SAME = b"devices/1/telemetry", b'{"door": "open"}'

MakeBridge = Callable[..., Bridge]


@pytest.fixture
def scripted() -> Iterator[ScriptedBroker]:
    """A broker that answers no SUBSCRIBE and no UNSUBSCRIBE: no PUBACK is ever proven, everything may come again."""
    with ScriptedBroker() as broker:
        broker.answer_subscribe = False
        yield broker


@pytest.fixture(params=["fast", "stock"])
def run_bridge(request: pytest.FixtureRequest, database: str, scripted: ScriptedBroker) -> Iterator[MakeBridge]:
    """Runs a bridge in this process, subscribed when the call returns; stops it after the test."""
    running: list[tuple[Bridge, threading.Thread]] = []

    def start(**others: object) -> Bridge:
        others = {"MQTT_RECEIVE": request.param, **others}
        bridge = Bridge(load(settings(database, scripted) | texts(others), env_file=None))
        thread = threading.Thread(target=bridge.run, name="bridge")
        thread.start()
        running.append((bridge, thread))
        scripted.wait_for_subscribe()
        return bridge

    yield start
    for bridge, thread in running:
        scripted.drop()  # or it would wait for its acknowledgements to be proven
        bridge.request_stop()
        thread.join(30)
        assert not thread.is_alive()


def settings(database: str, broker: ScriptedBroker) -> dict[str, str]:
    return texts(
        {
            "DATABASE_URL": database,
            "MQTT_HOST": broker.host,
            "MQTT_PORT": broker.port,
            "HTTP_PORT": 0,
            "BRIDGE_SHUTDOWN_S": 3,
        }
    )


def texts(values: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def publish(broker: ScriptedBroker, ids: Iterable[int], *, dup: bool = False) -> None:
    for packet_id in ids:
        broker.publish(TOPIC, SAME, mid=packet_id, dup=dup)


def reconnect(broker: ScriptedBroker, *, session_present: bool = True) -> None:
    """End the connection, and wait until the bridge is back."""
    broker.answer.session_present = session_present
    connections = len(broker.record.connects)
    broker.drop(reset=True)
    broker.wait_for_connect(connections + 1)


def stored(database: str) -> int:
    return int(query(database, "SELECT count(*) FROM readings")[0][0])


def wait_until_stored(database: str, count: int) -> None:
    wait_until(lambda: stored(database) >= count, timeout_s=40, what=f"{count} readings")


def through(database: str, link: TcpProxy) -> str:
    return database.replace(f":{port_of(database)}/", f":{link.port}/")


def port_of(database: str) -> int:
    return int(query(database, "SHOW port")[0][0])


@contextmanager
def warnings_of_the_ledger() -> Iterator[list[Any]]:
    with capture_logs() as logs:
        warnings: list[Any] = []
        yield warnings
        warnings += [log for log in logs if "packet ids of the broker step back" in log["event"]]


# -- brokers that send again on the same connection


@pytest.mark.parametrize(("redelivery", "dup"), [("marked", True), ("unmarked", True), ("unmarked", False)])
def test_what_is_sent_again_while_it_waits_for_the_database_is_stored_and_acknowledged_once(
    run_bridge, scripted, database, redelivery, dup
):
    with TcpProxy("127.0.0.1", port_of(database)) as link:
        bridge = run_bridge(DATABASE_URL=through(database, link), MQTT_REDELIVERY=redelivery)
        link.stall()
        publish(scripted, [1, 2, 3])

        publish(scripted, [1, 2, 3], dup=dup)
        publish(scripted, [4])
        wait_until(lambda: bridge.status()["messages"]["received"] == 7, what="all deliveries")
        link.resume()

        assert scripted.wait_for_pubacks(4) == [1, 2, 3, 4]
    assert stored(database) == 4
    assert bridge.status()["messages"] | {"received": 7, "stored": 4, "duplicate": 3} == bridge.status()["messages"]


@pytest.mark.parametrize("redelivery", ["marked", "unmarked"])
def test_what_is_sent_again_with_dup_although_it_was_acknowledged_is_stored_once(
    run_bridge, scripted, database, redelivery
):
    run_bridge(MQTT_REDELIVERY=redelivery)
    publish(scripted, [1, 2, 3])
    scripted.wait_for_pubacks(3)

    publish(scripted, [1, 2, 3], dup=True)
    publish(scripted, [4])

    assert scripted.wait_for_pubacks(4) == [1, 2, 3, 4]
    assert stored(database) == 4


def test_what_is_sent_again_without_dup_on_the_same_connection_is_stored_again_with_a_warning(
    run_bridge, scripted, database
):
    run_bridge()

    with warnings_of_the_ledger() as warnings:
        publish(scripted, [1, 2, 3])
        scripted.wait_for_pubacks(3)
        publish(scripted, [1, 2, 3])
        publish(scripted, [4])

        assert scripted.wait_for_pubacks(7) == [1, 2, 3, 1, 2, 3, 4]
    assert stored(database) == 7
    assert len(warnings) == 1


# -- brokers that redeliver with and without DUP


@pytest.mark.parametrize(("redelivery", "dup"), [("marked", True), ("unmarked", False), ("unmarked", True)])
def test_what_is_redelivered_on_the_next_connection_is_acknowledged_again_and_stored_once(
    run_bridge, scripted, database, redelivery, dup
):
    run_bridge(MQTT_REDELIVERY=redelivery)
    publish(scripted, [1, 2, 3])
    scripted.wait_for_pubacks(3)

    reconnect(scripted)
    publish(scripted, [1, 2, 3], dup=dup)
    publish(scripted, [4])

    assert scripted.wait_for_pubacks(7)[3:] == [1, 2, 3, 4]
    assert stored(database) == 4


@pytest.mark.parametrize(("redelivery", "dup"), [("marked", True), ("unmarked", False)])
def test_what_is_redelivered_while_it_waits_for_the_database_is_acknowledged_when_that_has_stored_it_once(
    run_bridge, scripted, database, redelivery, dup
):
    with TcpProxy("127.0.0.1", port_of(database)) as link:
        bridge = run_bridge(DATABASE_URL=through(database, link), MQTT_REDELIVERY=redelivery)
        link.stall()
        publish(scripted, [1, 2, 3])
        wait_until(lambda: bridge.status()["messages"]["received"] == 3, what="the first deliveries")

        reconnect(scripted)
        publish(scripted, [1, 2, 3], dup=dup)
        publish(scripted, [4])
        wait_until(lambda: bridge.status()["messages"]["received"] == 7, what="all deliveries")
        assert not scripted.record.pubacks
        link.resume()

        assert scripted.wait_for_pubacks(4) == [1, 2, 3, 4]
    assert stored(database) == 4


def test_a_redelivery_without_dup_that_was_not_announced_is_stored_again_with_a_warning(run_bridge, scripted, database):
    run_bridge(MQTT_REDELIVERY="marked")

    with warnings_of_the_ledger() as warnings:
        publish(scripted, [1, 2, 3])
        scripted.wait_for_pubacks(3)
        reconnect(scripted)
        publish(scripted, [1, 2, 3])
        publish(scripted, [4])

        assert scripted.wait_for_pubacks(7)[3:] == [1, 2, 3, 4]
    assert stored(database) == 7
    assert len(warnings) == 1


def test_renumbered_redeliveries_are_stored_again_and_nothing_is_lost(run_bridge, scripted, database):
    run_bridge(MQTT_REDELIVERY="renumbered")

    with warnings_of_the_ledger() as warnings:
        publish(scripted, [1, 2, 3])
        scripted.wait_for_pubacks(3)
        reconnect(scripted)
        publish(scripted, [3, 1, 2], dup=True)  # any id may be any message
        publish(scripted, [1, 9])

        assert scripted.wait_for_pubacks(8)[3:] == [3, 1, 2, 1, 9]
    assert stored(database) == 8
    assert not warnings


# -- brokers that take the lowest free packet id


def test_a_broker_that_takes_the_lowest_free_packet_id_loses_no_identical_message(run_bridge, scripted, database):
    run_bridge()

    with warnings_of_the_ledger() as warnings:
        for count in range(1, 21):
            publish(scripted, [1])
            scripted.wait_for_pubacks(count)

    assert stored(database) == 20
    assert len(warnings) == 1


def test_a_broker_that_takes_the_lowest_free_packet_id_loses_no_identical_message_through_cuts(
    run_bridge, scripted, database
):
    run_bridge()

    for count in range(1, 6):
        publish(scripted, [1, 2])
        scripted.wait_for_pubacks(2 * count)
    for count in range(6, 8):  # a third short connection in a row would look like a contested client id
        reconnect(scripted)
        publish(scripted, [1, 2], dup=True)  # sent into the connection that was cut, and never received
        scripted.wait_for_pubacks(2 * count)

    assert stored(database) == 14


def test_a_broker_that_takes_the_lowest_free_packet_id_loses_no_identical_message_through_a_kill(
    tmp_path, scripted, database
):
    with Program(tmp_path, **settings(database, scripted)) as bridge:
        bridge.start()
        scripted.wait_for_subscribe()
        publish(scripted, [1, 2, 3])
        scripted.wait_for_pubacks(3)
        publish(scripted, [1])
        scripted.wait_for_pubacks(4)

        bridge.kill()
        scripted.answer.session_present = True
        bridge.start()
        scripted.wait_for_connect(2)
        publish(scripted, [1], dup=True)  # sent into the connection that was cut, and never received

        assert scripted.wait_for_pubacks(5)[4:] == [1]
    assert stored(database) == 5


@pytest.mark.parametrize("ids_have_stepped_back", [False, True])
def test_a_broker_that_takes_the_lowest_free_packet_id_loses_no_identical_message_through_a_restart(
    tmp_path, scripted, database, ids_have_stepped_back
):
    scripted.answer_subscribe = True  # so that every PUBACK is proven before it leaves
    before = [1, 2, 3, 1] if ids_have_stepped_back else [1, 2, 3]
    with Program(tmp_path, **settings(database, scripted)) as bridge:
        bridge.start()
        scripted.wait_for_subscribe()
        for count, packet_id in enumerate(before, 1):
            publish(scripted, [packet_id])
            scripted.wait_for_pubacks(count)

        assert bridge.stop() == 0
        scripted.answer.session_present = True
        bridge.start()
        scripted.wait_for_connect(2)
        publish(scripted, [1, 2, 3], dup=True)  # came while the bridge was leaving, which did not take them in

        assert scripted.wait_for_pubacks(len(before) + 3)[-3:] == [1, 2, 3]
    assert stored(database) == len(before) + 3


def test_a_broker_without_dup_that_uses_a_free_packet_id_again_loses_no_identical_message(
    run_bridge, scripted, database
):
    run_bridge(MQTT_REDELIVERY="unmarked")
    publish(scripted, [1, 2, 3])
    scripted.wait_for_pubacks(3)

    publish(scripted, [1, 2, 3])

    assert scripted.wait_for_pubacks(6, timeout_s=3)[3:] == [1, 2, 3]
    assert stored(database) == 6


# -- brokers that lose the session


def test_a_lost_session_whose_ids_begin_again_loses_no_identical_message(run_bridge, scripted, database):
    run_bridge()
    publish(scripted, [1, 2, 3])
    scripted.wait_for_pubacks(3)

    reconnect(scripted, session_present=False)
    scripted.wait_for_subscribe(2)
    publish(scripted, [1, 2, 3])
    assert scripted.wait_for_pubacks(6)[3:] == [1, 2, 3]
    reconnect(scripted)
    publish(scripted, [1, 2, 3], dup=True)
    publish(scripted, [4])

    assert scripted.wait_for_pubacks(10)[6:] == [1, 2, 3, 4]
    assert stored(database) == 7


def test_a_session_that_is_lost_while_the_database_is_away_loses_no_identical_message(run_bridge, scripted, database):
    with TcpProxy("127.0.0.1", port_of(database)) as link:
        bridge = run_bridge(DATABASE_URL=through(database, link))
        publish(scripted, [1, 2, 3])
        scripted.wait_for_pubacks(3)
        link.refuse()
        link.cut()

        reconnect(scripted, session_present=False)
        scripted.wait_for_subscribe(2)
        publish(scripted, [1, 2, 3])
        wait_until(lambda: bridge.status()["messages"]["in_flight"] == 3, what="the messages of the new session")
        reconnect(scripted)
        publish(scripted, [1, 2, 3], dup=True)
        publish(scripted, [4])
        wait_until(lambda: bridge.status()["messages"]["received"] == 10, what="all deliveries")
        link.accept()

        assert scripted.wait_for_pubacks(7, timeout_s=40)[3:] == [1, 2, 3, 4]
    assert stored(database) == 7


def test_what_a_killed_bridge_had_received_of_a_new_session_is_not_taken_for_what_the_old_one_had_brought(
    tmp_path, scripted, database
):
    with Program(tmp_path, **settings(database, scripted)) as bridge:
        bridge.start()
        scripted.wait_for_subscribe()
        publish(scripted, [1, 2, 3])
        scripted.wait_for_pubacks(3)
        bridge.kill()
        bridge.settings["BRIDGE_BATCH_WAIT_MS"] = 60_000
        bridge.start()
        scripted.wait_for_subscribe(2)
        publish(scripted, [1, 2, 3])  # received, and never stored

        bridge.kill()
        bridge.settings["BRIDGE_BATCH_WAIT_MS"] = 5
        scripted.answer.session_present = True
        bridge.start()
        scripted.wait_for_connect(3)
        publish(scripted, [1, 2, 3], dup=True)

        assert scripted.wait_for_pubacks(6)[3:] == [1, 2, 3]
    assert stored(database) == 6
