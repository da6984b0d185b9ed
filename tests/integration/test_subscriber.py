"""The subscriber, with the pipeline behind it, against a scripted broker and against Mosquitto.

The database is played by `GatedStore`, which commits a message when the test says so.
"""

from __future__ import annotations

import gc
import os
import secrets
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.publish
import pytest
import trustme
from pydantic import SecretStr

from mqtt_bridge.account import Balance
from mqtt_bridge.acks import AckTracker, SendAcks
from mqtt_bridge.batches import Batches
from mqtt_bridge.broker_connection import BARRIER, BrokerConnection
from mqtt_bridge.ledger import Ledger
from mqtt_bridge.pipeline import Limits, Pipeline
from mqtt_bridge.routes import Router, default_routes
from mqtt_bridge.settings import Settings
from mqtt_bridge.sink import Stopped
from mqtt_bridge.subscriber import CONTESTED_CUTS, Subscriber
from mqtt_bridge.tools.embedded import Broker, free_port
from mqtt_bridge.transactions import Batch, Stored
from tests.proxy import TcpProxy
from tests.scripted_broker import CONNECT, DISCONNECT, PINGREQ, PUBACK, SUBSCRIBE, UNSUBSCRIBE, Answer, ScriptedBroker
from tests.waiting import wait_until
from tests.websocket_relay import WebsocketRelay


class GatedStore:
    """Commits at once, or, between `shut` and `open`, only what is `release`d."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        """What was committed, in this order."""
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._open = True
        self._stopped = False
        self._released: set[bytes] = set()

    def store(self, batch: Batch) -> Stored:
        """What the pipeline calls: returns when the batch is 'durable'."""
        payloads = [message.payload for message, _ in batch.translated]
        payloads += [letter.message.payload for letter in batch.dead_letters]
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._open or self._released.issuperset(payloads))
            if self._stopped:
                raise Stopped("stopped")
            self.payloads += payloads
        return Stored({"readings": len(batch.translated)})

    def shut(self) -> None:
        """From now on nothing is committed that is not released."""
        with self._changed:
            self._open = False

    def release(self, *payloads: bytes) -> None:
        """Let the batches go that hold nothing but these."""
        with self._changed:
            self._released.update(payloads)
            self._changed.notify_all()

    def open(self) -> None:
        """Commit everything."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Give up what is held."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class _Pipeline(Pipeline):
    """The pipeline with a database that knows at once that a session was lost: SUBSCRIBE waits for that."""

    def connected(self, *, session_present: bool, send_acks: SendAcks) -> None:
        super().connected(session_present=session_present, send_acks=send_acks)
        if (session_epoch := self.session_to_raise) is not None:
            self.session_raised(session_epoch)


@dataclass
class Rig:
    """A subscriber and what is behind it."""

    subscriber: Subscriber
    pipeline: Pipeline
    store: GatedStore
    acks: AckTracker

    @property
    def balance(self) -> Balance:
        return self.pipeline.balance()

    def wait_until_subscribed(self) -> None:
        wait_until(lambda: self.subscriber.state.subscribed, timeout_s=20, what=f"SUBACK; {self.subscriber.state}")

    def wait_for_problem(self) -> str:
        """The trouble that it names once it has tried."""
        ignored = (None, "not connected yet")
        wait_until(lambda: self.subscriber.state.problem not in ignored, timeout_s=20, what="the problem")
        return self.subscriber.state.problem or ""


StartRig = Callable[..., Rig]


@pytest.fixture(params=["fast", "stock"])
def receive(request: pytest.FixtureRequest) -> str:
    """MQTT_RECEIVE: what holds of the one client has to hold of the other."""
    return str(request.param)


@pytest.fixture
def start_rig(receive: str) -> Iterator[StartRig]:
    """Starts a subscriber with these settings; it is stopped after the test."""
    rigs: list[Rig] = []

    def start(port: int, *, batch_size: int = 2000, workers: int = 2, **changes: Any) -> Rig:
        changes.setdefault("mqtt_client_id", f"rig-{secrets.token_hex(4)}")
        settings = Settings(mqtt_host="127.0.0.1", mqtt_port=port, mqtt_receive=receive, **changes)
        router, store, acks = Router(default_routes(",".join(settings.mqtt_topics))), GatedStore(), AckTracker()
        pipeline = _Pipeline(
            Batches(router),
            store,
            ledger=Ledger(redelivery=settings.mqtt_redelivery),
            acks=acks,
            limits=Limits(workers=workers, batch_size=batch_size, queue_size=settings.bridge_queue_size),
            on_fatal=lambda error: None,
        )
        subscriber = Subscriber(settings, filters=router.filters, inbox=pipeline, acks=acks)
        rigs.append(Rig(subscriber, pipeline, store, acks))
        pipeline.start()
        subscriber.start()
        return rigs[-1]

    yield start
    for rig in rigs:
        rig.store.stop()
        rig.subscriber.stop()
        assert rig.pipeline.stop()
        assert not rig.subscriber.alive


@pytest.fixture
def scripted() -> Iterator[ScriptedBroker]:
    with ScriptedBroker() as broker:
        yield broker


@pytest.fixture
def site() -> str:
    """A first topic level of this test's own."""
    return f"site-{secrets.token_hex(4)}"


TOPIC = b"devices/d1/telemetry"


# --- What it says when it connects ---


def test_a_session_that_lasts_is_asked_for_over_mqtt_5(scripted, start_rig):
    start_rig(scripted.port, mqtt_client_id="my-bridge")

    connect = scripted.wait_for_connect()

    assert (connect.client_id, connect.protocol, connect.clean_start) == ("my-bridge", 5, False)
    assert (connect.session_expiry_s, connect.receive_maximum, connect.keepalive_s) == (604_800, 10_000, 30)
    assert (connect.username, connect.password) == (None, None)


def test_the_limits_of_the_settings_are_sent(scripted, start_rig):
    start_rig(scripted.port, mqtt_session_expiry_s=60, mqtt_receive_maximum=77, mqtt_keepalive_s=7)

    connect = scripted.wait_for_connect()

    assert (connect.session_expiry_s, connect.receive_maximum, connect.keepalive_s) == (60, 77, 7)


def test_a_session_that_lasts_is_asked_for_over_mqtt_3_1_1(scripted, start_rig):
    start_rig(scripted.port, mqtt_protocol="3.1.1", mqtt_client_id="my-bridge")

    connect = scripted.wait_for_connect()

    assert (connect.client_id, connect.protocol, connect.clean_start) == ("my-bridge", 4, False)


def test_user_and_password_are_sent(scripted, start_rig):
    start_rig(scripted.port, mqtt_username="me", mqtt_password=SecretStr("pässword"))

    connect = scripted.wait_for_connect()

    assert (connect.username, connect.password) == ("me", "pässword")


@pytest.mark.parametrize(("retained", "handling"), [("always", 0), ("once", 1), ("never", 2)])
def test_the_filters_of_mqtt_topics_are_subscribed_at_qos_1(scripted, start_rig, retained, handling):
    topics = ("a/{device}/b", "a/+/b", "c/{device}/#", "c/d/e", "exact")

    start_rig(scripted.port, mqtt_topics=topics, mqtt_retained=retained)

    options = 1 | handling << 4
    assert scripted.wait_for_subscribe() == [("a/+/b", options), ("c/+/#", options), ("exact", options)]


def test_a_shared_subscription_names_its_group(scripted, start_rig):
    start_rig(scripted.port, mqtt_shared_group="bridges")

    [(topic_filter, _)] = scripted.wait_for_subscribe()

    assert topic_filter == "$share/bridges/devices/+/telemetry"


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_resumed_session_is_subscribed_again_over_mqtt_5_only(scripted, start_rig, protocol):
    rig = start_rig(scripted.port, mqtt_protocol=protocol)
    rig.wait_until_subscribed()

    scripted.answer = Answer(session_present=True)
    scripted.drop()
    scripted.wait_for_connect(2)
    rig.wait_until_subscribed()
    scripted.publish(TOPIC, b"1", mid=1)
    wait_until(lambda: scripted.record.unsubscribes, what="the barrier, which comes after a SUBSCRIBE")

    # Over 3.1.1 each SUBSCRIBE would bring the retained messages again.
    assert scripted.record.packets.count(SUBSCRIBE) == (2 if protocol == "5" else 1)


# --- What the broker may say ---


REFUSALS = {
    ("5", 0x84): "MQTT_PROTOCOL",
    ("5", 0x85): "MQTT_CLIENT_ID",
    ("5", 0x86): "MQTT_USERNAME and MQTT_PASSWORD",
    ("5", 0x87): "MQTT_CLIENT_ID",
    ("5", 0x8A): "banned",
    ("5", 0x97): "limit",
    ("3.1.1", 1): "MQTT_PROTOCOL",
    ("3.1.1", 2): "MQTT_CLIENT_ID",
    ("3.1.1", 4): "MQTT_USERNAME and MQTT_PASSWORD",
    ("3.1.1", 5): "MQTT_USERNAME and MQTT_PASSWORD",
}


@pytest.mark.parametrize(("protocol", "reason"), REFUSALS)
def test_a_refusal_is_kept_as_the_problem_and_tried_again(scripted, start_rig, protocol, reason):
    scripted.answer = Answer(reason=reason)
    rig = start_rig(scripted.port, mqtt_protocol=protocol)

    assert REFUSALS[protocol, reason] in rig.wait_for_problem()
    assert not rig.subscriber.state.connected
    scripted.answer = Answer()
    rig.wait_until_subscribed()

    assert rig.subscriber.state.problem is None
    assert {connect.protocol for connect in scripted.record.connects} == {5 if protocol == "5" else 4}


@pytest.mark.parametrize(("protocol", "reason"), [("5", 0x87), ("5", 0x8F), ("3.1.1", 0x80)])
def test_a_refused_subscription_names_the_topic_and_stays_connected(scripted, start_rig, protocol, reason):
    scripted.subscribe_reason = reason

    rig = start_rig(scripted.port, mqtt_protocol=protocol, mqtt_topics=("secret/{device}",))

    assert "refused to subscribe to secret/+" in rig.wait_for_problem()
    assert rig.subscriber.state.connected
    assert not rig.subscriber.state.subscribed


def test_a_broker_that_takes_over_the_session_is_quoted(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()

    scripted.answer = Answer(reason=0x88)
    scripted.disconnect(0x8E)

    assert "taken over" in rig.wait_for_problem().lower()


def test_a_broker_that_accepts_the_connection_and_then_is_silent_is_left_after_the_keepalive(scripted, start_rig):
    rig = start_rig(scripted.port, mqtt_keepalive_s=5)
    rig.wait_until_subscribed()

    scripted.silent = True
    wait_until(lambda: not rig.subscriber.state.connected, timeout_s=30, what="it to notice")
    scripted.silent = False

    wait_until(lambda: len(scripted.record.connects) >= 2, timeout_s=30, what="it to reconnect")
    assert PINGREQ in scripted.record.packets


# --- Acknowledgements ---


def test_a_puback_waits_for_the_commit(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()
    rig.store.shut()

    scripted.publish(TOPIC, b"1", mid=7)
    wait_until(lambda: rig.balance.in_flight == 1, what="the message")
    scripted.publish(b"elsewhere", b"", mid=0, qos=0)
    wait_until(lambda: rig.balance.received == 2, what="the one after it")
    assert scripted.record.pubacks == []
    rig.store.open()

    assert scripted.wait_for_pubacks(1) == [7]
    assert b"1" in rig.store.payloads


def test_pubacks_leave_in_receive_order_however_the_commits_come(scripted, start_rig):
    rig = start_rig(scripted.port, batch_size=1, workers=4)
    rig.wait_until_subscribed()
    rig.store.shut()

    for mid, payload in ((10, b"10"), (11, b"11"), (12, b"12"), (13, b"13")):
        scripted.publish(TOPIC, payload, mid=mid)
    wait_until(lambda: rig.balance.in_flight == 4, what="all four")
    rig.store.release(b"13")
    rig.store.release(b"11")
    wait_until(lambda: rig.balance.outcomes["stored"] == 2, what="the later ones to be committed")
    assert scripted.record.pubacks == []
    rig.store.release(b"10")
    assert scripted.wait_for_pubacks(2) == [10, 11]
    rig.store.release(b"12")

    assert scripted.wait_for_pubacks(4) == [10, 11, 12, 13]


def test_ignored_messages_are_acknowledged_in_their_turn(scripted, start_rig):
    rig = start_rig(scripted.port, batch_size=1, workers=4)
    rig.wait_until_subscribed()
    rig.store.shut()

    scripted.publish(TOPIC, b"1", mid=1)
    scripted.publish(TOPIC, b"{}", mid=2)
    wait_until(lambda: rig.balance.outcomes["ignored"] == 1, what="the empty one to be ignored")
    assert scripted.record.pubacks == []
    rig.store.open()

    assert scripted.wait_for_pubacks(2) == [1, 2]


def test_a_barrier_proves_the_acknowledgements(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()

    scripted.publish(TOPIC, b"1", mid=1)
    scripted.wait_for_pubacks(1)
    wait_until(lambda: scripted.record.unsubscribes, what="the barrier")
    wait_until(lambda: rig.acks.unproven == 0, what="the proof")

    assert scripted.record.unsubscribes == [[BARRIER]]
    assert scripted.record.packets.index(PUBACK) < scripted.record.packets.index(UNSUBSCRIBE)


def test_it_disconnects_only_when_every_acknowledgement_is_proven(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()
    scripted.answer_subscribe = False

    scripted.publish(TOPIC, b"1", mid=1)
    scripted.wait_for_pubacks(1)
    assert not rig.subscriber.leave(0.5)
    assert DISCONNECT not in scripted.record.packets
    # UNSUBACK of the packet id that the barrier had: the one after SUBSCRIBE's.
    scripted.send_raw(b"\xb0\x04" + struct.pack("!H", 2) + b"\x00\x11")
    wait_until(lambda: DISCONNECT in scripted.record.packets, what="DISCONNECT")

    assert scripted.record.disconnects == [0]


def test_a_subscriber_that_leaves_takes_nothing_in(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()
    scripted.publish(TOPIC, b"1", mid=1)
    scripted.wait_for_pubacks(1)
    scripted.answer_subscribe = False

    rig.subscriber.leave(0.1)
    wait_until(lambda: not rig.subscriber._connection._takes_in, what="it to leave")
    scripted.publish(TOPIC, b"2", mid=2)
    rig.subscriber.stop()

    assert (rig.store.payloads, rig.balance.received) == ([b"1"], 1)
    assert scripted.record.pubacks == [1]


# --- Redeliveries ---


def test_what_was_pending_at_a_cut_is_acknowledged_on_the_next_connection_and_stored_once(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()
    rig.store.shut()
    scripted.publish(TOPIC, b"1", mid=1)
    scripted.publish(TOPIC, b"2", mid=2)
    wait_until(lambda: rig.balance.in_flight == 2, what="both messages")

    scripted.answer = Answer(session_present=True)
    scripted.drop(reset=True)
    scripted.wait_for_connect(2)
    scripted.publish(TOPIC, b"1", mid=1, dup=True)
    scripted.publish(TOPIC, b"2", mid=2, dup=True)
    scripted.publish(TOPIC, b"3", mid=3)
    wait_until(lambda: rig.balance.received == 5, what="the redelivery")
    assert scripted.record.pubacks == []
    rig.store.open()

    assert scripted.wait_for_pubacks(3) == [1, 2, 3]
    assert sorted(rig.store.payloads) == [b"1", b"2", b"3"]
    assert rig.balance.outcomes["duplicate"] == 2


def test_a_new_connection_on_purpose_brings_what_is_unacknowledged_and_is_no_trouble(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()
    rig.store.shut()
    scripted.publish(TOPIC, b"1", mid=1)
    wait_until(lambda: rig.balance.in_flight == 1, what="the message")

    scripted.answer = Answer(session_present=True)
    rig.subscriber.reconnect()
    scripted.wait_for_connect(2)
    scripted.publish(TOPIC, b"1", mid=1, dup=True)
    wait_until(lambda: rig.balance.received == 2, what="the redelivery")
    rig.store.open()

    assert scripted.wait_for_pubacks(1) == [1]
    assert rig.store.payloads == [b"1"]
    assert rig.subscriber.state.problem is None
    assert len(scripted.record.connects) == 2


def test_the_network_thread_is_seen_to_turn_while_nothing_arrives(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()

    for _ in range(3):
        before = rig.subscriber.turns
        wait_until(lambda before=before: rig.subscriber.turns > before, what="another turn")

    assert not rig.subscriber.connecting


def test_the_network_thread_is_seen_to_connect_until_that_has_an_end(start_rig, monkeypatch):
    hanging, go_on = threading.Event(), threading.Event()

    def hang(connection: BrokerConnection) -> None:
        hanging.set()
        go_on.wait(10)
        raise OSError("no broker")

    monkeypatch.setattr(BrokerConnection, "open", hang)
    rig = start_rig(1)
    assert hanging.wait(10)

    assert rig.subscriber.connecting
    go_on.set()
    wait_until(lambda: not rig.subscriber.connecting, what="the try to end")


def test_what_was_committed_before_a_cut_is_acknowledged_again_and_not_stored(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()
    scripted.answer_subscribe = False  # no proof
    scripted.publish(TOPIC, b"1", mid=1)
    scripted.wait_for_pubacks(1)

    scripted.answer, scripted.answer_subscribe = Answer(session_present=True), True
    scripted.drop(reset=True)
    scripted.wait_for_connect(2)
    scripted.publish(TOPIC, b"1", mid=1, dup=True)

    assert scripted.wait_for_pubacks(2) == [1, 1]
    assert rig.store.payloads == [b"1"]
    assert rig.balance.outcomes["duplicate"] == 1


def test_a_lost_session_begins_anew_and_the_same_packet_ids_are_new_messages(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()
    scripted.answer_subscribe = False
    scripted.publish(TOPIC, b"1", mid=1)
    scripted.wait_for_pubacks(1)

    scripted.answer_subscribe = True
    scripted.drop(reset=True)
    scripted.wait_for_connect(2)
    scripted.publish(TOPIC, b"1", mid=1, dup=True)

    assert scripted.wait_for_pubacks(2) == [1, 1]
    assert rig.store.payloads == [b"1", b"1"]


def test_what_was_pending_in_a_lost_session_is_stored_and_acknowledged_to_nobody(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()
    rig.store.shut()
    scripted.publish(TOPIC, b"old", mid=1)
    wait_until(lambda: rig.balance.in_flight == 1, what="the message")

    scripted.drop(reset=True)
    scripted.wait_for_connect(2)
    scripted.publish(TOPIC, b"new", mid=1)
    wait_until(lambda: rig.balance.in_flight == 2, what="the message of the new session")
    rig.store.release(b"old")
    wait_until(lambda: rig.store.payloads == [b"old"], what="the old one to be committed")
    scripted.publish(TOPIC, b"{}", mid=0, qos=0)
    wait_until(lambda: rig.balance.received == 3, what="another message")
    assert scripted.record.pubacks == []
    rig.store.open()

    assert scripted.wait_for_pubacks(1) == [1]
    assert rig.store.payloads[:2] == [b"old", b"new"]


def test_a_message_that_is_sent_again_on_the_same_connection_is_acknowledged_once(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()
    rig.store.shut()

    scripted.publish(TOPIC, b"1", mid=1)
    scripted.publish(TOPIC, b"1", mid=1, dup=True)
    scripted.publish(TOPIC, b"2", mid=2)
    wait_until(lambda: rig.balance.received == 3, what="all three")
    rig.store.open()

    assert scripted.wait_for_pubacks(2) == [1, 2]
    assert rig.store.payloads == [b"1", b"2"]
    assert rig.balance.outcomes["duplicate"] == 1


def test_equal_payloads_under_ids_of_their_own_are_messages_of_their_own(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()

    for mid in range(1, 101):
        scripted.publish(TOPIC, b"1", mid=mid)

    assert scripted.wait_for_pubacks(100) == list(range(1, 101))
    assert rig.store.payloads == [b"1"] * 100


def test_packet_ids_may_wrap(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()
    ids = [*range(65_500, 65_536), *range(1, 50)]

    for mid in ids:
        scripted.publish(TOPIC, b"1", mid=mid)

    assert scripted.wait_for_pubacks(len(ids)) == ids
    assert rig.balance.outcomes["stored"] == len(ids)


# --- Whatever the broker sends ---


def _packet(head: int, body: bytes) -> bytes:
    return bytes([head, len(body)]) + body


GARBAGE = {
    "zeros": bytes(100),
    "ones": b"\xff" * 1000,
    "http": b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n\r\n",
    "postgres": b"E\x00\x00\x00\x8bSFATAL\x00",
    "length without end": b"\x30\xff\xff\xff\xff\xff\xff",
    "publish without body": b"\x32\x00",
    "publish whose topic is longer than it": _packet(0x32, b"\x00\xffabc"),
    "publish with qos 3": _packet(0x36, b"\x00\x01a\x00\x01\x00x"),
    "publish without topic": _packet(0x32, b"\x00\x00\x00\x01\x00x"),
    "publish without packet id": _packet(0x32, b"\x00\x01a"),
    "publish with packet id 0": _packet(0x32, b"\x00\x01a\x00\x00\x00x"),
    "publish with properties that end too late": _packet(0x32, b"\x00\x01a\x00\x01\x7fx"),
    "publish with an unknown property": _packet(0x32, b"\x00\x01a\x00\x01\x02\x7e\x01x"),
    "publish with an unknown topic alias": _packet(0x32, b"\x00\x00\x00\x01\x03\x23\x00\x05x"),
    "publish with qos 2": _packet(0x34, b"\x00\x01a\x00\x01\x00x"),
    "connack again": b"\x20\x03\x00\x00\x00",
    "connack that refuses": b"\x20\x03\x00\x87\x00",
    "connack too short": b"\x20\x01\x00",
    "suback of nothing": _packet(0x90, b"\x00\x63\x00\x00"),
    "suback without reasons": _packet(0x90, b"\x00\x01\x00"),
    "suback too short": b"\x90\x01\x00",
    "suback with an unknown reason": _packet(0x90, b"\x00\x01\x00\x7b"),
    "unsuback of nothing": _packet(0xB0, b"\x00\x63\x00\x11"),
    "unsuback too short": b"\xb0\x00",
    "puback of nothing": _packet(0x40, b"\x00\x63"),
    "pubrec of nothing": _packet(0x50, b"\x00\x63"),
    "pubrel of nothing": _packet(0x62, b"\x00\x63"),
    "pubcomp of nothing": _packet(0x70, b"\x00\x63"),
    "pingresp with a body": _packet(0xD0, b"abc"),
    "subscribe, to a client": _packet(0x82, b"\x00\x01\x00\x00\x01a\x01"),
    "connect, to a client": _packet(0x10, b"\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x00"),
    "auth": _packet(0xF0, b"\x18\x00"),
    "disconnect with an unknown reason": _packet(0xE0, b"\x03"),
    "disconnect with broken properties": _packet(0xE0, b"\x8b\x7f\x01"),
}


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_the_network_thread_survives_garbage_and_goes_on_with_the_next_connection(
    scripted, start_rig, monkeypatch, garbage, protocol
):
    monkeypatch.setattr("mqtt_bridge.subscriber.FIRST_DELAY_S", 0.02)
    monkeypatch.setattr("mqtt_bridge.subscriber.TICK_S", 0.02)
    rig = start_rig(scripted.port, mqtt_protocol=protocol)
    rig.wait_until_subscribed()

    scripted.publish(TOPIC, b"before", mid=1)
    scripted.wait_for_pubacks(1)
    scripted.send_raw(GARBAGE[garbage])
    scripted.drop()
    wait_until(lambda: len(scripted.record.connects) >= 2, what="the next connection")
    rig.wait_until_subscribed()
    scripted.publish(TOPIC, b"after", mid=1)

    wait_until(lambda: b"after" in rig.store.payloads, what="the message after it")
    assert rig.subscriber.alive
    assert rig.balance.balanced


def test_an_error_of_the_bridge_itself_costs_the_connection_and_not_the_thread(scripted, start_rig, monkeypatch):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()
    receive = rig.pipeline.receive
    failures = iter([RuntimeError("a bug")])

    def fail_once(*arguments: Any, **options: Any) -> None:
        for error in failures:
            raise error
        receive(*arguments, **options)

    monkeypatch.setattr(rig.pipeline, "receive", fail_once)
    scripted.answer = Answer(session_present=True)
    scripted.publish(TOPIC, b"1", mid=1)
    scripted.wait_for_connect(2)
    rig.wait_until_subscribed()
    scripted.publish(TOPIC, b"1", mid=1, dup=True)

    assert scripted.wait_for_pubacks(1) == [1]
    assert rig.store.payloads == [b"1"]


SICK = {
    "a malformed message": b"\x32\x05\x00\x00\x00\x01\x00",
    "a packet of no kind": b"\x00\x00",
    "a packet of another kind that cannot be read": b"\xb0\x06\x00\x01\x02\x7e\x00\x11",
}


@pytest.mark.parametrize("packet", SICK)
def test_a_broker_that_sends_what_cannot_be_read_again_and_again_is_not_taken_for_another_client(
    scripted, start_rig, monkeypatch, packet
):
    monkeypatch.setattr("mqtt_bridge.subscriber.FIRST_DELAY_S", 0.02)
    rig = start_rig(scripted.port)

    for number in range(1, CONTESTED_CUTS + 1):
        scripted.wait_for_subscribe(number)
        scripted.send_raw(SICK[packet])
        wait_until(lambda number=number: rig.subscriber._connects >= number, what="it to notice")
        wait_until(lambda: not rig.subscriber.state.connected, what="the end of the connection")
    scripted.wait_for_subscribe(CONTESTED_CUTS + 1)
    rig.wait_until_subscribed()

    assert rig.subscriber._short_lived == 0


def test_connections_that_it_ends_itself_do_not_make_it_hesitate(scripted, start_rig, monkeypatch):
    """A backlog is taken in by many short connections, where the broker sends more than it was allowed to."""
    monkeypatch.setattr("mqtt_bridge.subscriber.FIRST_DELAY_S", 0.02)
    monkeypatch.setattr("mqtt_bridge.broker_connection.REACH", 3)
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()
    scripted.answer = Answer(session_present=True)
    scripted.answer_subscribe = False  # nothing is proven

    for number in range(1, 14):  # doubled each time, the delay would be more than a minute
        scripted.wait_for_connect(number)
        for packet_id in range(3 * number - 2, 3 * number + 1):
            scripted.publish(TOPIC, b"%d" % packet_id, mid=packet_id)

    wait_until(lambda: rig.balance.outcomes["stored"] == 39, what="all messages to be stored")


def test_a_connection_that_is_out_of_reach_is_ended_when_all_of_it_is_acknowledged(
    scripted, start_rig, monkeypatch, receive
):
    monkeypatch.setattr("mqtt_bridge.broker_connection.REACH", 3)
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()
    scripted.answer = Answer(session_present=True)
    rig.store.shut()

    for packet_id in (1, 2, 3):
        scripted.publish(TOPIC, b"%d" % packet_id, mid=packet_id)
    wait_until(lambda: rig.balance.received == 3, what="three messages to be received")
    scripted.publish(TOPIC, b"4", mid=4)
    rig.store.open()

    scripted.wait_for_connect(2)
    assert rig.balance.received == 3, "what would be out of reach is left to the broker"
    if receive == "fast":  # stock paho closes the socket with what is unread in it, and the broker may miss some
        assert scripted.record.pubacks == [1, 2, 3]
        packets = [packet for packet in scripted.record.packets if packet in (PUBACK, DISCONNECT, CONNECT)]
        assert packets[:6] == [CONNECT, PUBACK, PUBACK, PUBACK, DISCONNECT, CONNECT]


def test_a_second_connack_ends_the_connection(scripted, start_rig):
    rig = start_rig(scripted.port)
    rig.wait_until_subscribed()

    scripted.send_raw(b"\x20\x03\x00\x00\x00")

    assert "a second CONNACK" in rig.wait_for_problem()
    scripted.wait_for_connect(2)


def test_connections_leave_no_file_descriptor_behind(scripted, start_rig):
    scripted.answer = Answer(reason=0x88)  # server unavailable
    port_of_nobody = free_port()
    gc.collect()
    gc.disable()  # what only the garbage collector would close counts as left behind
    try:
        refused, unreachable = start_rig(scripted.port), start_rig(port_of_nobody)
        refused.wait_for_problem()
        unreachable.wait_for_problem()
        before = _file_descriptors()
        wait_until(lambda: len(scripted.record.connects) >= 4, timeout_s=30, what="four connections")
        refused.subscriber.stop()
        unreachable.subscriber.stop()

        assert _file_descriptors() <= before
    finally:
        gc.enable()


def _file_descriptors() -> int:
    """Sockets that this process has open, but for those of connections that are being accepted."""
    return len(os.listdir("/dev/fd"))


# --- Backpressure ---


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_full_queue_stops_reading_then_disconnects_and_later_everything_comes(own_broker, start_rig, site, protocol):
    broker = own_broker()
    rig = start_rig(
        broker.port,
        mqtt_protocol=protocol,
        mqtt_topics=(f"{site}/{{device}}",),
        mqtt_keepalive_s=5,
        bridge_queue_size=100,
        mqtt_receive_maximum=1000,
    )
    rig.wait_until_subscribed()
    rig.store.shut()

    payloads = [b"%d" % number for number in range(500)]
    publish(broker, site, payloads)
    wait_until(lambda: rig.pipeline.full, what="the queue to be full")
    wait_until(lambda: not rig.subscriber.state.connected, timeout_s=20, what="it to disconnect")
    assert "queue is full" in (rig.subscriber.state.problem or "")
    held = rig.balance.in_flight
    rig.store.open()
    rig.wait_until_subscribed()
    wait_until(lambda: rig.balance.outcomes["stored"] == 500, timeout_s=30, what="everything")

    assert 100 <= held < 500
    assert sorted(rig.store.payloads, key=int) == payloads


@pytest.mark.parametrize("receive", ["fast"], indirect=True)  # it is the same after each connection
def test_connections_that_a_full_queue_has_ended_are_no_sign_of_another_client(broker, start_rig, site):
    rig = start_rig(
        broker.port,
        mqtt_topics=(f"{site}/{{device}}",),
        mqtt_keepalive_s=5,
        bridge_queue_size=100,
        mqtt_receive_maximum=1000,
    )

    for _ in range(CONTESTED_CUTS):
        rig.wait_until_subscribed()
        rig.store.shut()
        publish(broker, site, [b"%d" % number for number in range(150)])
        wait_until(lambda: not rig.subscriber.state.connected, timeout_s=20, what="it to disconnect")
        rig.store.open()
        wait_until(lambda: "queue is full" not in (rig.subscriber.state.problem or ""), what="it to go on")

    assert rig.subscriber.state.problem is None


def test_a_full_queue_that_gets_room_in_time_costs_no_connection(scripted, start_rig):
    rig = start_rig(scripted.port, bridge_queue_size=100, mqtt_receive_maximum=1000)
    rig.wait_until_subscribed()
    rig.store.shut()

    for mid in range(1, 301):
        scripted.publish(TOPIC, b"%d" % mid, mid=mid)
    wait_until(lambda: rig.pipeline.full, what="the queue to be full")
    rig.store.open()

    assert scripted.wait_for_pubacks(300) == list(range(1, 301))
    assert scripted.record.packets.count(CONNECT) == 1


def publish(broker: Broker, site: str, payloads: list[bytes]) -> None:
    paho.mqtt.publish.multiple(
        [(f"{site}/d1", payload, 1, False) for payload in payloads], hostname=broker.host, port=broker.port
    )


# --- Other ways to the broker ---

LEFT_TO_THE_COLLECTOR = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
"""paho leaves the socket of a failed TLS or websocket handshake to the collector, which takes it at once."""


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_messages_come_over_websockets_and_through_a_cut(broker, start_rig, site, protocol):
    with WebsocketRelay(broker.host, broker.port) as relay:
        rig = start_rig(
            relay.port, mqtt_protocol=protocol, mqtt_transport="websockets", mqtt_topics=(f"{site}/{{device}}",)
        )
        rig.wait_until_subscribed()

        publish(broker, site, [b"%d" % number for number in range(500)])
        wait_until(lambda: rig.balance.outcomes["stored"] == 500, what="everything before the cut")
        relay.cut()
        publish(broker, site, [b"%d" % number for number in range(500, 600)])
        wait_until(lambda: rig.balance.outcomes["stored"] == 600, what="everything after the cut")

        assert sorted(map(int, rig.store.payloads)) == list(range(600))
        rig.subscriber.stop()


@LEFT_TO_THE_COLLECTOR
def test_a_wrong_path_of_the_websocket_names_the_setting(broker, start_rig):
    with WebsocketRelay(broker.host, broker.port, path="/elsewhere") as relay:
        rig = start_rig(relay.port, mqtt_transport="websockets")

        assert "MQTT_WS_PATH" in rig.wait_for_problem()
        rig.subscriber.stop()


class Certificates:
    """An authority, and what it has signed for a broker and for a client, as files in a folder that all may read."""

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        self.ca = directory / "ca.pem"
        authority.cert_pem.write_to_path(self.ca)
        self.server = self._write(authority.issue_cert("127.0.0.1"), directory, "server")
        self.client = self._write(authority.issue_cert("my-bridge"), directory, "client")
        self.stranger = self._write(trustme.CA().issue_cert("stranger"), directory, "stranger")
        for path in directory.iterdir():
            path.chmod(0o644)

    @staticmethod
    def _write(certificate: trustme.LeafCert, directory: Path, name: str) -> tuple[Path, Path]:
        cert, key = directory / f"{name}.pem", directory / f"{name}.key"
        certificate.cert_chain_pems[0].write_to_path(cert)
        certificate.private_key_pem.write_to_path(key)
        return cert, key


@pytest.fixture
def certificates() -> Iterator[Certificates]:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Certificates(Path(name))


@pytest.fixture
def mutual_tls(own_broker, certificates) -> tuple[Broker, int]:
    """A broker, and its port where it wants a certificate of its authority."""
    port = free_port()
    cert, key = certificates.server
    tls = [f"cafile {certificates.ca}", f"certfile {cert}", f"keyfile {key}", "require_certificate true"]
    return own_broker(config_lines=[f"listener {port} 127.0.0.1", *tls]), port


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_messages_come_over_tls_with_a_client_certificate(mutual_tls, certificates, start_rig, site, protocol):
    broker, port = mutual_tls
    cert, key = certificates.client
    rig = start_rig(
        port,
        mqtt_protocol=protocol,
        mqtt_tls=True,
        mqtt_tls_ca=certificates.ca,
        mqtt_tls_cert=cert,
        mqtt_tls_key=key,
        mqtt_topics=(f"{site}/{{device}}",),
    )
    rig.wait_until_subscribed()

    publish(broker, site, [b"%d" % number for number in range(500)])
    publish(broker, site, [b'"%s"' % (b"x" * 100_000)])
    wait_until(lambda: rig.balance.outcomes["stored"] == 501, what="everything")

    assert sorted(int(payload) for payload in rig.store.payloads if len(payload) < 10) == list(range(500))


def test_a_full_queue_over_tls_gets_everything_later(mutual_tls, certificates, start_rig, site):
    broker, port = mutual_tls
    cert, key = certificates.client
    rig = start_rig(
        port,
        mqtt_tls=True,
        mqtt_tls_ca=certificates.ca,
        mqtt_tls_cert=cert,
        mqtt_tls_key=key,
        mqtt_topics=(f"{site}/{{device}}",),
        bridge_queue_size=100,
        mqtt_receive_maximum=1000,
    )
    rig.wait_until_subscribed()
    rig.store.shut()

    publish(broker, site, [b"%d" % number for number in range(500)])
    wait_until(lambda: rig.pipeline.full, what="the queue to be full")
    rig.store.open()
    wait_until(lambda: rig.balance.outcomes["stored"] == 500, what="everything")

    assert sorted(map(int, rig.store.payloads)) == list(range(500))


@pytest.mark.parametrize("whose", ["nobody's", "a stranger's"])
def test_a_client_certificate_that_the_broker_does_not_want_names_the_settings(
    mutual_tls, certificates, start_rig, whose
):
    cert, key = certificates.stranger if whose == "a stranger's" else (None, None)

    rig = start_rig(mutual_tls[1], mqtt_tls=True, mqtt_tls_ca=certificates.ca, mqtt_tls_cert=cert, mqtt_tls_key=key)

    assert "MQTT_TLS_CERT" in rig.wait_for_problem()


@LEFT_TO_THE_COLLECTOR
def test_a_certificate_for_another_name_is_refused(own_broker, certificates, start_rig):
    port = free_port()
    cert, key = certificates.client  # for the name my-bridge
    own_broker(config_lines=[f"listener {port} 127.0.0.1", f"certfile {cert}", f"keyfile {key}"])

    rig = start_rig(port, mqtt_tls=True, mqtt_tls_ca=certificates.ca)

    assert "MQTT_TLS_CA" in rig.wait_for_problem()
    assert not rig.subscriber.state.connected


def test_a_link_that_cuts_again_and_again_loses_and_doubles_nothing(broker, start_rig, site):
    with TcpProxy(broker.host, broker.port) as link:
        rig = start_rig(link.port, mqtt_topics=(f"{site}/{{device}}",))
        rig.wait_until_subscribed()

        for part in range(4):
            publish(broker, site, [b"%d" % number for number in range(part * 300, part * 300 + 300)])
            link.cut()
        wait_until(lambda: rig.balance.outcomes["stored"] >= 1200, timeout_s=30, what="everything")

        assert sorted(map(int, rig.store.payloads)) == list(range(1200))
        rig.subscriber.stop()
