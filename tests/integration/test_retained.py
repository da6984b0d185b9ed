"""Retained messages between a real Mosquitto and a real database, through restarts, lost sessions and new settings.

The bridge is the whole of it, in this process, with a shorter wait for late replays; where it has to be killed it is
a process of its own.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import paho.mqtt.client as mqtt
import paho.mqtt.publish
import psycopg2
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from mqtt_bridge import schema
from mqtt_bridge.bridge import Bridge
from mqtt_bridge.retained import Remembered, Retained
from mqtt_bridge.settings import load
from mqtt_bridge.tools.embedded import Broker, free_port
from tests.acceptance.traffic import query
from tests.program import Program
from tests.scripted_broker import UNSUBSCRIBE, ScriptedBroker
from tests.waiting import wait_until

CLIENT_ID = "keeper"
KEPT = ("1", "2", "3")
"""Devices with a retained message, where a test does not say otherwise."""

both_protocols = pytest.mark.parametrize("protocol", ["5", "3.1.1"])


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqtt_bridge.retained.QUIET_S", 0.3)


class House:
    """A broker, a database, and one bridge at a time between them."""

    def __init__(self, database: str, broker: Any) -> None:
        self.database = database
        self.broker = broker
        self.bridge: Bridge | None = None
        self._thread: threading.Thread | None = None
        self._lives = 0  # live messages published

    # -- the bridge

    def settings(self, *topics: str, **others: object) -> dict[str, str]:
        own: dict[str, object] = {
            "DATABASE_URL": self.database,
            "MQTT_HOST": self.broker.host,
            "MQTT_PORT": self.broker.port,
            "MQTT_CLIENT_ID": CLIENT_ID,
            "MQTT_TOPICS": ",".join(topics or ("a/{device}",)),
            "HTTP_PORT": 0,
            "BRIDGE_SHUTDOWN_S": 4,
        }
        return {name: str(value) for name, value in (own | others).items()}

    def start(self, *topics: str, **others: object) -> None:
        """Run a bridge for these topics."""
        self.bridge = Bridge(load(self.settings(*topics, **others), env_file=None))
        self._thread = threading.Thread(target=self.bridge.run, name="bridge")
        self._thread.start()

    def run(self, *topics: str, **others: object) -> None:
        """The same, and wait until it has subscribed."""
        self.start(*topics, **others)
        self.wait_until_subscribed()

    def wait_until_subscribed(self) -> None:
        wait_until(
            lambda: self.status["state"] == "running" and not self.status["reasons"], timeout_s=30, what="SUBACK"
        )

    def stop(self) -> None:
        if self.bridge is not None and self._thread is not None:
            self.bridge.request_stop()
            self._thread.join(30)
            assert not self._thread.is_alive()
            self.bridge = None

    def restart(self, *topics: str, **others: object) -> None:
        self.stop()
        self.run(*topics, **others)

    @property
    def status(self) -> dict:
        assert self.bridge is not None
        return self.bridge.status()

    @property
    def messages(self) -> dict[str, int]:
        messages = self.status["messages"]
        assert messages["received"] == sum(count for name, count in messages.items() if name != "received")
        return messages

    @property
    def retained(self) -> Retained:
        assert self.bridge is not None
        return self.bridge._retained

    # -- the database

    def make_tables(self) -> None:
        with closing(psycopg2.connect(self.database)) as connection:
            connection.autocommit = True
            schema.ensure(connection, create=True)

    @contextlib.contextmanager
    def locked_readings(self) -> Iterator[None]:
        """While nothing can be stored."""
        with closing(psycopg2.connect(self.database)) as connection, connection.cursor() as cursor:
            cursor.execute("LOCK TABLE readings IN SHARE MODE")
            yield

    # -- devices

    def keep(self, *devices: str, topic: str = "a", qos: int = 1) -> None:
        """Each of these publishes a retained message."""
        self.publish([(f"{topic}/{device}", b"7", qos, True) for device in devices or KEPT])

    def publish(self, messages: list[tuple[str, bytes, int, bool]]) -> None:
        paho.mqtt.publish.multiple(messages, hostname=self.broker.host, port=self.broker.port)

    def go_through(self, topic: str = "a") -> None:
        """Publish a live message and wait until it is stored: what the broker had queued before it has come as well."""
        self._lives += 1
        self.publish([(f"{topic}/live", b"%d" % self._lives, 1, False)])
        there = "SELECT count(*) FROM readings WHERE device = 'live' AND value = %s"
        wait_until(lambda: query(self.database, there, self._lives) == [(1,)], timeout_s=30, what="the live message")

    # -- what became of it

    @property
    def stored(self) -> dict[str, int]:
        """How often the retained message of each device was stored."""
        return dict(
            query(self.database, "SELECT device, count(*) FROM readings WHERE device <> 'live' GROUP BY device")
        )

    @property
    def remembered(self) -> Remembered:
        rows = query(self.database, "SELECT retained_seen FROM mqtt_bridge.owners WHERE client_id = %s", CLIENT_ID)
        return Remembered.parse(rows[0][0] if rows else None)

    def wait_until_known(self, *filters: str) -> None:
        """Until the retained messages of exactly these filters count as stored."""
        expected = set(filters or ("a/+",))
        wait_until(lambda: self.remembered.stored == expected, timeout_s=30, what=f"{expected} to be known as stored")


MakeHouse = Callable[..., House]


@pytest.fixture
def house_of() -> Iterator[MakeHouse]:
    with contextlib.ExitStack() as stack:

        def make(*args, **kwargs) -> House:
            house = House(*args, **kwargs)
            stack.callback(house.stop)
            return house

        yield make


@pytest.fixture
def house(house_of, database, own_broker) -> House:
    return house_of(database, own_broker())


def once_each(*devices: str) -> dict[str, int]:
    return dict.fromkeys(devices or KEPT, 1)


def end_session(broker: Broker, client_id: str = CLIENT_ID) -> None:
    """Whoever connects with the id and wants nothing of its session ends it."""
    client = mqtt.Client(
        CallbackAPIVersion.VERSION2, client_id, clean_session=True, protocol=MQTTProtocolVersion.MQTTv311
    )
    client.connect(broker.host, broker.port)
    wait_until(lambda: client.loop(0.1) or client.is_connected(), what="the intruder to connect")
    client.disconnect()
    while client.loop(0.1) == mqtt.MQTT_ERR_SUCCESS and client.socket() is not None:
        pass


# -- once


@both_protocols
@pytest.mark.parametrize("qos", [0, 1])
def test_retained_messages_are_stored_once_over_restarts_of_the_bridge(house, protocol, qos):
    house.keep(qos=qos)
    house.run(MQTT_PROTOCOL=protocol)
    house.wait_until_known()

    for _ in range(2):
        house.restart(MQTT_PROTOCOL=protocol)
        house.go_through()

        # Over MQTT 3.1.1 they come with every SUBSCRIBE.
        assert house.messages["ignored"] == (0 if protocol == "5" else len(KEPT))
    assert house.stored == once_each()


@both_protocols
def test_retained_messages_are_stored_once_over_lost_sessions(house, protocol):
    house.keep()
    house.run(MQTT_PROTOCOL=protocol)
    house.wait_until_known()

    end_session(house.broker)  # while the bridge runs
    wait_until(lambda: house.status["broker"]["reconnects"] == 1, timeout_s=30, what="it to reconnect")
    house.wait_until_subscribed()
    house.go_through()
    assert not house.status["broker"]["session_present"]
    house.stop()
    end_session(house.broker)
    house.run(MQTT_PROTOCOL=protocol)
    house.go_through()
    assert not house.status["broker"]["session_present"]

    assert house.stored == once_each()
    assert house.messages["ignored"] == (0 if protocol == "5" else len(KEPT))


@both_protocols
def test_retained_messages_are_stored_once_over_a_restart_of_the_broker(house, protocol):
    house.keep()
    house.run(MQTT_PROTOCOL=protocol)
    house.wait_until_known()

    house.broker.restart()
    wait_until(lambda: house.status["broker"]["reconnects"] == 1, timeout_s=30, what="it to reconnect")
    house.wait_until_subscribed()
    house.go_through()

    assert house.stored == once_each()


@both_protocols
def test_a_retained_message_that_is_published_live_is_stored_and_its_replay_is_not(house, protocol):
    house.run(MQTT_PROTOCOL=protocol)
    house.wait_until_known()  # that there were none

    house.keep()
    wait_until(lambda: house.stored == once_each(), what="the live messages")
    house.restart(MQTT_PROTOCOL=protocol)
    house.go_through()

    assert house.stored == once_each()


@both_protocols
def test_a_filter_that_is_new_brings_its_retained_messages_and_only_those(house, protocol):
    house.keep("1", "2")
    house.keep("3", topic="b")
    house.run(MQTT_PROTOCOL=protocol)
    house.wait_until_known()

    house.restart("a/{device}", "b/{device}", MQTT_PROTOCOL=protocol)
    house.wait_until_known("a/+", "b/+")
    house.go_through()

    assert house.stored == once_each("1", "2", "3")


@both_protocols
def test_a_filter_that_was_removed_and_comes_back_brings_its_retained_messages_again(house, protocol):
    house.keep("1")
    house.keep("2", topic="b")
    house.run("a/{device}", "b/{device}", MQTT_PROTOCOL=protocol)
    house.wait_until_known("a/+", "b/+")

    house.restart(MQTT_PROTOCOL=protocol)
    house.wait_until_known("a/+")
    house.restart("a/{device}", "b/{device}", MQTT_PROTOCOL=protocol)
    house.wait_until_known("a/+", "b/+")

    assert house.stored == {"1": 1, "2": 2}


@both_protocols
def test_retained_messages_that_wait_for_the_database_are_not_over(house, protocol):
    house.make_tables()
    house.keep()

    with house.locked_readings():
        house.run(MQTT_PROTOCOL=protocol)
        wait_until(lambda: house.messages["in_flight"] == len(KEPT), what="the retained messages")
        wait_until(lambda: house.retained._most_held == len(KEPT), what="a barrier to be answered")
        assert house.retained.remembering() == Remembered()

    house.wait_until_known()
    assert house.stored == once_each()


@both_protocols
def test_retained_messages_of_qos_0_that_wait_for_the_database_do_not_count_as_stored(house, protocol):
    house.make_tables()
    house.keep(qos=0)

    with house.locked_readings():
        house.run(MQTT_PROTOCOL=protocol)
        wait_until(lambda: house.messages["in_flight"] == len(KEPT), what="the retained messages")
        wait_until(lambda: house.retained.remembering().stored, what="their end")
        house.bridge._tender.note_retained()
        assert house.remembered == Remembered()

    house.wait_until_known()
    assert house.stored == once_each()


def test_a_shared_subscription_brings_no_retained_messages_and_a_plain_one_does_later(house):
    # Mosquitto 2.0 would send them, to every member of the group.
    house.keep()
    house.run(MQTT_SHARED_GROUP="group")
    house.go_through()
    assert house.messages["received"] == 1
    assert house.remembered == Remembered()

    house.restart()
    house.wait_until_known()

    assert house.stored == once_each()


# -- the other policies, and from one to another


@both_protocols
def test_never_stores_none_and_once_stores_them_later(house, protocol):
    house.keep()
    house.run(MQTT_PROTOCOL=protocol, MQTT_RETAINED="never")
    house.go_through()
    assert house.remembered == Remembered(withheld=frozenset({"a/+"}))
    assert house.stored == {}
    assert house.messages["ignored"] == (0 if protocol == "5" else len(KEPT))

    house.restart(MQTT_PROTOCOL=protocol)
    house.wait_until_known()

    assert house.stored == once_each()


@both_protocols
def test_what_was_stored_once_is_not_stored_again_after_a_while_of_never(house, protocol):
    house.keep()
    house.run(MQTT_PROTOCOL=protocol)
    house.wait_until_known()

    house.restart(MQTT_PROTOCOL=protocol, MQTT_RETAINED="never")
    house.go_through()
    house.stop()
    end_session(house.broker)
    house.run(MQTT_PROTOCOL=protocol)
    house.go_through()

    assert house.stored == once_each()


@both_protocols
def test_always_stores_them_at_each_start_and_once_not_again(house, protocol):
    house.keep()
    house.run(MQTT_PROTOCOL=protocol, MQTT_RETAINED="always")
    house.wait_until_known()
    house.restart(MQTT_PROTOCOL=protocol, MQTT_RETAINED="always")
    house.go_through()
    assert house.stored == dict.fromkeys(KEPT, 2)

    house.restart(MQTT_PROTOCOL=protocol)
    house.go_through()

    assert house.stored == dict.fromkeys(KEPT, 2)


# -- kill -9


@both_protocols
def test_kill_9_while_retained_messages_are_queued_loses_none(
    house_of, database, own_broker, tmp_path, monkeypatch, protocol
):
    monkeypatch.setattr("tests.program.command_line", with_a_short_wait)
    house = house_of(database, own_broker(config_lines=["max_inflight_messages 20"]))
    house.make_tables()
    devices = [str(number) for number in range(500)]
    house.keep(*devices)
    settings = house.settings(MQTT_PROTOCOL=protocol, MQTT_RECEIVE_MAXIMUM=20, HTTP_PORT=free_port())

    with Program(tmp_path, **settings) as bridge:
        with house.locked_readings():
            bridge.start().wait_until_ready()
            wait_until(lambda: bridge.messages()["received"] >= 20, what="the first of them")
            began_s = bridge.status()["uptime_s"]
            wait_until(lambda: bridge.status()["uptime_s"] > began_s + 3, what="time enough for a wrong conclusion")
            assert house.stored == {}
            bridge.kill()

        bridge.start().wait_until_ready()
        house.wait_until_known()
        stored = house.stored
        assert stored.keys() == set(devices)
        if protocol == "5":
            assert stored == once_each(*devices)

        bridge.kill()
        bridge.start().wait_until_ready()
        house.go_through()
        assert house.stored == stored


def with_a_short_wait(*arguments: str) -> list[str]:
    """The command line of a bridge that waits for late replays as short as those in this process do."""
    code = "import mqtt_bridge.retained as r; r.QUIET_S = 0.3; from mqtt_bridge.cli import main; main()"
    return [sys.executable, "-W", "always", "-c", code, *arguments]


# -- brokers that say what they are told to say


@pytest.fixture
def scripted_house(house_of, database) -> Iterator[House]:
    with ScriptedBroker() as broker:
        house = house_of(database, broker)
        yield house
        house.stop()


@both_protocols
def test_a_filter_that_was_refused_does_not_count_as_stored(scripted_house, protocol):
    house, broker = scripted_house, scripted_house.broker
    broker.answer_subscribe = False
    house.start("a/{device}", "b/{device}", MQTT_PROTOCOL=protocol)
    broker.wait_for_subscribe()
    broker.answer_subscribe = True

    suback = b"\x00\x01" + (b"\x00" if protocol == "5" else b"") + b"\x01\x80"
    broker.send_raw(bytes([0x90, len(suback)]) + suback)

    house.wait_until_known("a/+")


def test_over_mqtt_5_each_filter_is_asked_for_as_it_needs(scripted_house):
    house = scripted_house
    house.make_tables()
    known = Remembered(frozenset({"a/+"}), frozenset({"b/+"}))
    query(house.database, "INSERT INTO mqtt_bridge.owners VALUES (%s, 1, 1, NULL, %s)", CLIENT_ID, str(known))

    house.start("a/{device}", "b/{device}", "c/{device}")

    assert house.broker.wait_for_subscribe() == [("a/+", 1 | 2 << 4), ("b/+", 1 | 0 << 4), ("c/+", 1 | 1 << 4)]


@both_protocols
def test_what_is_left_to_the_broker_at_a_stop_is_not_over(scripted_house, protocol):
    house, broker = scripted_house, scripted_house.broker
    house.run(MQTT_PROTOCOL=protocol)
    with house.locked_readings():
        broker.publish(b"a/live", b"1", mid=1)
        wait_until(lambda: house.retained._most_held == 1, what="a barrier to be answered")
        house.bridge.request_stop()
        assert house.bridge._subscriber._closed_in.wait(10)
        broker.publish(b"a/1", b"7", mid=2, retain=True)  # neither taken in nor acknowledged
    house.stop()

    assert broker.record.pubacks == [1]
    assert house.remembered == Remembered()


@both_protocols
def test_an_idle_bridge_asks_once_whether_retained_messages_are_over(scripted_house, protocol):
    house = scripted_house

    house.run(MQTT_PROTOCOL=protocol)
    house.wait_until_known()

    assert house.broker.record.packets.count(UNSUBSCRIBE) == 1
