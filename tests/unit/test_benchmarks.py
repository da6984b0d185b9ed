"""The parts of the benchmarks that need no server: messages, processes' time, verdict, tables, plots."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cpu, documents, machine, plots, profile, report, results, verdict
from benchmarks.contestants import all_contestants
from benchmarks.telemetry import DEVICES, Load, packets
from mqtt_bridge.routes import Router, default_routes
from mqtt_bridge.tools.explain import explain
from tests.mqtt_publish import read_publish

LOADS = (
    Load(3_000),
    Load(300, devices=10),
    Load(300, readings=1),
    Load(300, readings=30),
    Load(300, readings=1, size_bytes=10_000),
)


# --- Messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADS, ids=str)
@pytest.mark.parametrize("protocol", [4, 5])
def test_every_packet_stands_at_its_place_and_says_what_its_load_says(load: Load, protocol: int) -> None:
    store = packets(load, protocol=protocol)

    assert len(store) == load.messages
    for number in (0, 1, load.messages - 1):
        packet = bytes(store.data[number * store.stride : (number + 1) * store.stride])
        publish = read_publish(packet[0], body_of(packet), protocol=protocol)
        assert store.data[number * store.stride + store.id_offset :][:2] == b"\x00\x01"
        assert (publish.packet_id, publish.qos, publish.dup) == (1, 1, False)
        assert publish.topic == f"bench/device-{number % load.devices:06}/telemetry"
        assert len(publish.payload) == load.payload_bytes
        json.loads(publish.payload)


def body_of(packet: bytes) -> bytes:
    end = next(place for place in range(1, 5) if not packet[place] & 0x80)
    return packet[end + 1 :]


@pytest.mark.parametrize("load", LOADS, ids=str)
def test_the_bridge_makes_as_many_rows_of_a_message_as_the_load_says(load: Load) -> None:
    router = Router(default_routes("bench/{device}/telemetry"))

    explained = explain(router, "bench/device-000001/telemetry", load.payload(1, 1_760_000_000_123))

    assert len(explained["rows"]) == load.rows_per_message
    assert sum(row["metric"] == "temperature" for row in explained["rows"]) == 1


@pytest.mark.parametrize("load", LOADS, ids=str)
def test_no_two_messages_have_the_same_device_and_time(load: Load) -> None:
    times = [json.loads(payload)["ts"] for payload in load.payloads(1_760_000_000_000)]

    found = {(number % load.devices, at) for number, at in enumerate(times)}

    assert len(found) == load.messages


def test_a_payload_is_about_ninety_bytes_with_four_readings_over_a_thousand_topics() -> None:
    assert 80 <= Load(1).payload_bytes <= 100
    assert Load(1).rows_per_message == 4
    assert DEVICES == 1_000


# --- Processes -------------------------------------------------------------------------------------------------------


SPENDS_HALF_A_SECOND_IN_A_CHILD = """
import subprocess, sys
spend = "import time\\nwhile time.process_time() < 0.5: pass"
subprocess.run([sys.executable, "-c", spend])
print("done", flush=True)
sys.stdin.read()
"""


def test_the_time_of_children_that_have_ended_counts() -> None:
    command = [sys.executable, "-c", SPENDS_HALF_A_SECOND_IN_A_CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()

        spent_s, held_kb = cpu.cpu_s([process.pid]), cpu.rss_kb([process.pid])
        without_s = cpu.cpu_s([process.pid], without=[process.pid])
        process.communicate()

    assert spent_s >= 0.5
    assert without_s == 0
    assert held_kb > 1_000


def test_a_process_that_is_gone_costs_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()

    assert cpu.cpu_s([process.pid]) == 0


# --- Results ---------------------------------------------------------------------------------------------------------


def begun(**parts: Any) -> results.Results:
    described = {
        "cpu": "a processor",
        "cores": 2,
        "memory_gb": 4,
        "kernel": "Linux 6",
        "python": "CPython 3.11",
        "packages": {"paho-mqtt": "2.2.0"},
        "postgres": {"server_version": "18"},
        "mosquitto": "2.0.18",
    }
    fresh = results.fresh(commit="0123456789", dirty=False, scale="full", machine=described)
    for name, figures in parts.items():
        measured = {"measured_at": "2026-10-01T12:00:00+00:00", "seconds": 1.0, "others_cores": 0.1, "figures": figures}
        fresh["measurements"][name.replace("_", "-")] = measured
    return fresh


def test_parts_of_the_same_commit_come_into_one_file_and_those_of_another_into_another(tmp_path: Path) -> None:
    first, content = results.open_or_begin(tmp_path, begun(crash={}))
    results.write(first, content)

    again, continued = results.open_or_begin(tmp_path, begun())
    other, empty = results.open_or_begin(tmp_path, begun() | {"dirty": True})

    assert again == first
    assert continued["measurements"].keys() == {"crash"}
    assert other != first
    assert empty["measurements"] == {}


@pytest.mark.parametrize("condition", [{"scale": "quick"}, {"cores": 2}])
def test_quick_results_and_those_of_fewer_cores_are_never_the_latest(condition: dict[str, Any], tmp_path: Path) -> None:
    path, content = results.open_or_begin(tmp_path, begun(crash={}) | condition)
    results.write(path, content)

    assert results.latest(tmp_path) is None


def test_the_latest_results_are_those_measured_last_whatever_their_names(tmp_path: Path) -> None:
    old, new = begun(crash={}), begun(crash={})
    new["measurements"]["crash"]["measured_at"] = "2026-10-02T12:00:00+00:00"
    results.write(tmp_path / "2026-10-01-ffffffffff.json", old)
    results.write(tmp_path / "2026-10-01-0000000000.json", new)

    assert results.latest(tmp_path) == tmp_path / "2026-10-01-0000000000.json"


# --- Verdict ---------------------------------------------------------------------------------------------------------


def spread(median: float) -> dict[str, float]:
    return {"median": median, "least": median, "most": median}


def full_load(*, cpu_us: float, per_s: float) -> dict[str, Any]:
    one = {"cpu_us": {"system": spread(cpu_us), "postgres": spread(20.0)}, "per_s": spread(per_s)}
    one["rows_per_s"] = spread(4 * per_s)
    return {"indexes": dict.fromkeys(("default", "brin", "none"), one), "reference": None, "to_reference": {}}


def side_by_side(**cpu_us: float) -> dict[str, Any]:
    return {
        "systems": {
            name.replace("_", "-"): {
                "cpu_us": {"system": spread(us), "postgres": spread(20.0)},
                "per_s": spread(1_000.0),
                "rows_per_message": 4,
                "guarantees": "some",
                "trials": [{"stored": 10, "messages": 10}],
            }
            for name, us in cpu_us.items()
        }
    }


def memory(first_mb: float, second_mb: float) -> dict[str, Any]:
    samples = [[at, first_mb if at < 50 else second_mb] for at in range(100)]
    held = {"marks": {"away": 0.0, "back": 100.0}, "samples": samples, "most_mb": {}}
    return {"outage_s": 100.0, "messages": 10, "stored": 10, "memory": held}


def latency(*, p50: float, p99: float, commit_p99: float) -> dict[str, Any]:
    return {"rates": {"1000": {"latency_ms": {"p50": p50, "p99": p99}, "commit_ms": {"p99": commit_p99}}}}


def processes(**points: Any) -> dict[str, Any]:
    one = {"at": 1, "outcome": {"per_s": 100.0}, "unevenness": 0.0}
    return {"curves": {"processes": [one, {"at": 2, "outcome": {"per_s": 150.0}, "unevenness": 0.05} | points]}}


def crash(**outcome: Any) -> dict[str, Any]:
    exact = {"stored": 10, "messages": 10, "distinct": 10, "rows": 40, "exact": True, "notes": {"redelivered": 3}}
    return {"kills": 3, "outcome": exact | outcome}


WELL = {
    "full_load": full_load(cpu_us=9.0, per_s=80_000.0),
    "side_by_side": side_by_side(mqtt_bridge=9.0, paho_copy=90.0, pooled_inserts=600.0, connection_per_payload=1e3),
    "latency": latency(p50=5.0, p99=12.0, commit_p99=5.0),
    "outage": memory(60.0, 62.0),
    "curves": processes(),
    "crash": crash(),
}
ILL = {
    "at most 10 us": {"full_load": full_load(cpu_us=10.1, per_s=80_000.0)},
    "at least 75,000": {"full_load": full_load(cpu_us=9.0, per_s=74_000.0)},
    "less CPU": {"side_by_side": side_by_side(mqtt_bridge=9.0, paho_copy=8.0)},
    "half of the rows": {"latency": latency(p50=11.0, p99=12.0, commit_p99=5.0)},
    "p99 is at most": {"latency": latency(p50=5.0, p99=16.0, commit_p99=5.0)},
    "memory is flat through an outage": {"outage": memory(60.0, 90.0)},
    "two processes share": {"curves": processes(unevenness=0.2)},
    "the total grows": {"curves": processes(outcome={"per_s": 90.0})},
    "every message is stored once": {"crash": crash(exact=False)},
}


def answers(found: results.Results) -> dict[str, str]:
    return {line["demand"]: line["answer"] for line in verdict.judge(found)}


def test_what_is_not_measured_is_open() -> None:
    assert set(answers(begun()).values()) == {"open"}


def test_good_figures_meet_every_demand_that_they_answer() -> None:
    found = answers(begun(**WELL))

    assert Counter(found.values())["missed"] == 1  # 200 times connection-per-payload at 1,000/s
    assert found.pop("at least 200 times the rate of connection-per-payload (the bridge on the feed)") == "missed"
    assert [demand for demand, answer in found.items() if answer == "open"] == ["memory is flat through a backlog"]


@pytest.mark.parametrize(("demand", "part"), ILL.items(), ids=list(ILL))
def test_a_figure_beyond_its_bound_is_missed(demand: str, part: dict[str, Any]) -> None:
    found = answers(begun(**(WELL | part)))

    missed = {name for name in found if demand in name and found[name] == "missed"}
    assert missed


def test_processes_that_the_program_refuses_leave_the_demand_open_with_the_reason() -> None:
    points = [{"at": 1, "outcome": {"per_s": 1.0}, "unevenness": 0.0}, {"at": 2, "skipped": "not in this version"}]

    found = begun(curves={"curves": {"processes": points}})
    lines = [line for line in verdict.judge(found) if "two processes" in line["demand"]]

    assert {(line["answer"], line["measured"]) for line in lines} == {("open", "not in this version")}


# --- Documents -------------------------------------------------------------------------------------------------------


def test_tables_are_of_the_file(tmp_path: Path) -> None:
    found = begun(full_load=full_load(cpu_us=7.36, per_s=81_234.0), side_by_side=WELL["side_by_side"], crash=crash())
    path = tmp_path / "2026-10-01-0123456789.json"
    results.write(path, found | {"verdict": verdict.judge(found)})

    text = "\n".join(report.how_fast(path) + report.everything(path))

    assert "81,200 (81,200 to 81,200)" in text
    assert "| 7.4 |" in text
    assert "commit 0123456789" in text
    assert "**mqtt-bridge**" in text
    assert "3 times `kill -9`" in text


def test_plots_are_drawn_of_what_was_measured_for_both_themes(tmp_path: Path) -> None:
    drawn = plots.draw(begun(side_by_side=WELL["side_by_side"]), "results.json", tmp_path / "plots")

    assert {path.name for path in drawn} == {
        f"{name}-{theme}.svg" for name in ("cpu", "throughput") for theme in ("light", "dark")
    }
    assert all("results.json" in path.read_text() for path in drawn)


def test_every_picture_that_is_shown_is_drawn(tmp_path: Path) -> None:
    found = begun(side_by_side=WELL["side_by_side"])
    path = tmp_path / "2026-10-01-0123456789.json"
    results.write(path, found)

    drawn = {picture.name for picture in plots.draw(found, path.name, tmp_path / "plots")}
    shown = set(re.findall(r"plots/([a-z-]+\.svg)", "\n".join(documents.content("results", path))))

    assert "throughput-dark.svg" in shown
    assert shown <= drawn


def test_plots_that_are_committed_are_of_the_latest_results() -> None:
    path = results.latest()
    drawn = sorted(plots.FOLDER.glob("*.svg"))
    shown = {name for name in plots.PLOTS if any(name in line for line in documents.content("results"))}

    if path is None:
        assert not drawn
    else:
        assert {picture.name.rpartition("-")[0] for picture in drawn} >= shown
        assert [picture.name for picture in drawn if path.name not in picture.read_text()] == []


def test_a_block_is_replaced_and_the_rest_stays() -> None:
    text = "before\n<!-- generated: how-fast -->\nold\n<!-- end -->\nafter\n"

    assert documents.with_block(text, "how-fast", ["new"]) == text.replace("old", "new")


# --- The rest --------------------------------------------------------------------------------------------------------


def test_the_summary_of_a_profile_adds_up_functions_by_thread() -> None:
    stacks = (
        "process 1;thread (0x1): network;loop (a.py:1);read (b.py:7) 30\n"
        "process 1;thread (0x1): network;loop (a.py:1);read (b.py:9) 20\n"
        "process 1;thread (0x1): network;write (b.py:1) 5\n"
        "process 1;thread (0x2): worker;copy (c.py:3) 10\n"
        "process 1;thread (0x2): worker;decode (d.py:3) 10\n"
        "process 1;thread (0x3): tender;wait (threading.py:3) 90\n"
    )

    text = profile.summary(stacks, 100)

    assert "network: busy in 55.0% of the samples\n   50.0%  read (b.py)" in text
    assert "worker: busy in 20.0% of the samples\n   10.0%  copy (c.py)" in text
    assert "so waiting: tender" in text
    assert "wait (threading.py)" not in text


def test_every_system_says_what_it_is_and_its_name_is_its_own() -> None:
    found = all_contestants()

    assert next(iter(found)) == "mqtt-bridge"
    assert all(system.name == name and system.title and system.guarantees for name, system in found.items())


def test_the_commit_is_known_in_a_checkout() -> None:
    if not (machine.ROOT / ".git").exists():
        pytest.skip("not a checkout")

    head, _ = machine.commit()

    assert len(head) == 10
