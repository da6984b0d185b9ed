"""Behind PgBouncer everything holds that holds without it, in session and in transaction mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mqtt_bridge.tools.embedded import Postgres
from tests.acceptance.traffic import Publisher, query, wait_until_stored
from tests.pgbouncer import PgBouncer
from tests.program import run_command
from tests.waiting import wait_until


@pytest.fixture(params=["session", "transaction"])
def pooler(request: pytest.FixtureRequest, postgres_server: Postgres) -> Iterator[PgBouncer]:
    with PgBouncer(postgres_server, request.param) as pooler:
        yield pooler


@pytest.fixture
def behind(pooler: PgBouncer, database: str) -> str:
    """The same database, through the pooler."""
    return pooler.dsn(database.rpartition("/")[2])


def test_restarts_of_pgbouncer_and_a_killed_bridge_lose_and_double_nothing(
    make_bridge, pooler, behind, database, broker, site
):
    bridge = make_bridge(behind, broker).start().wait_until_ready()

    with Publisher(broker, site) as publisher:
        publisher.begin(per_s=2000)
        publisher.go_on(2000)
        pooler.restart()
        publisher.go_on(2000)
        bridge.kill()
        publisher.go_on(500)
        bridge.start()
        publisher.go_on(1000)
        pooler.kill()
        publisher.go_on(500)
        bridge.kill()
        pooler.start()
        bridge.start()
        publisher.go_on(2000)
        query(database, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'mqtt-bridge'")
        publisher.go_on(1000)
        publisher.end()

    assert wait_until_stored(database, publisher.published, bridge).exact
    bridge.wait_until_ready()
    assert query(database, "SELECT count(*) FROM mqtt_bridge.dead_letters") == [(0,)]
    assert bridge.stop() == 0


def test_a_restart_of_postgresql_behind_pgbouncer_loses_and_doubles_nothing(make_bridge, own_postgres, broker, site):
    postgres = own_postgres()
    with PgBouncer(postgres, "transaction") as pooler:
        bridge = make_bridge(pooler.dsn("postgres"), broker).start().wait_until_ready()

        with Publisher(broker, site) as publisher:
            publisher.begin()
            publisher.go_on(1000)
            postgres.restart("immediate")
            publisher.go_on(1000)
            postgres.restart("fast")
            publisher.go_on(1000)
            publisher.end()

        assert wait_until_stored(postgres.dsn(), publisher.published, bridge).exact
        bridge.wait_until_ready()
        assert query(postgres.dsn(), "SELECT count(*) FROM mqtt_bridge.dead_letters") == [(0,)]


def test_two_bridges_share_a_single_connection_of_the_server(make_bridge, postgres_server, database, broker, site):
    with PgBouncer(postgres_server, "transaction", settings=["default_pool_size = 1"]) as pooler:
        behind = pooler.dsn(database.rpartition("/")[2])
        bridges = [make_bridge(behind, broker, MQTT_SHARED_GROUP=site).start().wait_until_ready() for _ in range(2)]

        with Publisher(broker, site) as publisher:
            publisher.begin(per_s=2000)
            publisher.go_on(3000)
            bridges[0].kill()
            publisher.go_on(1000)
            bridges[0].start()
            publisher.go_on(1000)
            publisher.end()

        assert wait_until_stored(database, publisher.published).exact
        assert all(bridge.wait_for_outcomes(1)["stored"] for bridge in bridges)


def test_the_commands_work_behind_it(make_bridge, behind, database, broker, site, tmp_path):
    bridge = make_bridge(behind, broker).start().wait_until_ready()
    with Publisher(broker, site) as publisher:
        publisher.publish(10)
        publisher.send(f"{site}/d1/telemetry", b"{broken")
        publisher.settle()
    bridge.wait_for_outcomes(11)
    bridge.stop()
    settings = {name: value for name, value in bridge.settings.items() if name != "HTTP_PORT"}

    checked = run_command(tmp_path, "check", **settings)
    requeued = run_command(tmp_path, "dead-letters", "requeue", **settings)
    listed = run_command(tmp_path, "dead-letters", "list", **settings)
    retired = run_command(tmp_path, "retire", str(settings["MQTT_CLIENT_ID"]), "--yes", **settings)

    assert (checked.returncode, retired.returncode) == (0, 0), checked.stdout + retired.stdout + retired.stderr
    assert f"{site}/d1/telemetry" in listed.stdout
    assert "still failing 1" in requeued.stdout
    assert query(database, "SELECT count(*) FROM mqtt_bridge.owners") == [(0,)]


def test_options_in_the_connection_string_are_refused_by_pgbouncer_and_the_way_out_is_named(
    make_bridge, behind, broker
):
    bridge = make_bridge(f"{behind}?options=-csearch_path%3Dpublic", broker).start().wait_until_up()

    reasons = wait_until(
        lambda: [reason for reason in bridge.readyz()[1] if "startup parameter" in reason], what="the reason"
    )

    assert "ignore_startup_parameters" in reasons[0]


def test_a_pgbouncer_that_takes_too_few_clients_is_named(make_bridge, postgres_server, database, broker):
    with PgBouncer(postgres_server, "transaction", settings=["max_client_conn = 2"]) as pooler:
        bridge = make_bridge(pooler.dsn(database.rpartition("/")[2]), broker).start().wait_until_up()

        wait_until(lambda: any("in pgbouncer.ini" in reason for reason in bridge.readyz()[1]), what="the reason")


def test_in_statement_mode_nothing_is_stored_and_nothing_acknowledged(
    make_bridge, postgres_server, database, broker, site
):
    make_bridge(database, broker, MQTT_CLIENT_ID=site).start().wait_until_ready().terminate()  # its session collects
    with PgBouncer(postgres_server, "statement") as pooler, Publisher(broker, site) as publisher:
        publisher.publish(10)
        publisher.settle()
        behind = pooler.dsn(database.rpartition("/")[2])
        bridge = make_bridge(behind, broker, MQTT_CLIENT_ID=site).start().wait_until_up()

        # libpq does not hand out the sentence of a FATAL error of PgBouncer; its own is explained in docs/scaling.md.
        wait_until(lambda: any("closed the connection" in r for r in bridge.readyz()[1]), what="the reason")
        bridge.kill()

    bridge = make_bridge(database, broker, MQTT_CLIENT_ID=site).start().wait_until_ready()
    assert wait_until_stored(database, publisher.published, bridge).exact
