"""Several states as one: sums where sums mean something, else the worst."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_bridge.account import OUTCOMES
from mqtt_bridge.totals import total, worst_state
from tests.observations import make_balance, make_status


def part(*, received=0, in_flight=0, stored=0, **changes):
    return make_status(make_balance(received=received, in_flight=in_flight, stored=stored), **changes)


def test_messages_rows_rates_queues_pools_and_spools_are_sums():
    one = part(received=10, stored=8, in_flight=2)
    other = part(received=5, stored=5, spool={"messages": 7, "bytes": 700, "full": False, "damaged": 1})

    sums = total([one, other], client_id="hall")

    assert sums["messages"] == {"received": 15, **dict.fromkeys(OUTCOMES, 0), "stored": 13, "in_flight": 2}
    assert (sums["rows_stored"], sums["rates"]) == (13, {"received_per_s": 20.0, "stored_per_s": 19.0})
    assert sums["queue"] == {"depth": 2, "size": 40_000}
    assert sums["database"] == {"connected": True, "pool_in_use": 2, "pool_size": 8}
    assert sums["spool"] == {"messages": 7, "bytes": 700, "full": False, "damaged": 1}
    assert sums["broker"]["client_id"] == "hall"


def test_latencies_and_the_oldest_message_are_the_worst():
    one = part(latency_s={"p50": 0.02, "p99": 0.03}, oldest_unacked_s=0.5)
    other = part(latency_s={"p50": 0.01, "p99": 0.9}, oldest_unacked_s=4.0)
    silent = part()

    sums = total([one, other, silent], client_id="hall")

    assert sums["latency_s"] == {"p50": 0.02, "p99": 0.9}
    assert sums["oldest_unacked_s"] == 4.0
    assert total([silent], client_id="hall")["latency_s"] == {"p50": None, "p99": None}


def test_connected_are_they_when_all_are_and_the_count_of_the_broker_is_not_added_to_itself():
    broker = part()["broker"]
    one = part(broker=broker | {"reconnects": 2, "dropped": 7})
    other = part(broker=broker | {"reconnects": 1, "dropped": 8, "connected": False})

    assert total([one, other], client_id="hall")["broker"] == {
        "connected": False,
        "session_present": True,
        "client_id": "hall",
        "reconnects": 3,
        "dropped": 8,
    }


@pytest.mark.parametrize(
    ("states", "worst"),
    [
        (["running", "running"], "running"),
        (["running", "draining"], "draining"),
        (["draining", "starting"], "starting"),
        (["starting", "paused", "running"], "paused"),
        ([], "starting"),
    ],
)
def test_the_state_is_the_one_that_needs_attention_most(states, worst):
    assert worst_state(states) == worst


def test_without_any_process_there_is_a_state_of_the_same_form():
    alone = part()

    nothing = total([], client_id="hall")

    assert nothing.keys() == alone.keys() - {"reasons", "uptime_s", "version"}
    for name, value in nothing.items():
        if isinstance(value, dict):
            assert value.keys() == alone[name].keys()
    assert nothing["state"] == "starting"
    assert nothing["broker"]["connected"] is nothing["database"]["connected"] is False


@given(st.lists(st.lists(st.integers(0, 1000), min_size=len(OUTCOMES) + 1, max_size=len(OUTCOMES) + 1)))
def test_where_each_account_balances_the_sum_does(accounts):
    parts = [
        make_status(
            make_balance(received=sum(counts) + left, in_flight=left, **dict(zip(OUTCOMES, counts, strict=True)))
        )
        for *counts, left in accounts
    ]

    messages = total(parts, client_id="hall")["messages"]

    assert messages["received"] == sum(messages.values()) - messages["received"]
