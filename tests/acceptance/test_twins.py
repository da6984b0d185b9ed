"""Two processes with one client id: one of them has to give way, and neither may fight for ever."""

from __future__ import annotations

from tests.waiting import wait_until


def test_the_older_of_two_idle_processes_on_one_database_leaves_with_3(make_bridge, database, own_broker):
    broker = own_broker()
    older = make_bridge(database, broker, MQTT_CLIENT_ID="twin").start().wait_until_ready()

    newer = make_bridge(database, broker, MQTT_CLIENT_ID="twin").start()

    assert older.wait() == 3
    newer.wait_until_ready()
    assert "another process has taken over this client id" in older.log


def test_two_processes_on_different_databases_do_not_fight_but_say_that_the_client_id_is_contested(
    make_bridge, database, postgres_server, own_broker
):
    broker = own_broker()
    other_database = postgres_server.create_database("test_of_a_twin")
    one = make_bridge(database, broker, MQTT_CLIENT_ID="twin").start().wait_until_ready()
    other = make_bridge(other_database, broker, MQTT_CLIENT_ID="twin").start()

    def contested() -> bool:
        return any("another client seems to use" in reason for twin in (one, other) for reason in twin.readyz()[1])

    wait_until(contested, timeout_s=60, what="one of them to give way")
    assert one.healthz() == other.healthz() == 200

    one.stop()
    other.stop()
    postgres_server.drop_database("test_of_a_twin")
