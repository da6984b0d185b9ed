"""The virtual devices and their schedule, without a broker."""

from __future__ import annotations

import json
import socket
import threading
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from mqtt_bridge.tools.simulator import BURST, Device, Faults, Simulator, SimulatorError, Summary, _Schedule

NOW = datetime(2026, 3, 1, 12, 0, 0, 123_456, UTC)


def make_device(number: int = 1, **changes: Any) -> Device:
    options: dict[str, Any] = {
        "topic": "devices/{device}/telemetry",
        "seed": 0,
        "interval_s": 60.0,
        "faults": Faults(),
    }
    return Device(number, **options | changes)


def contents(device: Device, turns: int) -> list[dict[str, Any]]:
    return [json.loads(message.payload) for _ in range(turns) for message in device.messages(NOW)]


def time_of(content: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(content["ts"])


def test_a_device_publishes_json_readings_under_its_own_topic():
    (message,) = make_device(17).messages(NOW)

    content = json.loads(message.payload)
    assert message.topic == "devices/sim-0017/telemetry"
    assert list(content) == ["ts", "seq", "temperature", "humidity", "battery"]
    assert content["ts"] == "2026-03-01T12:00:00.123Z"


def test_readings_are_numbered_without_gaps():
    assert [content["seq"] for content in contents(make_device(), 50)] == list(range(1, 51))


def test_the_same_seed_gives_the_same_payloads_but_for_their_times():
    faults = Faults(duplicates=0.2, garbage=0.2, bursts=0.1)
    first, second = make_device(seed=7, faults=faults), make_device(seed=7, faults=faults)

    for turn in range(200):
        now = NOW + timedelta(seconds=turn)
        assert list(first.messages(now)) == list(second.messages(now))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"number": 2}])
def test_another_seed_or_device_gives_other_values(changes):
    values = [content["temperature"] for content in contents(make_device(), 20)]
    others = [content["temperature"] for content in contents(make_device(**changes), 20)]

    assert values != others


def test_a_day_of_readings_is_plausible_and_cycles():
    readings = contents(make_device(interval_s=300.0), 288)

    temperatures = [reading["temperature"] for reading in readings]
    assert 3 < max(temperatures) - min(temperatures) < 25
    assert all(-15 < value < 50 for value in temperatures)
    assert all(0 <= reading["humidity"] <= 100 for reading in readings)
    assert all(abs(later - earlier) < 2 for earlier, later in pairwise(temperatures))
    assert readings[-1]["battery"] <= readings[0]["battery"] <= 100


def test_an_empty_battery_stays_empty():
    readings = contents(make_device(interval_s=86_400.0), 365)

    assert readings[-1]["battery"] == 0


def test_a_duplicate_is_the_same_payload_twice():
    reading, duplicate = make_device(faults=Faults(duplicates=1.0)).messages(NOW)

    assert (reading.kind, duplicate.kind) == ("reading", "duplicate")
    assert reading.payload == duplicate.payload


def test_garbage_can_be_decoded_by_nobody():
    device = make_device(faults=Faults(garbage=1.0))
    messages = [message for _ in range(300) for message in device.messages(NOW)]

    garbage = [message.payload for message in messages if message.kind == "garbage"]
    assert len(garbage) == 300
    for payload in garbage:
        with pytest.raises(ValueError):
            json.loads(payload)


def test_garbage_costs_no_number():
    device = make_device(faults=Faults(garbage=1.0))
    messages = [message for _ in range(20) for message in device.messages(NOW)]

    readings = [json.loads(message.payload) for message in messages if message.kind == "reading"]
    assert [reading["seq"] for reading in readings] == list(range(1, 21))


def test_a_late_reading_is_a_minute_to_an_hour_old():
    device = make_device(faults=Faults(late=1.0))
    messages = [message for _ in range(100) for message in device.messages(NOW)]

    ages_s = [(NOW - time_of(json.loads(message.payload))).total_seconds() for message in messages]
    assert all(message.late for message in messages)
    assert all(59.9 < age_s < 3600.1 for age_s in ages_s)


def test_a_burst_is_what_the_device_missed_with_its_times():
    readings = contents(make_device(faults=Faults(bursts=1.0)), 1)

    assert [reading["seq"] for reading in readings] == list(range(1, BURST + 1))
    assert time_of(readings[-1]) == NOW.replace(microsecond=123_000)
    steps = {time_of(later) - time_of(earlier) for earlier, later in pairwise(readings)}
    assert steps == {timedelta(minutes=1)}


def test_probabilities_are_kept():
    device = make_device(faults=Faults(duplicates=0.25))
    kinds = [message.kind for _ in range(4000) for message in device.messages(NOW)]

    assert 900 < kinds.count("duplicate") < 1100


def test_the_devices_are_spread_evenly_over_the_interval():
    fleet = [make_device(number) for number in range(1, 11)]
    shares = [_Schedule(fleet[share::3], devices=10, interval_s=5.0) for share in range(3)]

    dues = []
    for _ in range(20):
        share = min(shares, key=lambda one: one.due_s)
        dues.append((share.due_s, share.take().number))

    assert [due_s for due_s, _ in dues] == pytest.approx([turn * 0.5 for turn in range(20)])
    assert [number for _, number in dues] == [*range(1, 11), *range(1, 11)]


def test_a_schedule_knows_which_turns_were_skipped():
    schedule = _Schedule([make_device(number) for number in (1, 2, 3, 4)], devices=4, interval_s=1.0)
    schedule.take()

    assert [schedule.skipped(elapsed_s) for elapsed_s in (0.0, 0.25, 0.26, 1.0, 2.3)] == [0, 0, 1, 3, 9]


def test_a_summary_tells_readings_from_what_was_added():
    summary = Summary(
        published=100,
        acknowledged=90,
        refused=2,
        duplicates=5,
        garbage=3,
        late=4,
        missed=0,
        seconds=1.0,
        rate=100.0,
        planned_rate=92.0,
        behind_max_s=0.0,
    )

    assert (summary.readings, summary.unacknowledged) == (92, 8)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("devices", 0),
        ("interval_s", -1.0),
        ("interval_s", float("nan")),
        ("topic", ""),
        ("topic", "devices/+/telemetry"),
        ("qos", 3),
        ("protocol", "3.1"),
        ("garbage", 1.5),
        ("late", -0.1),
    ],
)
def test_an_option_that_makes_no_sense_is_named(option, value):
    options: dict[str, Any] = {"devices": 1, "interval_s": 1.0, option: value}

    with pytest.raises(SimulatorError) as caught:
        Simulator("127.0.0.1", 1883, **options)

    named = {"interval_s": "interval", "garbage": "faults", "late": "faults"}.get(option, option)
    assert str(caught.value).startswith(f"{named}: ")


def test_nobody_at_the_address_is_a_clear_error():
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    simulator = Simulator("127.0.0.1", port, devices=3, interval_s=1.0)

    with pytest.raises(SimulatorError, match=f"No broker answers at 127.0.0.1:{port}: .*refused"):
        simulator.run(threading.Event())
