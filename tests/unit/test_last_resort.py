"""The end of a process in which nothing of Python runs any more; in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys

BACKTRACKS_FOR_EVER = 're.match("(a+)+$", "a" * 64 + "b")'


def run(*lines):
    """A program that has 0.2 s of processor time for what it does."""
    program = "\n".join(
        [
            "import re, signal, time",
            "from mqtt_bridge.last_resort import OwnProcess",
            "process = OwnProcess(held_s=0.2)",
            *lines,
        ]
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)


def test_code_that_never_gives_the_interpreter_back_ends_the_process_with_its_stack():
    ended = run(
        "def decode():",
        f"    {BACKTRACKS_FOR_EVER}",
        "process.postpone()",
        "decode()",
    )

    assert ended.returncode == signal.SIGPROF
    assert b"in decode" in ended.stderr


def test_a_process_that_waits_or_is_suspended_is_left_alone():
    ended = run("process.postpone()", "time.sleep(1)", "print('alive')")

    assert (ended.returncode, ended.stdout.strip()) == (0, b"alive")


def test_a_process_whose_watchdog_comes_by_may_work_for_as_long_as_it_likes():
    ended = run(
        "end_s = time.process_time() + 1",
        "while time.process_time() < end_s:",
        "    process.postpone()",
        "print('alive')",
    )

    assert (ended.returncode, ended.stdout.strip()) == (0, b"alive")


def test_who_has_stood_down_is_left_alone():
    ended = run(
        "process.postpone()",
        "process.stand_down()",
        "end_s = time.process_time() + 1",
        "while time.process_time() < end_s: pass",
        "print('alive')",
    )

    assert (ended.returncode, ended.stdout.strip()) == (0, b"alive")


def test_the_end_is_at_once_with_the_code_that_was_asked_for():
    ended = run("process.end(7)", "print('alive')")

    assert (ended.returncode, ended.stdout) == (7, b"")
