"""What is published while the bridge is down waits at the broker."""

from __future__ import annotations

import itertools

import pytest

from tests.acceptance.traffic import Publisher, wait_until_stored
from tests.waiting import wait_until


@pytest.mark.parametrize(
    ("ending", "protocol", "receive"),
    [*itertools.product(["SIGTERM", "SIGKILL"], ["5", "3.1.1"], ["fast"]), ("SIGKILL", "5", "stock")],
)
def test_10_000_messages_that_were_published_while_it_was_down_are_stored_exactly_once(
    make_bridge, database, own_broker, site, ending, protocol, receive
):
    broker = own_broker()
    bridge = make_bridge(database, broker, MQTT_PROTOCOL=protocol, MQTT_RECEIVE=receive).start().wait_until_ready()
    bridge.stop() if ending == "SIGTERM" else bridge.kill()

    with Publisher(broker, site) as publisher:
        publisher.publish(10_000)
        publisher.settle()
        bridge.start().wait_until_ready()

        assert wait_until_stored(database, publisher.published, bridge).exact
        assert bridge.messages()["received"] == 10_000


def test_a_backlog_survives_restarts_of_broker_and_bridge_in_the_midst_of_it(make_bridge, database, own_broker, site):
    broker = own_broker()
    bridge = make_bridge(database, broker, BRIDGE_QUEUE_SIZE=500, BRIDGE_BATCH_SIZE=50).start().wait_until_ready()
    assert bridge.stop() == 0

    with Publisher(broker, site) as publisher:
        publisher.publish(10_000)
        publisher.settle()
    bridge.start().wait_until_up()
    wait_until(lambda: bridge.messages()["stored"] >= 500, what="a part of it to be stored")
    bridge.kill()
    broker.restart()
    bridge.start().wait_until_ready()

    assert wait_until_stored(database, publisher.published, bridge).exact


def test_messages_that_were_published_before_the_first_subscription_are_not_waited_for(
    make_bridge, database, broker, site
):
    with Publisher(broker, site) as publisher:
        publisher.publish(10)
        publisher.settle()
        bridge = make_bridge(database, broker).start().wait_until_ready()
        publisher.published.clear()
        publisher.publish(10)
        publisher.settle()

        assert wait_until_stored(database, publisher.published, bridge).exact
