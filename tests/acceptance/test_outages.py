"""Whatever goes away and comes back, every message is stored exactly once, and nobody has to do anything."""

from __future__ import annotations

from typing import Literal

import pytest

from mqtt_bridge.tools.embedded import free_port
from tests.acceptance.traffic import Publisher, query, wait_until_stored
from tests.proxy import TcpProxy
from tests.waiting import wait_until


def test_it_comes_up_by_itself_when_broker_and_database_come_later(make_bridge, own_postgres, own_broker, site):
    postgres_port, broker_port = free_port(), free_port()
    bridge = make_bridge(
        f"postgresql://postgres@127.0.0.1:{postgres_port}/postgres", MQTT_HOST="127.0.0.1", MQTT_PORT=broker_port
    )

    bridge.start().wait_until_up()
    wait_until(lambda: any("refused" in reason for reason in bridge.readyz()[1]), what="the reason")
    code, reasons = bridge.readyz()
    assert code == 503
    assert any("Start PostgreSQL" in reason and "DATABASE_URL" in reason for reason in reasons)
    assert any("not subscribed" in reason for reason in reasons)
    assert bridge.healthz() == 200
    assert bridge.status()["state"] == "starting"

    postgres = own_postgres(port=postgres_port)
    wait_until(lambda: any("MQTT_HOST" in reason for reason in bridge.readyz()[1]), timeout_s=60, what="the next step")
    assert bridge.readyz()[0] == 503
    assert bridge.healthz() == 200

    broker = own_broker(port=broker_port)
    bridge.wait_until_ready()
    with Publisher(broker, site) as publisher:
        publisher.publish(50)
        publisher.settle()

    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact
    assert bridge.status()["state"] == "running"


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_of_postgresql_under_load_loses_and_doubles_nothing(
    make_bridge, own_postgres, broker, site, mode: Literal["fast", "immediate"]
):
    postgres = own_postgres()
    bridge = make_bridge(postgres.dsn(), broker).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.begin()
        publisher.go_on(1000)
        postgres.restart(mode)
        publisher.go_on(1000)
        postgres.restart(mode)
        publisher.go_on(1000)
        publisher.end()

    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact
    bridge.wait_until_ready()
    assert bridge.messages()["received"] == len(publisher.published)


def test_a_database_that_is_away_makes_it_wait_unready_and_healthy(make_bridge, own_postgres, broker, site):
    postgres = own_postgres()
    bridge = make_bridge(postgres.dsn(), broker).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        postgres.stop()
        publisher.publish(500)
        publisher.settle()
        wait_until(lambda: bridge.readyz()[0] == 503, what="it to become unready")
        wait_until(lambda: bridge.messages()["in_flight"] == 500, what="all messages to be held")
        assert bridge.healthz() == 200
        assert bridge.messages()["stored"] == 0
        postgres.start()

    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact
    bridge.wait_until_ready()


def test_restarts_of_the_broker_under_load_lose_and_double_nothing(make_bridge, database, own_broker, site):
    broker = own_broker()
    bridge = make_bridge(database, broker).start().wait_until_ready()

    with Publisher(broker, site, qos=2) as publisher:
        publisher.begin()
        for _ in range(2):  # a third short connection in a row would look like a contested client id
            publisher.go_on(1000)
            broker.restart()
        publisher.go_on(1000)
        publisher.end()

    assert wait_until_stored(database, publisher.published, bridge).exact
    bridge.wait_until_ready()
    assert bridge.status()["broker"]["reconnects"] >= 2


def test_a_restart_of_the_broker_while_its_messages_wait_for_the_database_loses_and_doubles_nothing(
    make_bridge, own_postgres, own_broker, site
):
    postgres, broker = own_postgres(), own_broker()
    bridge = make_bridge(postgres.dsn(), broker).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        postgres.stop()
        publisher.publish(2000)
        publisher.settle()
        wait_until(lambda: bridge.messages()["in_flight"] == 2000, what="all messages to be held")
    broker.restart()
    wait_until(lambda: bridge.messages()["duplicate"] == 2000, what="every message to be delivered again")
    postgres.start()

    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact
    bridge.wait_until_ready()
    assert bridge.messages() | {"duplicate": 0, "received": 2000} == bridge.messages() | {
        "duplicate": 0,
        "received": 2000,
        "stored": 2000,
        "in_flight": 0,
    }


def test_kill_9_of_the_bridge_under_load_loses_and_doubles_nothing(make_bridge, database, broker, site):
    # Acknowledgements take 50 ms to the broker: those of the last commits never arrive there.
    with TcpProxy(broker.host, broker.port, delay_s=0.05) as link:
        bridge = make_bridge(database, MQTT_HOST=link.host, MQTT_PORT=link.port).start().wait_until_ready()

        recognised = 0
        with Publisher(broker, site) as publisher:
            publisher.begin(per_s=3000)
            for _ in range(4):
                publisher.go_on(1500)
                recognised += bridge.messages()["duplicate"]
                link.stall()
                bridge.kill()
                link.cut()
                link.resume()
                bridge.start().wait_until_ready()
            publisher.end()

        assert wait_until_stored(database, publisher.published, bridge).exact
        recognised += bridge.messages()["duplicate"]
        assert recognised > 0


def test_cuts_of_the_link_to_the_database_under_load_lose_and_double_nothing(make_bridge, database, broker, site):
    port = int(query(database, "SHOW port")[0][0])
    with TcpProxy("127.0.0.1", port) as link:
        bridge = make_bridge(database.replace(f":{port}/", f":{link.port}/"), broker).start().wait_until_ready()
        # The answer to a COMMIT takes 20 ms: sooner or later one is cut off.
        link.delay_s = 0.02

        with Publisher(broker, site) as publisher:
            publisher.begin(per_s=2000)
            cuts = 0
            while cuts < 5 or "commit was in doubt had been committed" not in bridge.log:
                stored = bridge.messages()["stored"]
                wait_until(
                    lambda stored=stored: bridge.messages()["stored"] > stored, timeout_s=30, what="it to store again"
                )
                link.cut()
                cuts += 1
                assert cuts < 100
            publisher.go_on(500)
            publisher.end()

        assert wait_until_stored(database, publisher.published, bridge).exact
        bridge.wait_until_ready()
        assert bridge.messages()["stored"] == len(publisher.published)
        assert bridge.messages()["received"] == len(publisher.published)


def test_cuts_of_the_link_to_the_broker_under_load_lose_and_double_nothing(make_bridge, database, broker, site):
    with TcpProxy(broker.host, broker.port) as link:
        bridge = make_bridge(database, MQTT_HOST=link.host, MQTT_PORT=link.port).start().wait_until_ready()

        with Publisher(broker, site) as publisher:
            publisher.begin(per_s=2000)
            for number in range(2):  # a third short connection in a row would look like a contested client id
                publisher.go_on(700)
                link.cut()
                wait_until(
                    lambda number=number: bridge.status()["broker"]["reconnects"] > number,
                    timeout_s=60,
                    what="it to reconnect",
                )
            publisher.go_on(500)
            publisher.end()

        assert wait_until_stored(database, publisher.published, bridge).exact
        bridge.wait_until_ready()
        assert bridge.messages()["stored"] == len(publisher.published)
