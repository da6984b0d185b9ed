"""SIGTERM: drain, commit, acknowledge, leave. What that leaves behind is seen by the next run."""

from __future__ import annotations

import os
import signal
from contextlib import closing

import psycopg2
import pytest
from psycopg2 import sql

from mqtt_bridge.ownership import lock_key
from mqtt_bridge.tools.embedded import free_port
from tests.acceptance.traffic import Publisher, compare, query, wait_until_stored
from tests.proxy import TcpProxy
from tests.waiting import wait_until


@pytest.mark.parametrize(
    ("protocol", "number", "receive"),
    [
        ("5", signal.SIGTERM, "fast"),
        ("5", signal.SIGINT, "fast"),
        ("3.1.1", signal.SIGTERM, "fast"),
        ("5", signal.SIGTERM, "stock"),
    ],
)
def test_after_a_stop_under_load_no_acknowledged_message_comes_back(
    make_bridge, database, broker, site, number, protocol, receive
):
    bridge = make_bridge(database, broker, MQTT_PROTOCOL=protocol, MQTT_RECEIVE=receive).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.begin(per_s=3000)
        for _ in range(3):
            publisher.go_on(1500)
            os.kill(bridge.pid, number)
            assert bridge.wait() == 0
            bridge.start().wait_until_ready()
        publisher.go_on(1500)
        publisher.end()

        assert wait_until_stored(database, publisher.published, bridge).exact
        assert bridge.messages()["duplicate"] == 0
    assert bridge.stop() == 0
    assert "has not confirmed" not in bridge.log_of_all_runs
    assert "not everything could be stored" not in bridge.log_of_all_runs


def test_what_is_in_the_queue_is_stored_before_it_leaves(make_bridge, database, broker, site):
    bridge = make_bridge(database, broker, BRIDGE_BATCH_WAIT_MS=60_000).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.publish(300)
        publisher.settle()
    wait_until(lambda: bridge.messages()["in_flight"] == 300, what="all messages to be in the queue")
    assert bridge.stop() == 0

    assert compare(database, publisher.published).exact
    bridge.start().wait_until_ready()
    assert bridge.messages()["received"] == 0


@pytest.mark.parametrize("shutdown_s", [1, 6])
def test_a_stop_while_the_database_is_away_ends_in_time_and_loses_nothing(
    make_bridge, own_postgres, broker, site, shutdown_s
):
    postgres = own_postgres()
    bridge = make_bridge(postgres.dsn(), broker, BRIDGE_SHUTDOWN_S=shutdown_s).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        postgres.stop()
        publisher.publish(200)
        publisher.settle()
    wait_until(lambda: bridge.messages()["in_flight"] == 200, what="all messages to be held")
    assert bridge.stop(timeout_s=shutdown_s + 5) == 0
    assert "the broker keeps it" in bridge.log

    postgres.start()
    bridge.start().wait_until_ready()
    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact


def test_a_stop_while_the_database_hangs_ends_in_time_and_loses_nothing(make_bridge, database, broker, site):
    port = int(query(database, "SHOW port")[0][0])
    with TcpProxy("127.0.0.1", port) as link:
        through_link = database.replace(f":{port}/", f":{link.port}/")
        bridge = make_bridge(through_link, broker, BRIDGE_SHUTDOWN_S=4).start().wait_until_ready()

        with Publisher(broker, site) as publisher:
            publisher.publish(100)
            publisher.settle()
            wait_until_stored(database, publisher.published, bridge)
            link.stall()
            publisher.publish(200)
            publisher.settle()
        wait_until(lambda: bridge.messages()["in_flight"] == 200, what="all messages to be held")
        assert bridge.stop(timeout_s=20) == 0

    bridge.settings["DATABASE_URL"] = database
    bridge.start().wait_until_ready()
    assert wait_until_stored(database, publisher.published, bridge).exact


def test_a_database_that_comes_back_during_the_stop_is_still_used(make_bridge, own_postgres, broker, site):
    postgres = own_postgres()
    bridge = make_bridge(postgres.dsn(), broker, BRIDGE_SHUTDOWN_S=60).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        postgres.stop()
        publisher.publish(200)
        publisher.settle()
    wait_until(lambda: bridge.messages()["in_flight"] == 200, what="all messages to be held")
    bridge.terminate()
    bridge.wait_for_log("stopping")
    postgres.start()

    assert bridge.wait(timeout_s=60) == 0
    assert compare(postgres.dsn(), publisher.published).exact


def test_a_second_signal_ends_it_at_once(make_bridge, own_postgres, broker, site):
    postgres = own_postgres()
    bridge = make_bridge(postgres.dsn(), broker, BRIDGE_SHUTDOWN_S=3600).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        postgres.stop()
        publisher.publish(10)
        publisher.settle()
        wait_until(lambda: bridge.messages()["in_flight"] == 10, what="all messages to be held")
        bridge.terminate()
        bridge.wait_for_log("stopping")
        bridge.terminate()
        assert bridge.wait(timeout_s=10) == 1

    postgres.start()
    bridge.start().wait_until_ready()
    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact


def test_a_stop_while_it_still_waits_for_the_database_ends_at_once(make_bridge, broker):
    bridge = make_bridge(f"postgresql://postgres@127.0.0.1:{free_port()}/x", broker, BRIDGE_SHUTDOWN_S=3600)
    bridge.start().wait_until_up()
    bridge.wait_for_log("nothing listens|refused")

    assert bridge.stop(timeout_s=10) == 0


def test_a_stop_while_the_database_takes_connections_and_is_silent_ends_soon(make_bridge, database, broker):
    port = int(query(database, "SHOW port")[0][0])
    with TcpProxy("127.0.0.1", port) as link:
        link.stall()
        bridge = make_bridge(database.replace(f":{port}/", f":{link.port}/"), broker, BRIDGE_SHUTDOWN_S=3600)
        bridge.start().wait_until_up()
        wait_until(lambda: link.accepted, what="it to try")

        assert bridge.stop(timeout_s=20) == 0


def test_a_stop_while_another_transaction_keeps_the_client_id_ends_well(make_bridge, database, broker):
    bridge = make_bridge(database, broker, BRIDGE_SHUTDOWN_S=1).start().wait_until_ready()
    assert bridge.stop() == 0

    with closing(psycopg2.connect(database)) as other, other.cursor() as cursor:
        key = lock_key(str(bridge.settings["MQTT_CLIENT_ID"]))
        cursor.execute(sql.SQL("SELECT pg_advisory_xact_lock_shared({})").format(key))
        bridge.start()
        wait_until(
            lambda: (
                query(database, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") == [(1,)]
            ),
            what="the start to wait for the lock",
        )

        assert bridge.stop() == 0


def test_a_stop_while_it_still_waits_for_the_broker_ends_at_once(make_bridge, database):
    bridge = make_bridge(database, MQTT_HOST="127.0.0.1", MQTT_PORT=free_port(), BRIDGE_SHUTDOWN_S=3600)
    bridge.start().wait_until_up()
    bridge.wait_for_log("nothing listens")

    assert bridge.stop(timeout_s=15) == 0


def test_a_stop_while_the_broker_is_silent_ends_in_time(make_bridge, database, broker, site):
    with TcpProxy(broker.host, broker.port) as link:
        bridge = make_bridge(database, MQTT_HOST=link.host, MQTT_PORT=link.port, BRIDGE_SHUTDOWN_S=5)
        bridge.start().wait_until_ready()
        with Publisher(broker, site) as publisher:
            publisher.publish(100)
            publisher.settle()
            link.stall()
            publisher.publish(100)
            publisher.settle()
            assert bridge.stop(timeout_s=20) == 0

            bridge.settings |= {"MQTT_HOST": broker.host, "MQTT_PORT": broker.port}
            bridge.start().wait_until_ready()
            assert wait_until_stored(database, publisher.published, bridge).exact


def test_http_says_that_it_is_leaving(make_bridge, own_postgres, broker, site):
    postgres = own_postgres()
    bridge = make_bridge(postgres.dsn(), broker, BRIDGE_SHUTDOWN_S=3600).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        postgres.stop()
        publisher.publish(10)
        publisher.settle()
        wait_until(lambda: bridge.messages()["in_flight"] == 10, what="all messages to be held")
        bridge.terminate()
        bridge.wait_for_log("stopping")

    assert bridge.status()["state"] == "draining"
    code, reasons = bridge.readyz()
    assert code == 503
    assert "shutting down" in reasons
    assert bridge.healthz() == 200
