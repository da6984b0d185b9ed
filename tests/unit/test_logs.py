"""Logs: one form for structlog and the standard library, for people and for machines."""

from __future__ import annotations

import io
import json
import logging
import sys
from datetime import datetime, timedelta

import pytest
import structlog

from mqtt_bridge import logs


@pytest.fixture(autouse=True)
def _leave_logging_as_it_was():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers = []
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def written():
    return io.StringIO()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_json_line_is_one_object_with_time_level_event_and_fields_in_that_order(written):
    logs.configure("info", "json", stream=written)

    structlog.get_logger("mqtt_bridge.sink").info("Stored a batch.", rows=3, table="readings")

    [line] = written.getvalue().splitlines()
    entry = json.loads(line)
    assert list(entry)[:3] == ["time", "level", "event"]
    assert entry["level"] == "info"
    assert entry["event"] == "Stored a batch."
    assert entry["logger"] == "mqtt_bridge.sink"
    assert (entry["rows"], entry["table"]) == (3, "readings")


def test_a_json_line_tells_the_time_as_rfc_3339_in_utc(written):
    logs.configure("info", "json", stream=written)

    structlog.get_logger().info("Now.")

    time = json.loads(written.getvalue())["time"]
    assert time.endswith("Z")
    assert datetime.fromisoformat(time).utcoffset() == timedelta(0)


def test_an_exception_is_a_text_field_of_its_json_line(written):
    logs.configure("info", "json", stream=written)

    try:
        raise ValueError("bad payload")
    except ValueError:
        structlog.get_logger().exception("It failed.")

    [line] = written.getvalue().splitlines()
    assert json.loads(line)["exception"].endswith("ValueError: bad payload")


@pytest.mark.parametrize("value", [10**30, b"\xff", "a\udcff", object(), float("nan"), {1: 2}])
def test_a_field_that_json_cannot_hold_does_not_lose_the_line(written, value):
    logs.configure("info", "json", stream=written)

    structlog.get_logger().info("Odd.", value=value)

    assert json.loads(written.getvalue())["event"] == "Odd."


@pytest.mark.parametrize("form", ["console", "json"])
def test_the_standard_library_logs_through_the_same_renderer(written, form):
    logs.configure("info", form, stream=written)

    structlog.get_logger().warning("A warning.")
    logging.getLogger("paho").warning("A %s.", "warning")

    ours, theirs = (_without_time(line, form) for line in written.getvalue().splitlines())
    assert ours == theirs


@pytest.mark.parametrize("form", ["console", "json"])
def test_what_is_less_important_than_the_level_is_not_logged(written, form):
    logs.configure("warning", form, stream=written)

    structlog.get_logger().info("Not this.")
    logging.getLogger("waitress").info("Nor this.")
    structlog.get_logger().warning("But this.")

    assert written.getvalue().count("\n") == 1
    assert "But this." in written.getvalue()


def test_a_console_line_is_time_level_sentence_and_fields_as_given(written):
    logs.configure("info", "console", stream=written)

    structlog.get_logger("mqtt_bridge.sink").info("Stored a batch.", rows=3, because="it was full")

    time, rest = written.getvalue().split(" ", 1)
    assert datetime.fromisoformat(time)
    assert rest == "[info     ] Stored a batch. rows=3 because='it was full'\n"


def test_a_console_shows_the_traceback_below_the_line_without_local_variables(written):
    logs.configure("info", "console", stream=written)
    password = "hunter2-" * 2

    try:
        raise ValueError("bad payload")
    except ValueError:
        structlog.get_logger().exception("It failed.")

    assert written.getvalue().endswith("ValueError: bad payload\n")
    assert password not in written.getvalue()


def test_colours_are_for_terminals_only(written):
    terminal = Terminal()

    for stream in (written, terminal):
        logs.configure("info", "console", stream=stream)
        structlog.get_logger().info("Hello.")

    assert "\x1b[" not in written.getvalue()
    assert "\x1b[" in terminal.getvalue()


def test_a_control_sequence_in_a_field_does_not_reach_the_terminal(written):
    logs.configure("info", "console", stream=written)

    structlog.get_logger().info("A topic.", topic="a/\x1b[2Jb")

    assert "\x1b" not in written.getvalue()
    assert r"topic=a/\x1b[2Jb" in written.getvalue()


def test_configuring_again_replaces_what_was_set(written):
    logs.configure("info", "console", stream=io.StringIO())
    logs.configure("info", "json", stream=written)

    structlog.get_logger().info("Once.")
    logging.getLogger("paho").info("Twice.")

    assert [json.loads(line)["event"] for line in written.getvalue().splitlines()] == ["Once.", "Twice."]


def test_logs_go_to_stderr_and_leave_stdout_to_results(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    logs.configure("info", "console")
    structlog.get_logger().info("Hello.")

    assert out.getvalue() == ""
    assert "Hello." in err.getvalue()


def _without_time(line, form):
    if form == "console":
        return line.split(" ", 1)[1]
    return {name: value for name, value in json.loads(line).items() if name not in ("time", "logger")}


@pytest.mark.parametrize("format", ["json", "console"])
def test_every_line_of_one_of_several_processes_tells_its_client_id(written, format):
    logs.configure("info", format, client_id="hall-2", stream=written)

    structlog.get_logger().info("Now.")
    logging.getLogger("paho").warning("From elsewhere.")
    structlog.get_logger().info("Of another.", client_id="hall")

    lines = written.getvalue().splitlines()
    if format == "json":
        assert [json.loads(line)["client_id"] for line in lines] == ["hall-2", "hall-2", "hall"]
    else:
        assert [line.partition("client_id=")[2] for line in lines] == ["hall-2", "hall-2", "hall"]
