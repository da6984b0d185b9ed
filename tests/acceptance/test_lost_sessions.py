"""A broker that forgets the bridge's session at the worst moment: nothing published after the SUBSCRIBE is lost."""

from __future__ import annotations

import pytest

from mqtt_bridge.tools.embedded import Broker
from tests.acceptance.traffic import Publisher, compare, wait_until_stored
from tests.program import Program
from tests.waiting import wait_until


@pytest.mark.parametrize("killed", [False, True], ids=["it lives on", "it is killed"])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_what_is_published_after_the_session_was_lost_while_the_database_is_away_is_stored_once(
    make_bridge, own_postgres, own_broker, site, protocol, killed
):
    postgres = own_postgres()
    broker: Broker = own_broker(config_lines=["persistence false"])
    bridge: Program = make_bridge(postgres.dsn(), broker, MQTT_PROTOCOL=protocol).start().wait_until_ready()
    with Publisher(broker, site) as publisher:
        publisher.publish(100)
        publisher.settle()
        assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact

        postgres.stop()
        broker.restart()  # with nothing in flight: whatever comes again later is the broker's doing
        wait_until(lambda: subscribed_anew(bridge), timeout_s=60, what="the bridge to subscribe again")
        wait_until(publisher._client.is_connected, timeout_s=60, what="the publisher to be back")
        publisher.publish(200)
        publisher.settle()
        wait_until(lambda: bridge.messages()["in_flight"] == 200, timeout_s=30, what="the messages of the new session")
        if killed:
            bridge.kill()
            bridge.start()
        postgres.start()

        wait_until_stored(postgres.dsn(), publisher.published, timeout_s=90)
        bridge.wait_until_ready()
    assert bridge.stop() == 0
    assert compare(postgres.dsn(), publisher.published).exact


def subscribed_anew(bridge: Program) -> bool:
    status = bridge.status()
    there = status["broker"]["reconnects"] and not status["broker"]["session_present"]
    return there and not any("not subscribed" in reason for reason in status["reasons"])
