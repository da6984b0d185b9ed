"""The benchmarks themselves, in sizes that say nothing about speed: that all of them run, and count rightly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measurements import MEASUREMENTS
from benchmarks.scale import TINY

ROOT = Path(__file__).parents[2]


def benchmarks(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    benchmarks("--tiny", "--contestant", "mqtt-bridge", "--out", str(folder))
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    content = json.loads(path.read_text())
    return {name: part["figures"] for name, part in content["measurements"].items()} | {"verdict": content["verdict"]}


pytestmark = pytest.mark.timeout(600)


def test_everything_is_measured_and_judged(measured: dict[str, Any]) -> None:
    assert measured.keys() == MEASUREMENTS.keys() | {"verdict"}
    assert {line["answer"] for line in measured["verdict"]} <= {"met", "missed", "open"}


def test_what_the_database_holds_is_what_was_sent(measured: dict[str, Any]) -> None:
    full = measured["full-load"]["indexes"]

    assert [full[index]["exact"] for index in ("default", "brin", "none")] == [True, True, True]
    assert full["default"]["trials"][0]["rows"] == 4 * TINY.feed_messages
    assert measured["mosquitto"]["exact"]
    assert measured["side-by-side"]["systems"]["mqtt-bridge"]["exact"]
    assert measured["backlog"]["stored"] == TINY.backlog_messages
    assert measured["outage"]["stored"] == measured["outage"]["messages"]
    assert all(at["exact"] for at in measured["latency"]["rates"].values())


def test_killed_in_the_middle_of_a_full_load_every_message_is_stored_once(measured: dict[str, Any]) -> None:
    outcome = measured["crash"]["outcome"]

    assert outcome["exact"]
    assert outcome["rows"] == 4 * outcome["distinct"] == 4 * TINY.feed_messages


def test_every_point_of_the_curves_is_exact_or_says_why_it_is_not_there(measured: dict[str, Any]) -> None:
    points = [point for curve in measured["curves"]["curves"].values() for point in curve]

    assert [point for point in points if not (point.get("skipped") or point["outcome"]["exact"])] == []


def test_a_part_that_is_measured_again_replaces_its_own_and_leaves_the_others(folder: Path) -> None:
    (path,) = folder.glob("*.json")
    before = json.loads(path.read_text())["measurements"]

    benchmarks("--tiny", "--only", "crash", "--out", str(folder))

    after = json.loads(path.read_text())["measurements"]
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"crash"}


def test_the_report_has_a_table_and_plots_for_all_of_it(folder: Path, tmp_path: Path) -> None:
    (path,) = folder.glob("*.json")

    benchmarks("report", "--results", str(path), "--out", str(tmp_path))

    text = (tmp_path / "RESULTS.md").read_text()
    assert "## Side by side" in text
    assert "## Memory" in text
    pictures = {picture.name for picture in (tmp_path / "plots").glob("*.svg")}
    assert {name for name in pictures if name.endswith("-dark.svg")} >= {
        "cpu-dark.svg",
        "throughput-dark.svg",
        "latency-dark.svg",
        "memory-dark.svg",
    }


def test_help_has_examples_and_the_list_names_everything() -> None:
    shown, listed = benchmarks("--help"), benchmarks("--list")

    assert "Examples:" in shown
    assert all(name in listed for name in MEASUREMENTS)
