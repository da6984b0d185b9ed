"""mosquitto/mosquitto.conf as it ships: its limits are in force in a real broker, and what it promises holds."""

from __future__ import annotations

import contextlib
import queue
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from mqtt_bridge.tools.embedded import Broker
from mqtt_bridge.tools.embedded.broker import PROJECT_CONFIG
from tests.waiting import wait_until

StartBroker = Callable[..., Broker]

ROOT = Path(__file__).parents[2]


class Client:
    """A paho client with a queue in place of callbacks; it acknowledges when told to."""

    def __init__(self, broker: Broker, client_id: str, *, protocol: int = mqtt.MQTTv5, **credentials: str) -> None:
        self.messages: queue.Queue[mqtt.MQTTMessage] = queue.Queue()
        self.reasons: queue.Queue[int] = queue.Queue()
        self.paho = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id, protocol=protocol, manual_ack=True, reconnect_on_failure=False
        )
        self.paho.max_queued_messages_set(0)
        self.paho.max_inflight_messages_set(1000)
        if credentials:
            self.paho.username_pw_set(credentials["username"], credentials["password"])
        self.paho.on_message = lambda _client, _userdata, message: self.messages.put(message)
        self.paho.on_connect = lambda _c, _u, _flags, reason, _p: self.reasons.put(reason.value)
        self.paho.on_subscribe = lambda *_: self.reasons.put(0)
        expiry = Properties(PacketTypes.CONNECT)
        expiry.SessionExpiryInterval = 3600
        session = {"clean_start": False, "properties": expiry} if protocol == mqtt.MQTTv5 else {}
        self.paho.connect(broker.host, broker.port, **session)
        self.paho.loop_start()
        self.reason = self.reasons.get(timeout=10)

    def subscribe(self, topic_filter: str) -> None:
        self.paho.subscribe(topic_filter, 1)
        self.reasons.get(timeout=10)

    def publish_all(self, topic: str, payloads: list[bytes]) -> None:
        """QoS 1, all acknowledged when this returns."""
        infos = [self.paho.publish(topic, payload, qos=1) for payload in payloads]
        for info in infos:
            info.wait_for_publish(60)

    def take(self, count: int) -> list[bytes]:
        """The next `count` messages, each acknowledged."""
        payloads = []
        for _ in range(count):
            message = self.messages.get(timeout=10)
            self.paho.ack(message.mid, message.qos)
            payloads.append(message.payload)
        return payloads

    def close(self) -> None:
        self.paho.disconnect()
        self.paho.loop_stop()


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    with contextlib.ExitStack() as clients:

        def make(*args: object, **kwargs: object) -> Client:
            client = Client(*args, **kwargs)  # type: ignore[arg-type]
            clients.callback(client.close)
            return client

        yield make


Connect = Callable[..., Client]


def _leave_a_session(connect: Connect, broker: Broker, client_id: str, topic_filter: str) -> None:
    client = connect(broker, client_id)
    client.subscribe(topic_filter)
    client.close()


def test_ten_thousand_messages_wait_for_an_offline_session_and_survive_a_restart(
    own_broker: StartBroker, connect: Connect
) -> None:
    broker = own_broker()
    _leave_a_session(connect, broker, "bridge", "devices/+/telemetry")
    payloads = [b"%d" % number for number in range(10_000)]

    publisher = connect(broker, "publisher")
    publisher.publish_all("devices/a/telemetry", payloads)
    publisher.close()
    broker.restart()

    assert connect(broker, "bridge").take(10_000) == payloads


def test_the_default_limit_would_have_dropped_most_of_them(own_broker: StartBroker, connect: Connect) -> None:
    broker = own_broker(config_lines=["max_queued_messages 1000"])
    _leave_a_session(connect, broker, "bridge", "a")

    connect(broker, "publisher").publish_all("a", [b"%d" % number for number in range(3_000)])
    bridge = connect(broker, "bridge")

    bridge.take(1_000)
    connect(broker, "marker").publish_all("a", [b"the next that arrives"])
    assert bridge.take(1) == [b"the next that arrives"]


def test_the_limit_by_bytes_is_in_force_together_with_the_limit_by_count(
    own_broker: StartBroker, connect: Connect
) -> None:
    broker = own_broker(config_lines=["max_queued_bytes 100000"])
    _leave_a_session(connect, broker, "bridge", "a")

    connect(broker, "publisher").publish_all("a", [b"x" * 1_000 for _ in range(300)])
    bridge = connect(broker, "bridge")

    received = bridge.take(100)
    connect(broker, "marker").publish_all("a", [b"end"])
    while received[-1] != b"end":
        received += bridge.take(1)
    assert len(received) < 150


def test_a_thousand_messages_are_in_flight_without_any_acknowledgement(
    own_broker: StartBroker, connect: Connect
) -> None:
    broker = own_broker()
    bridge = connect(broker, "bridge", protocol=mqtt.MQTTv311)  # over MQTT 5 a client names its own number
    bridge.subscribe("a")

    connect(broker, "publisher").publish_all("a", [b"%d" % number for number in range(1_000)])

    wait_until(lambda: bridge.messages.qsize() == 1_000, what="1,000 messages without an acknowledgement")


def test_the_shipped_file_is_the_one_that_the_package_carries() -> None:
    assert PROJECT_CONFIG.is_symlink(), "git must check it out as a link (core.symlinks)"
    assert PROJECT_CONFIG.resolve() == (ROOT / "mosquitto" / "mosquitto.conf").resolve()


def test_the_shipped_file_is_taken_as_it_stands_and_listens_on_loopback_only(own_broker: StartBroker) -> None:
    text = (ROOT / "mosquitto" / "mosquitto.conf").read_text()
    settings = [line.split() for line in text.splitlines() if line and not line.startswith("#")]

    broker = own_broker()
    running = (broker.directory / "mosquitto.conf").read_text().splitlines()

    assert ["listener", "1883", "127.0.0.1"] in settings
    own = ("listener", "persistence_location")
    assert all(" ".join(setting) in running for setting in settings if setting[0] not in own)


def test_every_setting_of_the_shipped_file_has_its_reason_above_it() -> None:
    previous = ""
    for line in (ROOT / "mosquitto" / "mosquitto.conf").read_text().splitlines():
        if line and not line.startswith("#"):
            assert previous, f"{line} stands without a comment"
        previous = line


def test_with_passwords_and_acl_nobody_reads_or_takes_over_what_is_the_bridges(
    own_broker: StartBroker, connect: Connect
) -> None:
    first = own_broker()
    users = {"mqtt-bridge": "b", "sensor-17": "s"}
    passwords = first.directory / "passwords"
    acl = first.directory / "acl"
    acl.write_text((ROOT / "mosquitto" / "acl.example").read_text())
    _write_passwords(passwords, users)
    passwords.chmod(0o644)
    acl.chmod(0o644)
    broker = own_broker(
        config_lines=[
            "allow_anonymous false",
            f"password_file {passwords}",
            f"acl_file {acl}",
            "use_username_as_clientid true",
        ]
    )
    bridge = connect(broker, "mqtt-bridge", username="mqtt-bridge", password="b")
    bridge.subscribe("devices/+/telemetry")

    # A device that claims to be the bridge gets its own name instead, and may write below that only.
    sensor = connect(broker, "mqtt-bridge", username="sensor-17", password="s")
    sensor.publish_all("devices/sensor-18/telemetry", [b"somebody else's"])
    sensor.publish_all("devices/sensor-17/telemetry", [b"its own"])

    assert bridge.take(1) == [b"its own"]
    assert bridge.paho.is_connected()
    assert connect(broker, "x", username="sensor-17", password="wrong").reason >= 0x80


def _write_passwords(path: Path, users: dict[str, str]) -> None:
    program = shutil.which("mosquitto_passwd") or "/usr/bin/mosquitto_passwd"
    for number, (user, password) in enumerate(users.items()):
        create = ["-c"] if number == 0 else []
        line = shlex.join([program, "-b", *create, str(path), user, password])
        subprocess.run(line, shell=True, check=True, capture_output=True)
