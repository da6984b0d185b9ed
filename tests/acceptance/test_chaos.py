"""Under kills, crashes, cuts and restarts all at once, every message is stored exactly once; and were it not so, the
test would show it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.program import environment

ROOT = Path(__file__).resolve().parents[2]


def chaos(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and result of a run."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.chaos", *arguments, "--json"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=160,
        check=False,
    )
    print(ended.stderr, ended.stdout)
    return ended.returncode, json.loads(ended.stdout)


@pytest.mark.parametrize("receive", ["fast", "stock"])
def test_under_kills_crashes_cuts_and_restarts_every_message_is_stored_exactly_once(receive):
    code, result = chaos("--quick", "--receive", receive)

    assert (result["published"], result["repeated_by_publisher"]) == (4000, 0)
    assert result["comparison"]["stored"] == 4000
    assert [result["comparison"][name] for name in ("lost", "duplicated", "different")] == [0, 0, 0]
    assert result["missed"] == {}
    assert result["recognised"] > 0
    assert result["left_at_broker"] == 0
    assert result["problems"] == []
    assert code == 0


def test_while_the_database_is_away_nothing_is_lost_not_even_by_a_kill_in_the_midst_of_it():
    code, result = chaos("--quick", "--outage", "6", "--broker-restarts", "0")

    assert result["faults"]["outage"] == 1
    assert result["comparison"]["stored"] == 4000
    assert result["drained"]["messages"] > 6 * 400 / 2
    assert result["problems"] == []
    assert code == 0


def test_on_two_processes_of_which_any_is_killed_and_their_supervisor_too_every_message_is_stored_exactly_once():
    code, result = chaos("--quick", "--processes", "2", "--kills", "5")

    assert result["faults"]["kill"] == 5
    assert result["comparison"]["stored"] == 4000
    assert [result["comparison"][name] for name in ("lost", "duplicated", "different")] == [0, 0, 0]
    assert result["recognised"] > 0
    assert result["left_at_broker"] == 0
    assert result["problems"] == []
    assert code == 0


def test_without_the_ledger_the_same_faults_bring_duplicates_and_lose_nothing():
    code, result = chaos("--quick", "--messages", "2000", "--without-ledger")

    assert result["comparison"]["duplicated"] > 0
    assert result["comparison"]["lost"] == 0
    assert result["recognised"] == 0
    assert result["problems"] == ["messages are stored twice"]
    assert code == 1


def test_with_a_spool_for_outages_nothing_is_lost_or_stored_twice_when_the_bridge_is_killed_while_it_spools():
    # A full queue begins to spool at once, a roomy one after ten seconds.
    code, result = chaos("--quick", "--spool", "outage", "--full-queue", "--outage", "6", "--broker-restarts", "0")

    assert result["faults"]["outage"] == 1
    assert result["spool_messages"] > 0
    assert result["comparison"]["stored"] == 4000
    assert result["problems"] == []
    assert code == 0


def test_with_everything_spooled_kills_and_crashes_of_the_database_lose_nothing_and_store_nothing_twice():
    code, result = chaos("--quick", "--spool", "always", "--outage", "4")

    assert result["spool_messages"] > 0
    assert result["comparison"]["stored"] == 4000
    assert result["problems"] == []
    assert code == 0
