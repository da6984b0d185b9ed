"""What the broker drops is seen in the log, in the status and in the metrics of the program."""

from __future__ import annotations

import pytest

from tests.acceptance.traffic import Publisher
from tests.waiting import wait_until


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_what_the_broker_dropped_for_an_absent_bridge_and_drops_later_is_told(
    make_bridge, database, own_broker, site, protocol
):
    broker = own_broker(config_lines=["max_queued_messages 10", "sys_interval 1"])
    absent = make_bridge(database, broker, MQTT_PROTOCOL=protocol, MQTT_CLIENT_ID="absent").start().wait_until_ready()
    assert absent.stop() == 0
    with Publisher(broker, site) as publisher:
        publisher.publish(25)
        publisher.settle()
        bridge = make_bridge(database, broker, MQTT_PROTOCOL=protocol).start().wait_until_ready()

        wait_until(lambda: bridge.status()["broker"]["dropped"] == 15, timeout_s=60, what="the count")
        publisher.publish(5)
        publisher.settle()

        bridge.wait_for_log("the broker drops messages.*of any other, is full")
        wait_until(lambda: bridge.status()["broker"]["dropped"] == 20, timeout_s=60, what="the count")
    assert b"mqtt_bridge_broker_dropped_total 20.0" in bridge.get("/metrics")[1]
    assert bridge.messages()["received"] == 5
    assert bridge.stop() == 0
