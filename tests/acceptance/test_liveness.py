"""The program falls ill: it says so, turns red, mends itself or ends, and after a restart everything is stored once."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import psycopg2.extensions
import pytest

from mqtt_bridge.tools.embedded import free_port
from tests.acceptance import ill_bridge
from tests.acceptance.traffic import Publisher, wait_until_stored
from tests.program import Program, command_line
from tests.proxy import TcpProxy
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
READINGS = 60


@pytest.fixture
def ill(tmp_path, database, broker, site):
    """Makes a bridge with an illness (see `ill_bridge`)."""
    settings = {
        "DATABASE_URL": database,
        "MQTT_HOST": broker.host,
        "MQTT_PORT": broker.port,
        "MQTT_TOPICS": f"{site}/{{device}}/telemetry",
        "MQTT_CLIENT_ID": f"ill-{site}",
        "HTTP_PORT": free_port(),
        "PYTHONPATH": ROOT,
        "BRIDGE_WORKERS": 2,
        "BRIDGE_BATCH_SIZE": 10,
        "BRIDGE_SHUTDOWN_S": 2,
        "DB_STATEMENT_TIMEOUT_S": 1,
    }
    with Program(tmp_path, **settings) as program:

        def make(illness, **changes):
            program.settings |= changes
            program.command = [
                *(sys.executable, "-W", "always", "-m", "tests.acceptance.ill_bridge"),
                *(illness.__name__, "run"),
            ]
            return program.start().wait_until_ready()

        yield make


def reasons(program):
    """What makes /healthz red; empty while it is green, None where nobody answers."""
    try:
        code, body = program.get("/healthz")
    except ConnectionError:
        return None
    answer = json.loads(body)
    assert (code, answer["healthy"]) in ((200, True), (503, False))
    return answer["reasons"]


def heal(program):
    program.command = command_line("run")
    return program.start().wait_until_ready()


def publish(broker, site):
    with Publisher(broker, site) as publisher:
        publisher.publish(READINGS)
        publisher.settle()
    return publisher.published


@pytest.mark.parametrize(
    ("illness", "reason", "in_the_stacks"),
    [
        (
            ill_bridge.the_decoder_loops,
            "a worker hangs with a batch in hand although the database answers",
            "_loop_for_ever",
        ),
        (ill_bridge.the_network_thread_hangs, "the network thread hangs", "_hang"),
        (
            ill_bridge.connecting_hangs,
            "the network thread does not come back from connecting to the broker",
            "open_once",
        ),
        (ill_bridge.the_queue_is_forgotten, "messages wait although a worker is free", "_take"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_hangs_is_told_with_its_stack_turns_red_and_ends_the_program(
    ill, illness, reason, in_the_stacks, broker, database, site
):
    program = ill(illness)

    published = publish(broker, site)

    wait_until(lambda: reason in (reasons(program) or []), timeout_s=40, what=f"{reason!r} in /healthz")
    told = program.wait_for_log("the bridge is stuck")
    assert reason in program.log.partition(told)[2] or reason in told
    assert in_the_stacks in program.log.partition(told)[2]
    assert program.wait() == 1
    assert "the bridge cannot go on" in program.log
    heal(program)
    assert wait_until_stored(database, published, program).exact


@pytest.mark.parametrize(
    ("illness", "sign"),
    [
        (ill_bridge.the_worker_dies, "a worker has died; its batch stays unacknowledged"),
        (ill_bridge.the_network_thread_dies, "the network thread is dead"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_thread_that_dies_ends_the_program_at_once(ill, illness, sign, broker, database, site):
    program = ill(illness)

    published = publish(broker, site)

    assert program.wait() == 1
    assert sign in program.log
    heal(program)
    assert wait_until_stored(database, published, program).exact


def test_a_disk_that_may_hold_a_batch_is_asked_for_again(ill, broker, database, site, tmp_path):
    """Without it the batch, which was not acknowledged, would be stored twice: now, and when the disk comes back."""
    spool = {"BRIDGE_SPOOL": "always", "BRIDGE_SPOOL_DIR": tmp_path / "spool"}
    program = ill(ill_bridge.a_batch_may_be_on_the_disk, **spool, BRIDGE_WORKERS=1, BRIDGE_BATCH_WAIT_MS=1000)

    with Publisher(broker, site) as publisher:
        publisher.publish(20)
        wait_until_stored(database, publisher.published, program)
        wait_until(lambda: program.status()["spool"]["messages"] == 0, what="an empty spool")
        publisher.publish(10)  # one batch
        publisher.settle()

    assert program.wait() == 1
    assert "the disk has failed" in program.log
    program.command = command_line("run")
    disk = program.settings.pop("BRIDGE_SPOOL_DIR")
    program.settings["BRIDGE_SPOOL"] = "off"
    assert program.start().wait() == 2
    assert "--abandon-spool" in program.log
    program.settings["BRIDGE_SPOOL_DIR"] = disk
    heal(program)
    assert wait_until_stored(database, publisher.published, program).exact


def test_a_decoder_that_holds_the_interpreter_ends_the_program_with_its_stack(ill, broker, database, site):
    program = ill(ill_bridge.the_interpreter_is_held)

    published = publish(broker, site)

    assert program.wait() == signal.SIGPROF
    assert "_backtrack_for_ever" in program.log
    heal(program)
    assert wait_until_stored(database, published, program).exact


def test_a_lock_that_is_never_given_back_does_not_keep_the_program_from_ending(ill, broker, database, site):
    program = ill(ill_bridge.a_worker_hangs_with_the_lock)

    published = publish(broker, site)

    wait_until(lambda: reasons(program), timeout_s=40, what="/healthz to be red, which needs no lock")
    assert program.wait() == 1
    assert "the bridge does not come to its end" in program.log
    heal(program)
    assert wait_until_stored(database, published, program).exact


def test_a_lost_acknowledgement_is_told_and_mended_by_a_new_connection(ill, broker, database, site):
    program = ill(ill_bridge.an_acknowledgement_is_lost)

    published = publish(broker, site)

    wait_until(lambda: program.messages()["stored"] == READINGS, what="all readings")
    program.wait_for_log("the oldest message is not acknowledged although nobody has it in hand")
    program.wait_for_log("what was stuck gets on again")
    wait_until(lambda: reasons(program) == [], what="/healthz to be green again")
    assert "mqtt-bridge-network" in program.log, "the stacks"
    assert program.status()["broker"]["reconnects"] == 1
    # What was not acknowledged came again, and was recognised.
    wait_until(lambda: program.messages()["duplicate"] > 0, what="the redelivery")
    assert program.stop() == 0
    assert "the broker has not confirmed the last acknowledgements" not in program.log
    assert wait_until_stored(database, published).exact


def test_workers_are_freed_from_a_silent_database_long_before_their_statements_time_is_over(
    ill, broker, database, site
):
    port = int(psycopg2.extensions.parse_dsn(database)["port"])
    with TcpProxy("127.0.0.1", port) as link:
        through_the_link = database.replace(f":{port}/", f":{link.port}/")
        program = ill(ill_bridge.none_at_all, DATABASE_URL=through_the_link, DB_STATEMENT_TIMEOUT_S=600)
        link.stall()

        published = publish(broker, site)

        wait_until(lambda: retries(program), timeout_s=30, what="a worker to try again")
        assert reasons(program) == []
        link.resume()
        assert wait_until_stored(database, published, program).exact
        assert program.stop() == 0


def retries(program):
    """How many tries of a batch have failed: probes do not count."""
    [count] = re.findall(r"^mqtt_bridge_batch_retries_total (\S+)", program.get("/metrics")[1].decode(), re.MULTILINE)
    return float(count)
