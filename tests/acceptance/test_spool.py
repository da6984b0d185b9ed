"""The disk buffer in the running program: messages are acknowledged from the disk, and stored once, come what may."""

from __future__ import annotations

import pytest

from tests.acceptance.traffic import Publisher, compare, query, wait_until_stored
from tests.program import run_command
from tests.waiting import wait_until


@pytest.fixture
def make_spooling(make_bridge, broker, tmp_path):
    """Makes a bridge with a spool; `mode` is BRIDGE_SPOOL."""

    def make(dsn, mode, *, directory=tmp_path / "spool", at=broker, **settings):
        return make_bridge(dsn, at, BRIDGE_SPOOL=mode, BRIDGE_SPOOL_DIR=directory, **settings)

    return make


def spooled(bridge):
    return bridge.status()["spool"]["messages"]


def wait_until_spooled(bridge, count):
    wait_until(lambda: bridge.messages()["spooled"] == count, timeout_s=60, what=f"{count} messages on the disk")


def assert_balanced(bridge):
    messages = bridge.messages()
    received = messages.pop("received")
    assert received == sum(messages.values())


def owner(dsn):
    return query(dsn, "SELECT spool_id FROM mqtt_bridge.owners")[0][0]


def test_in_an_outage_messages_go_to_the_disk_and_from_there_into_the_database(
    make_spooling, own_postgres, broker, site
):
    postgres = own_postgres()
    bridge = make_spooling(postgres.dsn(), "outage").start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.publish(100)
        wait_until_stored(postgres.dsn(), publisher.published, bridge)
        assert spooled(bridge) == 0
        postgres.stop()
        publisher.publish(1500)
        wait_until_spooled(bridge, 1500)
        publisher.publish(500)
        publisher.settle()
        wait_until_spooled(bridge, 2000)

    # Acknowledged from the disk: nothing is in flight, and nothing is lost when the process is.
    assert bridge.messages() | {"duplicate": 0} == bridge.messages() | {
        "received": 2100, "stored": 100, "spooled": 2000, "in_flight": 0, "duplicate": 0
    }  # fmt: skip
    assert bridge.readyz()[0] == 503
    assert bridge.healthz() == 200
    assert "messages go to the disk" in bridge.log
    postgres.start()
    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact
    wait_until(lambda: spooled(bridge) == 0, what="an empty spool")
    assert_balanced(bridge)
    bridge.wait_until_ready()
    assert bridge.stop() == 0
    assert owner(postgres.dsn()) is None
    assert query(postgres.dsn(), "SELECT count(*) FROM mqtt_bridge.ledger") == [(0,)]


def test_qos_0_waits_on_the_disk_too(make_spooling, own_postgres, broker, site):
    postgres = own_postgres()
    bridge = make_spooling(postgres.dsn(), "outage").start().wait_until_ready()

    with Publisher(broker, site, qos=0) as publisher:
        postgres.stop()
        publisher.publish(300)
        wait_until_spooled(bridge, 300)
        bridge.kill()
    postgres.start()
    bridge.start()

    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact


@pytest.mark.parametrize(("mode", "protocol"), [("outage", "5"), ("outage", "3.1.1"), ("always", "5")])
def test_kill_9_in_an_outage_loses_and_doubles_nothing(make_spooling, own_postgres, broker, site, mode, protocol):
    postgres = own_postgres()
    # The queue is soon crowded: an outage begins at once.
    bridge = make_spooling(postgres.dsn(), mode, MQTT_PROTOCOL=protocol, BRIDGE_QUEUE_SIZE=1000)
    bridge.start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.begin(per_s=2000)
        for _ in range(3):
            publisher.go_on(1000)
            postgres.kill()
            wait_until(lambda: spooled(bridge) > 500, timeout_s=60, what="messages on the disk")
            bridge.kill()
            publisher.go_on(1000)
            postgres.start()
            bridge.start().wait_until_ready()
        publisher.end()

    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact
    wait_until(lambda: spooled(bridge) == 0, what="an empty spool")
    assert_balanced(bridge)


def test_with_always_every_message_goes_over_the_disk(make_spooling, database, broker, site):
    bridge = make_spooling(database, "always").start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.begin(per_s=2000)
        for _ in range(3):
            publisher.go_on(2000)
            bridge.kill()
            bridge.start().wait_until_ready()
        publisher.end()

    assert wait_until_stored(database, publisher.published, bridge).exact
    wait_until(lambda: spooled(bridge) == 0, what="an empty spool")
    assert_balanced(bridge)


def test_a_session_that_is_lost_in_an_outage_is_known_as_lost_after_a_crash(
    make_spooling, own_postgres, own_broker, site
):
    # Without persistence a restart of the broker loses the session: packet ids start again.
    postgres, broker = own_postgres(), own_broker(config_lines=["persistence false"])
    bridge = make_spooling(postgres.dsn(), "outage", at=broker).start().wait_until_ready()

    with Publisher(broker, site, qos=2) as publisher:
        publisher.publish(300)
        publisher.settle()
        wait_until_stored(postgres.dsn(), publisher.published, bridge)
        postgres.stop()
        broker.restart()
        wait_until(lambda: bridge.status()["broker"]["connected"], timeout_s=30, what="the new session")
        wait_until(lambda: bridge.log.count("subscribed") == 2, timeout_s=30, what="the new subscription")
        publisher.publish(300)
        publisher.settle()
        wait_until_spooled(bridge, 300)
        bridge.kill()
        publisher.publish(300)
        publisher.settle()
    postgres.start()
    bridge.start()

    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact


def test_a_stop_in_an_outage_leaves_everything_on_the_disk(make_spooling, own_postgres, broker, site):
    postgres = own_postgres()
    bridge = make_spooling(postgres.dsn(), "outage").start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        postgres.stop()
        publisher.publish(200)
        publisher.settle()
    wait_until(lambda: bridge.messages()["received"] == 200, what="all to be received")
    assert bridge.stop() == 0
    assert "messages stay in the spool for the next start" in bridge.log

    postgres.start()
    assert owner(postgres.dsn()) is not None
    bridge.settings["BRIDGE_SPOOL"] = "off"  # what is there is stored all the same
    bridge.start().wait_until_ready()
    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact
    assert bridge.messages()["duplicate"] == 0
    assert bridge.stop() == 0
    assert owner(postgres.dsn()) is None


def test_a_start_without_the_disk_that_may_hold_messages_is_refused_until_it_is_given_up(
    make_spooling, own_postgres, broker, site, tmp_path
):
    postgres = own_postgres()
    bridge = make_spooling(postgres.dsn(), "outage").start().wait_until_ready()
    with Publisher(broker, site) as publisher:
        postgres.stop()
        publisher.publish(100)
        wait_until_spooled(bridge, 100)
        bridge.kill()
    postgres.start()
    epoch = query(postgres.dsn(), "SELECT owner_epoch, spool_id FROM mqtt_bridge.owners")
    at_hand = bridge.settings["BRIDGE_SPOOL_DIR"]

    settings = bridge.settings | {"BRIDGE_SPOOL": "off", "BRIDGE_SPOOL_DIR": ""}
    assert "which is not in BRIDGE_SPOOL_DIR" in run_command(tmp_path, "check", **settings).stdout
    assert "100 messages wait in it" in run_command(tmp_path, "check", **bridge.settings).stdout
    for other in ({"BRIDGE_SPOOL_DIR": tmp_path / "new"}, {"BRIDGE_SPOOL": "off", "BRIDGE_SPOOL_DIR": ""}):
        bridge.settings.update(other)
        assert bridge.start().wait() == 2
        assert "--abandon-spool" in bridge.log
        assert "BRIDGE_SPOOL_DIR" in bridge.log
    assert query(postgres.dsn(), "SELECT owner_epoch, spool_id FROM mqtt_bridge.owners") == epoch  # nobody was fenced

    bridge.settings.update(BRIDGE_SPOOL="outage", BRIDGE_SPOOL_DIR=at_hand)
    bridge.start().wait_until_ready()
    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact


def test_a_spool_that_is_given_up_is_not_asked_for_again(make_spooling, own_postgres, broker, site, tmp_path):
    postgres = own_postgres()
    bridge = make_spooling(postgres.dsn(), "outage").start().wait_until_ready()
    with Publisher(broker, site) as publisher:
        postgres.stop()
        publisher.publish(100)
        wait_until_spooled(bridge, 100)
        bridge.kill()
    postgres.start()

    bridge.settings.update(BRIDGE_SPOOL="off", BRIDGE_SPOOL_DIR="")
    bridge.start("--abandon-spool", owner(postgres.dsn())).wait_until_ready()

    assert owner(postgres.dsn()) is None
    assert bridge.stop() == 0
    assert bridge.start().wait_until_ready().messages()["received"] == 0


def test_a_database_that_is_restored_from_a_backup_takes_what_is_on_the_disk_and_what_comes_after(
    make_spooling, own_postgres, broker, site
):
    postgres = own_postgres()
    bridge = make_spooling(postgres.dsn(), "outage", BRIDGE_BATCH_SIZE=10).start().wait_until_ready()
    with Publisher(broker, site) as publisher:
        postgres.stop()
        publisher.publish(100)
        wait_until_spooled(bridge, 100)
        bridge.kill()
        publisher.publish(100)
        publisher.settle()
    postgres.start()
    # Made before this process had taken the client id over: the next one would get the same epoch.
    query(postgres.dsn(), "UPDATE mqtt_bridge.owners SET owner_epoch = owner_epoch - 1, spool_id = NULL RETURNING 1")

    bridge.start().wait_until_ready()

    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact


def test_a_full_spool_stops_acknowledging_says_so_and_recovers(make_spooling, own_postgres, own_broker, site):
    postgres, broker = own_postgres(), own_broker()
    bridge = make_spooling(
        postgres.dsn(), "outage", at=broker, BRIDGE_SPOOL_MAX_MB=1, BRIDGE_QUEUE_SIZE=1000, BRIDGE_BATCH_SIZE=100
    )
    bridge.start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        postgres.stop()
        publisher.publish(20_000)
        publisher.settle()
    wait_until(lambda: bridge.status()["spool"]["full"], timeout_s=60, what="a full spool")
    wait_until(lambda: bridge.messages()["in_flight"] >= 1000, what="a full queue")
    assert any("spool is full" in reason for reason in bridge.readyz()[1])
    assert "the spool takes nothing more: its cap is reached (BRIDGE_SPOOL_MAX_MB)" in bridge.log
    assert bridge.status()["spool"]["bytes"] <= 1 << 20
    assert bridge.messages()["dropped"] == 0
    postgres.start()

    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact
    wait_until(lambda: spooled(bridge) == 0, what="an empty spool")
    bridge.wait_until_ready()
    assert_balanced(bridge)


def test_a_successor_waits_for_the_directory(make_spooling, database, broker, site, tmp_path):
    first = make_spooling(database, "outage", MQTT_CLIENT_ID=site).start().wait_until_ready()
    second = make_spooling(database, "outage", MQTT_CLIENT_ID=site).start()

    assert "in use by a running bridge" in run_command(tmp_path, "check", **first.settings).stdout
    second.wait_for_log("is in use by another process")
    assert second.healthz() == 200
    assert first.stop() == 0

    second.wait_until_ready()


@pytest.mark.parametrize("directory", ["", "/nowhere/at/all"])
def test_a_directory_that_cannot_be_used_is_a_configuration_error(database, broker, tmp_path, directory):
    result = run_command(
        tmp_path, "run", DATABASE_URL=database, MQTT_HOST=broker.host, MQTT_PORT=broker.port, HTTP_PORT=0,
        BRIDGE_SPOOL="outage", BRIDGE_SPOOL_DIR=directory,
    )  # fmt: skip

    assert result.returncode == 2
    assert "BRIDGE_SPOOL" in result.stderr
    assert "Traceback" not in result.stderr
    assert run_command(tmp_path, "check", BRIDGE_SPOOL="outage", BRIDGE_SPOOL_DIR=directory).returncode == 2


def test_a_dead_letter_is_made_when_the_batch_leaves_the_disk(make_spooling, own_postgres, broker, site):
    postgres = own_postgres()
    bridge = make_spooling(postgres.dsn(), "outage").start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        postgres.stop()
        publisher.publish(50)
        publisher.send(f"{site}/d0/telemetry", b"{broken")
        wait_until_spooled(bridge, 51)
    postgres.start()

    assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact
    wait_until(lambda: bridge.messages()["dead_lettered"] == 1, what="the dead letter")
    assert compare(postgres.dsn(), publisher.published).exact
