"""Servers for tests: one PostgreSQL and one broker for the whole run, a fresh database for every test that asks.

    def test_something(database: str, broker: Broker) -> None: ...      # database is a postgresql:// URL
    def test_an_outage(own_postgres, own_broker) -> None:
        postgres = own_postgres()        # started; stopped after the test
        broker = own_broker(config_lines=["max_queued_messages 10"])

Tests that stop, restart or kill a server take their own. On the shared broker, take client ids and topics of your own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import settings

from mqtt_bridge.tools.embedded import Broker, Postgres

# A slow machine is no failure: nothing here asserts on time.
settings.register_profile("default", deadline=None)
settings.load_profile("default")

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def database(postgres_server: Postgres) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    yield postgres_server.create_database(name)
    postgres_server.drop_database(name)


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker]:
    with Broker() as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[Callable[..., Postgres]]:
    """Starts a PostgreSQL with the arguments of `Postgres`, as often as called; stops them after the test."""
    with ExitStack() as servers:
        yield lambda *args, **kwargs: servers.enter_context(Postgres(*args, **kwargs))


@pytest.fixture
def own_broker() -> Iterator[Callable[..., Broker]]:
    """Starts a broker with the arguments of `Broker`, as often as called; stops them after the test."""
    with ExitStack() as servers:
        yield lambda *args, **kwargs: servers.enter_context(Broker(*args, **kwargs))
