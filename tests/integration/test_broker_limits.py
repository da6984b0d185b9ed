"""The broker's count of dropped messages, watched over the bridge's own connection, and read by `check`."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as mqtt
import pytest
import structlog
from paho.mqtt.enums import CallbackAPIVersion

from mqtt_bridge.acks import AckTracker
from mqtt_bridge.broker_limits import DROPPED, DropWatch
from mqtt_bridge.model import Run
from mqtt_bridge.settings import Settings
from mqtt_bridge.subscriber import Subscriber
from mqtt_bridge.tools.check import Finding, check_broker
from mqtt_bridge.tools.embedded import Broker
from tests.scripted_broker import CONNECT, Answer, ScriptedBroker
from tests.waiting import wait_until

PROTOCOLS = ("5", "3.1.1")
FILTERS = ("devices/+/telemetry",)
TOPIC = b"devices/d1/telemetry"


@dataclass
class Inbox:
    """Takes everything, and acknowledges nothing."""

    topics: list[bytes] = field(default_factory=list)
    full = False
    session_to_raise = None
    rest_s = 0.0

    def connected(self, **_: object) -> None: ...

    def disconnected(self) -> None: ...

    def receive(self, run: Run) -> None:
        self.topics.extend(run.topics)

    def prove(self, positions: object) -> None: ...

    def wait_for_room(self, timeout_s: float) -> bool:
        return True


@dataclass
class Rig:
    subscriber: Subscriber
    inbox: Inbox

    def wait_until_subscribed(self) -> None:
        wait_until(lambda: self.subscriber.state.subscribed, timeout_s=20, what=f"SUBACK; {self.subscriber.state}")

    def wait_until_dropped(self, count: int) -> None:
        wait_until(lambda: (self.subscriber.state.dropped or -1) >= count, timeout_s=30, what=f"{count} dropped")


StartRig = Callable[..., Rig]


@pytest.fixture
def start_rig() -> Iterator[StartRig]:
    """Starts a subscriber that asks for the count at once."""
    rigs: list[Rig] = []

    def start(port: int, *, filters: tuple[str, ...] = FILTERS, **changes: Any) -> Rig:
        changes.setdefault("mqtt_client_id", f"rig-{secrets.token_hex(4)}")
        settings = Settings(mqtt_host="127.0.0.1", mqtt_port=port, **changes)
        inbox = Inbox()
        watch = DropWatch(filters, ask_after_s=0.0)
        subscriber = Subscriber(settings, filters=filters, inbox=inbox, acks=AckTracker(), drops=watch)
        rigs.append(Rig(subscriber, inbox))
        subscriber.start()
        return rigs[-1]

    yield start
    for rig in rigs:
        rig.subscriber.stop()


@pytest.fixture
def scripted() -> Iterator[ScriptedBroker]:
    with ScriptedBroker() as broker:
        yield broker


@pytest.fixture
def tight_broker(own_broker: Callable[..., Broker]) -> Broker:
    """One that keeps ten messages for a client that is away."""
    return own_broker(config_lines=["max_queued_messages 10", "sys_interval 1"])


def leave_a_session(broker: Broker, topic: str) -> None:
    """A client that subscribes, and goes away."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, f"away-{secrets.token_hex(4)}", clean_session=False, protocol=4)
    answered: list[object] = []
    client.on_subscribe = lambda *arguments: answered.append(arguments)
    client.connect(broker.host, broker.port)
    client.loop_start()
    client.subscribe(topic, 1)
    wait_until(lambda: answered, what="SUBACK")
    client.disconnect()
    client.loop_stop()


def publish(broker: Broker, topic: str, count: int) -> None:
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=4)
    client.connect(broker.host, broker.port)
    client.loop_start()
    for sent in [client.publish(topic, b"1", 1) for _ in range(count)]:
        sent.wait_for_publish(10)
    client.disconnect()
    client.loop_stop()


# --- At run time ---


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_a_full_mosquitto_drops_is_seen_and_warned_about(tight_broker, start_rig, protocol):
    leave_a_session(tight_broker, "away/#")
    rig = start_rig(tight_broker.port, mqtt_protocol=protocol)
    wait_until(lambda: rig.subscriber.state.dropped == 0, timeout_s=30, what="the count before")

    with structlog.testing.capture_logs() as logs:
        publish(tight_broker, "away/1", 25)
        rig.wait_until_dropped(15)
        wait_until(lambda: any(entry["log_level"] == "warning" for entry in logs), what="the warning")

    [warning] = [entry for entry in logs if entry["log_level"] == "warning"]  # a second one would be a minute later
    assert warning["dropped"] == warning["since_its_start"] <= 15
    assert rig.inbox.topics == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_a_session_has_subscribed_to_before_is_kept_from_the_pipeline_too(scripted, start_rig, protocol):
    scripted.forbidden = frozenset({DROPPED})
    rig = start_rig(scripted.port, mqtt_protocol=protocol)
    rig.wait_until_subscribed()

    scripted.publish(DROPPED.encode(), b"3", qos=0, retain=True)
    scripted.publish(TOPIC, b"{}", qos=0)
    wait_until(lambda: rig.inbox.topics, what="the message behind it")

    assert rig.inbox.topics == [TOPIC]
    assert rig.subscriber.state.dropped == 3


def test_who_subscribes_to_the_brokers_own_topics_gets_the_count_once(tight_broker, start_rig):
    rig = start_rig(tight_broker.port, filters=("$SYS/broker/publish/messages/#",), mqtt_retained="always")

    wait_until(lambda: rig.subscriber.state.dropped == 0, timeout_s=30, what="the count")

    assert rig.inbox.topics.count(DROPPED.encode()) == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_broker_that_refuses_the_count_is_asked_once_and_serves_on(scripted, start_rig, protocol):
    scripted.forbidden = frozenset({DROPPED})
    rig = start_rig(scripted.port, mqtt_protocol=protocol)

    assert scripted.wait_for_subscribe(2) == [(DROPPED, 0)]
    scripted.answer = Answer(session_present=True)
    scripted.drop()
    scripted.wait_for_connect(2)
    rig.wait_until_subscribed()
    scripted.publish(TOPIC, b"{}", qos=0)
    wait_until(lambda: rig.inbox.topics, what="a message")

    assert [DROPPED in dict(filters) for filters in scripted.record.subscribes].count(True) == 1
    assert rig.subscriber.state.problem is None
    assert rig.subscriber.subscriptions == frozenset(FILTERS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_broker_that_ends_the_connection_over_it_is_not_asked_again_nor_taken_for_contested(
    scripted, start_rig, protocol
):
    scripted.cuts_at = frozenset({DROPPED})
    scripted.answer = Answer(session_present=True)

    rig = start_rig(scripted.port, mqtt_protocol=protocol)
    scripted.wait_for_connect(2)
    rig.wait_until_subscribed()
    scripted.publish(TOPIC, b"{}", qos=0)
    wait_until(lambda: rig.inbox.topics, what="a message")

    assert [DROPPED in dict(filters) for filters in scripted.record.subscribes].count(True) == 1
    assert scripted.record.packets.count(CONNECT) == 2
    assert rig.subscriber.state.problem is None


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_it_is_none_of_the_subscriptions_of_the_session(scripted, start_rig, protocol):
    rig = start_rig(scripted.port, mqtt_protocol=protocol)

    scripted.wait_for_subscribe(2)
    scripted.publish(DROPPED.encode(), b"3", qos=0)
    rig.wait_until_dropped(3)

    assert rig.subscriber.subscriptions == frozenset(FILTERS)


# --- check ---


def findings(port: int, **changes: Any) -> list[Finding]:
    settings = Settings(mqtt_host="127.0.0.1", mqtt_port=port, **changes)
    return list(check_broker(settings, FILTERS))


def about(found: list[Finding], word: str) -> list[Finding]:
    return [finding for finding in found if word in finding.text]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_check_says_what_the_broker_has_dropped(tight_broker, protocol):
    [none] = about(findings(tight_broker.port, mqtt_protocol=protocol), "dropped")
    leave_a_session(tight_broker, "away/#")
    publish(tight_broker, "away/1", 25)

    def said() -> list[Finding]:
        return about(findings(tight_broker.port, mqtt_protocol=protocol), "dropped 15 messages")

    [some] = wait_until(said, timeout_s=30, what="the count")

    assert none.level == "ok"
    assert some.level == "warning"
    assert "of any client" in some.text


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("reaction", ["forbidden", "cuts_at"])
def test_check_says_nothing_of_a_count_that_it_may_not_read(scripted, protocol, reaction):
    setattr(scripted, reaction, frozenset({DROPPED}))

    found = findings(scripted.port, mqtt_protocol=protocol)

    assert [finding.level for finding in found] == ["ok"]
    assert about(found, "accepts the subscriptions")


def test_check_leaves_no_session_at_the_broker(scripted):
    findings(scripted.port)

    asking, subscribing = scripted.record.connects
    assert asking.client_id == subscribing.client_id
    assert asking.session_expiry_s == Settings().mqtt_session_expiry_s
    assert (subscribing.clean_start, subscribing.session_expiry_s) == (True, 0)
    # Had it died between the two, the session left behind would have collected nothing.
    assert len([filters for filters in scripted.record.subscribes if DROPPED not in dict(filters)]) == 1


def test_check_names_what_the_broker_grants_short(scripted):
    scripted.answer = Answer(
        properties=b"\x11" + struct.pack("!I", 3600)  # session expiry
        + b"\x24\x00"  # maximum QoS
        + b"\x25\x00"  # retain available
        + b"\x2a\x00"  # shared subscriptions available
    )  # fmt: skip

    found = findings(scripted.port, mqtt_shared_group="bridges")

    assert [finding.level for finding in found] == ["warning", "warning", "warning", "problem", "ok"]
    assert about(found, "granted_s=3600")
    assert about(found, "MQTT_SHARED_GROUP")
