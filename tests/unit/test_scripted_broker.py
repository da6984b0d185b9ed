"""The scripted broker against the real paho client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.scripted_broker import DISCONNECT, PINGREQ, PUBACK, Answer, ScriptedBroker
from tests.waiting import wait_until

MakeClient = Callable[..., mqtt.Client]


@pytest.fixture
def broker() -> Iterator[ScriptedBroker]:
    with ScriptedBroker() as scripted:
        yield scripted


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    clients: list[mqtt.Client] = []

    def make(**options: Any) -> mqtt.Client:
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="tester", **options)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.disconnect()
        client.loop_stop()


def _properties(**values: int) -> Properties:
    properties = Properties(PacketTypes.CONNECT)
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


def test_a_connect_is_recorded_with_what_it_asked_for(broker: ScriptedBroker, make_client: MakeClient) -> None:
    client = make_client(protocol=mqtt.MQTTv5)
    client.username_pw_set("user", "secret")

    client.connect(
        broker.host,
        broker.port,
        keepalive=17,
        clean_start=False,
        properties=_properties(SessionExpiryInterval=604_800, ReceiveMaximum=10_000),
    )
    client.loop_start()

    connect = broker.wait_for_connect()
    assert (connect.client_id, connect.protocol, connect.clean_start) == ("tester", 5, False)
    assert (connect.keepalive_s, connect.username, connect.password) == (17, "user", "secret")
    assert (connect.session_expiry_s, connect.receive_maximum) == (604_800, 10_000)


@pytest.mark.parametrize("protocol", [mqtt.MQTTv311, mqtt.MQTTv5])
def test_the_client_sees_the_session_that_the_test_chose(
    broker: ScriptedBroker, make_client: MakeClient, protocol: int
) -> None:
    seen: list[bool] = []
    broker.answer = Answer(session_present=True)
    client = make_client(protocol=protocol)
    client.on_connect = lambda _client, _userdata, flags, _reason, _properties: seen.append(flags.session_present)

    client.connect(broker.host, broker.port)
    client.loop_start()

    wait_until(lambda: seen, what="on_connect")
    assert seen == [True]


def test_a_refused_client_is_told_the_reason(broker: ScriptedBroker, make_client: MakeClient) -> None:
    seen: list[int] = []
    broker.answer = Answer(reason=0x86)
    client = make_client(protocol=mqtt.MQTTv5)
    client.on_connect = lambda _client, _userdata, _flags, reason, _properties: seen.append(reason.value)

    client.connect(broker.host, broker.port)
    client.loop_start()

    wait_until(lambda: seen, what="on_connect")
    assert seen[0] == 0x86


@pytest.mark.parametrize("protocol", [mqtt.MQTTv311, mqtt.MQTTv5])
def test_subscribe_and_unsubscribe_are_answered(broker: ScriptedBroker, make_client: MakeClient, protocol: int) -> None:
    answered: list[str] = []
    client = make_client(protocol=protocol)
    client.on_subscribe = lambda *_: answered.append("subscribe")
    client.on_unsubscribe = lambda *_: answered.append("unsubscribe")
    client.connect(broker.host, broker.port)
    client.loop_start()
    broker.wait_for_connect()

    client.subscribe([("a/+", 1), ("b/#", 0)])
    client.unsubscribe("nobody/uses/this")

    wait_until(lambda: len(answered) == 2, what="both answers")
    assert [name for name, _ in broker.wait_for_subscribe()] == ["a/+", "b/#"]
    assert broker.record.unsubscribes == [["nobody/uses/this"]]


@pytest.mark.parametrize("protocol", [mqtt.MQTTv311, mqtt.MQTTv5])
def test_publishes_arrive_as_scripted_and_their_pubacks_are_recorded_in_order(
    broker: ScriptedBroker, make_client: MakeClient, protocol: int
) -> None:
    messages: list[mqtt.MQTTMessage] = []
    client = make_client(protocol=protocol)
    client.on_message = lambda _client, _userdata, message: messages.append(message)
    client.connect(broker.host, broker.port)
    client.loop_start()
    broker.wait_for_connect()

    broker.publish(b"a", b"first", mid=65_535)
    broker.publish(b"a", b"second", mid=1, dup=True, retain=True)
    broker.publish(b"a", b"third", qos=0)
    broker.publish(b"a", b"x" * 20_000, mid=2)

    assert broker.wait_for_pubacks(3) == [65_535, 1, 2]
    assert [(message.mid, message.dup, message.retain, message.qos) for message in messages] == [
        (65_535, False, False, 1),
        (1, True, True, 1),
        (0, False, False, 0),
        (2, False, False, 1),
    ]


def test_a_topic_that_is_not_utf8_reaches_the_client(broker: ScriptedBroker, make_client: MakeClient) -> None:
    topics: list[bytes] = []
    client = make_client(protocol=mqtt.MQTTv5)
    client.on_message = lambda _client, _userdata, message: topics.append(message._topic)
    client.connect(broker.host, broker.port)
    client.loop_start()
    broker.wait_for_connect()

    broker.publish(b"a/\xff", b"", qos=0)

    wait_until(lambda: topics, what="the message")
    assert topics == [b"a/\xff"]


@pytest.mark.parametrize("reset", [False, True])
def test_a_dropped_client_connects_again(broker: ScriptedBroker, make_client: MakeClient, reset: bool) -> None:
    client = make_client(protocol=mqtt.MQTTv5)
    client.reconnect_delay_set(1, 1)
    client.connect(broker.host, broker.port)
    client.loop_start()
    broker.wait_for_connect()

    broker.drop(reset=reset)

    broker.wait_for_connect(2)
    assert broker.connected


def test_pings_are_answered_and_publishes_of_the_client_acknowledged(
    broker: ScriptedBroker, make_client: MakeClient
) -> None:
    client = make_client(protocol=mqtt.MQTTv5)
    client.connect(broker.host, broker.port, keepalive=1)
    client.loop_start()
    broker.wait_for_connect()

    for qos in (0, 1, 2):
        client.publish("up", b"data", qos=qos).wait_for_publish(5)
    wait_until(lambda: broker.record.packets.count(PINGREQ) >= 2, what="two pings")

    assert [(publication.topic, publication.qos) for publication in broker.record.publications] == [
        (b"up", 0),
        (b"up", 1),
        (b"up", 2),
    ]
    assert len(broker.record.connects) == 1
    assert PUBACK not in broker.record.packets


def test_a_disconnect_carries_its_reason_both_ways(broker: ScriptedBroker, make_client: MakeClient) -> None:
    reasons: list[int] = []
    client = make_client(protocol=mqtt.MQTTv5)
    client.on_disconnect = lambda _client, _userdata, _flags, reason, _properties: reasons.append(reason.value)
    client.connect(broker.host, broker.port)
    client.loop_start()
    broker.wait_for_connect()

    broker.disconnect(0x8E)

    wait_until(lambda: reasons, what="on_disconnect")
    assert reasons[0] == 0x8E
    broker.wait_for_connect(2)
    client.disconnect()
    wait_until(lambda: DISCONNECT in broker.record.packets, what="DISCONNECT")
    assert broker.record.disconnects == [0]
