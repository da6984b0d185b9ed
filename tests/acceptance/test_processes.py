"""Several processes of one bridge, as a program: they share the load, and none is missed when it dies."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.traffic import Publisher, compare, query, wait_until_stored
from tests.program import Program, run_command
from tests.waiting import wait_until


def processes(program: Program) -> list[dict[str, Any]]:
    """What the status says of each process."""
    return program.status()["processes"]


def pids(program: Program) -> dict[str, int]:
    return {process["client_id"]: process["pid"] for process in processes(program)}


def exists(pid: int) -> bool:
    """Whether there is such a process; a zombie is none: its parent only has not asked yet."""
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
    return False


def owners(database: str) -> set[str]:
    return {client_id for (client_id,) in query(database, "SELECT client_id FROM mqtt_bridge.owners")}


@pytest.fixture
def make_several(make_bridge):
    """Makes a bridge of two processes, or more; nothing of it is left when the test ends."""

    def make(database, broker, **settings):
        return make_bridge(database, broker, **({"MQTT_CLIENT_ID": "hall", "BRIDGE_PROCESSES": 2} | settings))

    return make


def test_two_processes_share_a_load_evenly_and_the_status_shows_the_sum_and_each_apart(
    make_several, database, own_broker, site, tmp_path
):
    broker = own_broker()
    program = make_several(database, broker).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.publish(5000)
        publisher.settle()
        assert wait_until_stored(database, publisher.published, program).exact

    status = program.status()
    stored = [process["messages"]["stored"] for process in status["processes"]]
    assert sum(stored) == status["messages"]["stored"] == status["messages"]["received"] == 5000
    assert min(stored) >= 0.9 * 2500
    assert [process["client_id"] for process in status["processes"]] == ["hall-1", "hall-2"]
    assert [process["broker"]["client_id"] for process in status["processes"]] == ["hall-1", "hall-2"]
    assert status["broker"]["client_id"] == "hall"
    assert status["state"] == "running"
    shown = run_command(tmp_path, "status", **program.settings).stdout
    assert "client id hall: running" in shown
    assert [line.split()[0] for line in shown.splitlines()[-3:]] == ["process", "hall-1", "hall-2"]
    children = pids(program)
    assert program.stop() == 0
    assert not any(exists(pid) for pid in children.values())
    assert owners(database) == {"hall-1", "hall-2"}


def test_either_process_that_is_killed_under_load_comes_back_and_nothing_is_lost_or_stored_twice(
    make_several, database, own_broker, site
):
    broker = own_broker()
    program = make_several(database, broker).start().wait_until_ready()
    before = pids(program)

    with Publisher(broker, site) as publisher:
        publisher.begin(per_s=1000)
        for client_id in ("hall-1", "hall-2"):
            publisher.go_on(1000)
            os.kill(before[client_id], signal.SIGKILL)
            wait_until(
                lambda: pids(program)[client_id] not in (None, before[client_id]),  # noqa: B023
                what=f"{client_id} to come back",
            )
        program.wait_until_ready()
        publisher.go_on(500)
        publisher.end()
        comparison = wait_until_stored(database, publisher.published, program)

    assert comparison.exact
    assert [process["restarts"] for process in processes(program)] == [1, 1]
    assert program.healthz() == 200
    warning = "a process of the bridge has ended and is started again"
    assert [line.count("signal=SIGKILL") for line in program.log.splitlines() if warning in line] == [1, 1]
    assert program.stop() == 0


def test_when_the_supervisor_is_killed_no_process_is_left_behind_and_the_next_start_goes_on_exactly(
    make_several, database, own_broker, site
):
    broker = own_broker()
    program = make_several(database, broker).start().wait_until_ready()
    orphans = pids(program)

    with Publisher(broker, site) as publisher:
        publisher.begin(per_s=1000)
        publisher.go_on(1000)
        program.kill()
        wait_until(lambda: not any(map(exists, orphans.values())), timeout_s=40, what="the processes to end")
        program.start().wait_until_ready()
        publisher.go_on(500)
        publisher.end()
        comparison = wait_until_stored(database, publisher.published, program)

    assert comparison.exact
    assert program.stop() == 0


def test_a_supervisor_that_is_started_at_once_after_a_kill_waits_for_nobody_and_stores_exactly(
    make_several, database, own_broker, site
):
    broker = own_broker()
    program = make_several(database, broker).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.begin(per_s=1000)
        for _ in range(3):
            publisher.go_on(500)
            program.kill()
            program.start().wait_until_ready()
        publisher.end()
        comparison = wait_until_stored(database, publisher.published, program)

    assert comparison.exact
    assert program.stop() == 0


def test_told_to_stop_under_load_all_processes_leave_in_order_with_0(make_several, database, own_broker, site):
    broker = own_broker()
    program = make_several(database, broker, LOG_FORMAT="json").start().wait_until_ready()
    children = pids(program)

    with Publisher(broker, site) as publisher:
        publisher.begin(per_s=1000)
        publisher.go_on(1000)
        # As systemd does it: everybody is told, the supervisor too, which tells them once more.
        for pid in (*children.values(), program.pid):
            os.kill(pid, signal.SIGTERM)
        code = program.wait()
        publisher.end()

    assert code == 0
    assert not any(map(exists, children.values()))
    lines = [json.loads(line) for line in program.log.splitlines()]
    stopped = [line.get("client_id") for line in lines if line["event"] == "stopped"]
    assert sorted(stopped, key=str) == [None, "hall-1", "hall-2"]
    program.start().wait_until_ready()
    assert wait_until_stored(database, publisher.published, program).exact
    assert [process["messages"]["duplicate"] for process in processes(program)] == [0, 0]


def test_a_second_signal_ends_everything_at_once(make_several, own_postgres, own_broker):
    postgres = own_postgres()
    program = make_several(postgres.create_database("test"), own_broker(), BRIDGE_SHUTDOWN_S=3600)
    program.start().wait_until_ready()
    children = pids(program)
    os.kill(children["hall-2"], signal.SIGSTOP)  # it will not hear that it should stop
    program.terminate()
    wait_until(lambda: not exists(children["hall-1"]), what="the other one to stop")
    assert program.running

    program.terminate()

    assert program.wait() == 1
    wait_until(lambda: not exists(children["hall-2"]), what="it to be gone")


def test_a_process_that_does_not_answer_is_shown_as_such_and_the_page_is_there_all_the_same(
    make_several, database, own_broker
):
    program = make_several(database, own_broker()).start().wait_until_ready()
    silent = pids(program)["hall-2"]
    os.kill(silent, signal.SIGSTOP)

    status = program.status()

    assert status["state"] == "starting"
    assert status["reasons"] == ["hall-2: its process does not answer"]
    assert [process["state"] for process in status["processes"]] == ["running", None]
    assert program.readyz() == (503, ["hall-2: its process does not answer"])
    assert program.healthz() == 200  # it may yet come back
    assert b'mqtt_bridge_process_up{process="hall-2"} 0.0' in program.get("/metrics")[1]
    os.kill(silent, signal.SIGCONT)
    program.wait_until_ready()
    assert program.stop() == 0


def test_the_metrics_of_each_process_have_its_name_and_sum_up(make_several, database, own_broker, site):
    broker = own_broker()
    program = make_several(database, broker).start().wait_until_ready()
    with Publisher(broker, site) as publisher:
        publisher.publish(1000)
        publisher.settle()
        wait_until_stored(database, publisher.published, program)

    body = program.get("/metrics")[1].decode()

    samples = dict(line.rsplit(" ", 1) for line in body.splitlines() if not line.startswith("#"))
    received = [float(samples[f'mqtt_bridge_messages_received_total{{process="hall-{i}"}}']) for i in (1, 2)]
    stored = [float(samples[f'mqtt_bridge_messages_total{{outcome="stored",process="hall-{i}"}}']) for i in (1, 2)]
    assert sum(received) == sum(stored) == 1000
    for name in ("hall-1", "hall-2", "supervisor"):
        assert float(samples[f'process_resident_memory_bytes{{process="{name}"}}']) > 0
    assert samples['mqtt_bridge_process_up{process="hall-1"}'] == "1.0"
    assert samples['mqtt_bridge_process_restarts_total{process="hall-2"}'] == "0.0"


def test_wrong_settings_of_a_process_end_all_with_2(make_several, database, own_broker, tmp_path):
    (tmp_path / "no-directory").write_text("")
    spool = {"BRIDGE_SPOOL": "outage", "BRIDGE_SPOOL_DIR": tmp_path / "no-directory"}

    program = make_several(database, own_broker(), **spool).start()

    assert program.wait() == 2
    assert "BRIDGE_SPOOL_DIR" in program.log


def test_when_another_bridge_takes_the_client_ids_over_all_leave_with_3(make_several, database, own_broker):
    broker = own_broker()
    older = make_several(database, broker).start().wait_until_ready()
    children = pids(older)

    newer = make_several(database, broker).start()

    assert older.wait() == 3
    assert not any(map(exists, children.values()))
    newer.wait_until_ready()
    assert newer.stop() == 0


def test_the_processes_have_the_settings_that_the_bridge_was_started_with(make_several, database, own_broker, tmp_path):
    program = make_several(database, own_broker(), MQTT_CLIENT_ID="")
    del program.settings["MQTT_CLIENT_ID"], program.settings["DATABASE_URL"]
    secret = tmp_path / "url"
    secret.write_text(database)
    env_file = tmp_path / "bridge-0" / ".env"
    env_file.write_text(f"MQTT_CLIENT_ID=cellar\nDATABASE_URL_FILE={secret}\nBRIDGE_WORKERS=3\nHTTP_TOKEN=s3cret\n")
    program.settings["HTTP_TOKEN"] = ""
    program.start().wait_until_ready()
    env_file.write_text("MQTT_CLIENT_ID=attic\nHTTP_PORT=1\nMQTT_USERNAME=alice\nBRIDGE_WORKERS=1\n")

    os.kill(pids(program)["cellar-1"], signal.SIGKILL)
    program.wait_for_log("is started again")
    program.wait_until_ready()

    status = program.status()
    assert status["broker"]["client_id"] == "cellar"
    assert [process["broker"]["client_id"] for process in status["processes"]] == ["cellar-1", "cellar-2"]
    assert [process["database"]["pool_size"] for process in status["processes"]] == [5, 5]
    for pid in pids(program).values():
        assert database.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert program.stop() == 0


# --- More and fewer processes


def wait_until_only(database: str, *client_ids: str) -> None:
    wait_until(lambda: owners(database) == set(client_ids), timeout_s=90, what=f"only {client_ids} to be left")


def test_from_3_processes_to_1_to_2_under_load_loses_and_doubles_nothing_in_one_group(
    make_several, database, own_broker, site
):
    broker = own_broker()
    program = make_several(database, broker, BRIDGE_PROCESSES=3, MQTT_SHARED_GROUP="hall", MQTT_CLIENT_ID="hall")
    program.start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.begin(per_s=500)
        for count, expected in ((1, ["hall"]), (2, ["hall-1", "hall-2"])):
            publisher.go_on(500)
            assert program.stop() == 0
            publisher.go_on(500)  # the sessions of those that leave get their share
            program.settings["BRIDGE_PROCESSES"] = count
            program.start().wait_until_ready()
            wait_until_only(database, *expected)
        publisher.end()
        comparison = wait_until_stored(database, publisher.published, program)

    assert comparison.exact
    retired = "a client id is retired"
    wait_until(lambda: program.log_of_all_runs.count(retired) == 4, what="the last of the four to be reported")
    assert program.stop() == 0


def test_from_3_processes_to_1_to_2_what_waits_for_those_that_leave_is_stored_once(
    make_several, database, own_broker, site
):
    broker = own_broker()
    program = make_several(database, broker, BRIDGE_PROCESSES=3).start().wait_until_ready()
    bystander = make_several(database, broker, MQTT_CLIENT_ID="hall-4", BRIDGE_PROCESSES=1, MQTT_TOPICS="none")
    bystander.start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        for count, expected in ((1, ["hall"]), (2, ["hall-1", "hall-2"])):
            program.stop()
            publisher.publish(900)
            publisher.settle()
            program.settings["BRIDGE_PROCESSES"] = count
            program.start().wait_until_ready()
            wait_until_only(database, "hall-4", *expected)
        comparison = wait_until_stored(database, publisher.published, program)

    assert comparison.exact
    assert bystander.running
    assert program.stop() == bystander.stop() == 0


def test_from_1_process_to_2_and_back_under_load_without_a_group_loses_nothing(
    make_several, database, own_broker, site
):
    broker = own_broker()
    program = make_several(database, broker, BRIDGE_PROCESSES=1).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.begin(per_s=500)
        for count, expected in ((2, ["hall-1", "hall-2"]), (1, ["hall"])):
            publisher.go_on(500)
            assert program.stop() == 0
            program.settings["BRIDGE_PROCESSES"] = count
            program.start().wait_until_ready()
            wait_until_only(database, *expected)
        publisher.end()
        wait_until(lambda: not compare(database, publisher.published).missing, timeout_s=60, what="the last of them")

    # What was published while both had subscribed is there twice: docs/guarantees.md.
    assert compare(database, publisher.published).unknown == []
    assert program.stop() == 0


def test_a_start_that_is_killed_while_it_retires_is_gone_on_with_by_the_next(make_several, database, own_broker, site):
    broker = own_broker()
    program = make_several(database, broker, BRIDGE_PROCESSES=4).start().wait_until_ready()
    with Publisher(broker, site) as publisher:
        program.stop()
        publisher.publish(1000)
        publisher.settle()
        program.settings["BRIDGE_PROCESSES"] = 2
        for _ in range(3):
            program.start().wait_for_log("a client id is not needed any more")
            program.kill()
        program.start().wait_until_ready()
        wait_until_only(database, "hall-1", "hall-2")
        comparison = wait_until_stored(database, publisher.published, program)

    assert comparison.exact
    assert program.stop() == 0


def test_what_a_process_that_leaves_has_on_its_disk_is_stored_before_it_is_forgotten(
    make_several, own_postgres, own_broker, site, tmp_path
):
    postgres, broker = own_postgres(), own_broker()
    database = postgres.create_database("test")
    spool = {"BRIDGE_SPOOL": "always", "BRIDGE_SPOOL_DIR": tmp_path / "spool"}
    program = make_several(database, broker, BRIDGE_PROCESSES=3, **spool).start().wait_until_ready()
    children = pids(program)
    with Publisher(broker, site) as publisher:
        postgres.stop("immediate")
        publisher.publish(900)
        publisher.settle()
        wait_until(lambda: program.status()["spool"]["messages"] == 900, what="everything to be on the disks")
        program.kill()
        wait_until(lambda: not any(map(exists, children.values())), timeout_s=60, what="the processes to end")
        postgres.start()
        program.settings["BRIDGE_PROCESSES"] = 1
        program.start().wait_until_ready()
        wait_until_only(database, "hall")
        comparison = wait_until_stored(database, publisher.published, program)

    assert comparison.exact
    assert sorted(path.name for path in (tmp_path / "spool").iterdir() if path.is_dir()) == [
        "hall-1",
        "hall-2",
        "hall-3",
    ]
    assert program.stop() == 0


# --- Several bridges


def test_two_bridges_of_one_group_share_the_messages_and_one_that_is_killed_gets_its_own_later(
    make_several, database, own_broker, site
):
    broker = own_broker()
    one, other = (
        make_several(database, broker, MQTT_CLIENT_ID=name, BRIDGE_PROCESSES=1, MQTT_SHARED_GROUP="halls")
        for name in ("north", "south")
    )
    one.start().wait_until_ready()
    other.start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.publish(2000)
        publisher.settle()
        wait_until_stored(database, publisher.published, one)
        stored = [bridge.messages()["stored"] for bridge in (one, other)]
        publisher.begin(per_s=1000)
        publisher.go_on(500)
        one.kill()
        publisher.go_on(500)
        one.start().wait_until_ready()
        publisher.end()
        comparison = wait_until_stored(database, publisher.published, one)

    assert comparison.exact
    assert sum(stored) == 2000
    assert min(stored) >= 0.9 * 1000
    assert one.stop() == other.stop() == 0


def test_a_client_id_of_several_can_be_retired_by_hand_with_the_settings_of_the_bridge(
    make_several, database, own_broker, site, tmp_path
):
    broker = own_broker()
    spool = {"BRIDGE_SPOOL": "always", "BRIDGE_SPOOL_DIR": tmp_path / "spool"}
    program = make_several(database, broker, **spool).start().wait_until_ready()
    children = pids(program)
    program.kill()
    wait_until(lambda: not any(map(exists, children.values())), timeout_s=40, what="the processes to end")
    query(database, "UPDATE mqtt_bridge.owners SET subscriptions = NULL")  # as if it had not come to note them
    with Publisher(broker, site) as publisher:
        publisher.publish(500)
        publisher.settle()

        for client_id in ("hall-1", "hall-2"):
            ended = run_command(tmp_path, "retire", client_id, "--yes", "--quiet", "1", **program.settings)
            assert ended.returncode == 0, ended.stderr

    assert compare(database, publisher.published).exact
    assert owners(database) == set()


def test_told_to_stop_while_client_ids_are_being_retired_all_leave_with_0_and_the_next_start_goes_on(
    make_several, database, own_broker, site
):
    broker = own_broker()
    program = make_several(database, broker, BRIDGE_PROCESSES=3).start().wait_until_ready()
    program.stop()
    for count, expected in ((1, ["hall"]), (2, ["hall-1", "hall-2"])):
        program.settings["BRIDGE_PROCESSES"] = count
        program.start().wait_for_log("a client id is not needed any more")

        assert program.stop() == 0

        program.start().wait_until_ready()
        wait_until_only(database, *expected)
        assert program.stop() == 0
        assert "could not be retired" not in program.log_of_all_runs
