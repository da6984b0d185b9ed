"""The simulator against a real broker: what it says it sent is what arrives."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from mqtt_bridge.tools.embedded import Broker
from mqtt_bridge.tools.simulator import BURST, Progress, Simulator, SimulatorError
from tests.waiting import wait_until


class Listener:
    """A subscriber whose session outlives the broker's absence; QoS 1."""

    def __init__(self) -> None:
        self.messages: list[mqtt.MQTTMessage] = []
        self.subscribed = threading.Event()

    def pairs(self) -> Counter[tuple[str, int]]:
        """How often each (device, seq) arrived; what is no reading is left out."""
        found: Counter[tuple[str, int]] = Counter()
        for message in list(self.messages):
            try:
                found[message.topic.split("/")[-2], json.loads(message.payload)["seq"]] += 1
            except ValueError:
                continue
        return found


@contextmanager
def listening(broker: Broker, topic: str) -> Iterator[Listener]:
    listener = Listener()
    client = mqtt.Client(
        CallbackAPIVersion.VERSION2, f"listener-{secrets.token_hex(4)}", clean_session=False, protocol=mqtt.MQTTv311
    )
    client.reconnect_delay_set(1, 1)
    client.on_connect = lambda *_: client.subscribe(topic, qos=1)
    client.on_subscribe = lambda *_: listener.subscribed.set()
    client.on_message = lambda _client, _userdata, message: listener.messages.append(message)
    client.connect(broker.host, broker.port)
    client.loop_start()
    try:
        assert listener.subscribed.wait(10)
        yield listener
    finally:
        client.disconnect()
        client.loop_stop()


@pytest.fixture
def site() -> str:
    """A first topic level of this test's own."""
    return f"site-{secrets.token_hex(4)}"


@pytest.fixture
def make(broker, site) -> Callable[..., Simulator]:
    def make(**options: Any) -> Simulator:
        return Simulator(broker.host, broker.port, topic=f"{site}/{{device}}/telemetry", **options)

    return make


def simulator_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "mqtt-bridge-sim" in thread.name]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_every_message_of_the_schedule_arrives_once(broker, site, make, qos, protocol):
    simulator = make(devices=20, interval_s=0.1, duration_s=0.5, qos=qos, protocol=protocol)

    with listening(broker, f"{site}/#") as listener:
        summary = simulator.run(threading.Event())
        wait_until(lambda: len(listener.messages) >= 100, what="100 messages")

    expected = {(f"sim-{device:04d}", seq) for device in range(1, 21) for seq in range(1, 6)}
    assert listener.pairs() == Counter(expected)
    assert (summary.published, summary.acknowledged, summary.refused, summary.missed) == (100, 100, 0, 0)
    assert simulator_threads() == []


def test_the_schedule_is_kept_and_the_summary_says_so(make):
    begin = time.monotonic()
    summary = make(devices=100, interval_s=1.0, duration_s=1.0).run(threading.Event())
    took_s = time.monotonic() - begin

    assert summary.planned_rate == 100.0
    assert summary.rate == pytest.approx(100.0, rel=0.05)
    assert summary.behind_max_s < 0.5
    assert took_s >= 1.0


def test_faults_are_injected_and_counted(broker, site, make):
    simulator = make(
        devices=10, interval_s=0.05, count=1000, duplicates=0.2, garbage=0.2, late=0.2, bursts=0.05, seed=3
    )

    with listening(broker, f"{site}/#") as listener:
        summary = simulator.run(threading.Event())
        wait_until(lambda: len(listener.messages) >= 1000, what="1000 messages")

    arrived = listener.pairs()
    assert len(listener.messages) == summary.published == summary.acknowledged == 1000
    assert min(summary.duplicates, summary.garbage, summary.late) > 50
    assert len(arrived) == summary.readings
    assert sum(arrived.values()) == summary.readings + summary.duplicates


@pytest.mark.parametrize("count", [1, BURST - 1, 997])
def test_the_count_is_kept_exactly_even_within_a_burst(broker, site, make, count):
    simulator = make(devices=5, interval_s=0.0, count=count, bursts=1.0)

    with listening(broker, f"{site}/#") as listener:
        summary = simulator.run(threading.Event())
        wait_until(lambda: len(listener.messages) >= count, what=f"{count} messages")

    assert (summary.published, summary.acknowledged) == (count, count)
    assert len(listener.pairs()) == count


def test_as_fast_as_possible_is_bounded_by_acknowledgements(make):
    seen: list[Progress] = []

    summary = make(devices=50, interval_s=0.0, count=5000, connections=2).run(threading.Event(), seen.append)

    assert summary.planned_rate is None
    assert summary.acknowledged == 5000
    assert all(progress.in_flight <= 2 * 200 for progress in seen)


def test_the_window_of_the_broker_is_respected(own_broker):
    broker = own_broker(config_lines=["max_inflight_messages 7"])
    seen: list[Progress] = []

    summary = Simulator(broker.host, broker.port, devices=10, interval_s=0.0, count=2000, connections=2).run(
        threading.Event(), seen.append
    )

    assert summary.acknowledged == 2000
    assert all(progress.in_flight <= 2 * 7 for progress in seen)


def test_stop_ends_the_run_at_once_and_what_was_sent_is_acknowledged(make):
    stop = threading.Event()

    def stop_soon(progress: Progress) -> None:
        if progress.published:
            stop.set()

    begin = time.monotonic()
    summary = make(devices=10, interval_s=1.0).run(stop, stop_soon)
    took_s = time.monotonic() - begin

    assert 0 < summary.published == summary.acknowledged < 20
    assert took_s < 3
    assert simulator_threads() == []


def test_nothing_is_lost_while_the_broker_is_away(own_broker):
    broker = own_broker()
    away = threading.Event()
    seen: list[Progress] = []

    def watch(progress: Progress) -> None:
        seen.append(progress)
        if progress.published >= 100:
            away.set()

    simulator = Simulator(broker.host, broker.port, devices=50, interval_s=0.25, count=1500, topic="a/{device}/b")

    with listening(broker, "a/#") as listener, ThreadPoolExecutor(1) as pool:
        running = pool.submit(simulator.run, threading.Event(), watch)
        assert away.wait(10)
        broker.stop()
        wait_until(lambda: seen[-1].connected == 0 and seen[-1].behind_s > 1, what="the schedule to fall behind")
        sent_without_broker = seen[-1].published
        broker.start()
        summary = running.result(60)
        wait_until(lambda: len(listener.pairs()) >= 1500, what="every reading")

    assert (summary.published, summary.acknowledged, summary.missed) == (1500, 1500, 0)
    assert summary.behind_max_s > 1
    assert sent_without_broker < 1500
    assert set(listener.pairs()) == {(f"sim-{device:04d}", seq) for device in range(1, 51) for seq in range(1, 31)}


def test_a_broker_that_stays_away_does_not_keep_the_run_from_ending(own_broker):
    broker = own_broker()
    away = threading.Event()

    def watch(progress: Progress) -> None:
        if progress.published:
            away.set()

    simulator = Simulator(broker.host, broker.port, devices=50, interval_s=0.1, duration_s=2.0, drain_s=0.5)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(simulator.run, threading.Event(), watch)
        assert away.wait(10)
        broker.stop()
        summary = running.result(20)

    assert summary.missed > 0
    assert summary.published + summary.missed == 1000
    assert summary.acknowledged <= summary.published
    assert simulator_threads() == []


def test_a_broker_that_refuses_is_a_clear_error(own_broker):
    broker = own_broker(config_lines=["allow_anonymous false"])
    simulator = Simulator(
        broker.host,
        broker.port,
        devices=2,
        interval_s=1.0,
        prepare=lambda client: client.username_pw_set("me", "secret word"),
    )

    with pytest.raises(SimulatorError, match="refuses: Not authorized") as caught:
        simulator.run(threading.Event())

    assert "secret word" not in str(caught.value)
    assert simulator_threads() == []
