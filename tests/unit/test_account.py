"""The account of messages: what is booked where, and the figures that are made of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mqtt_bridge.account import LATENCIES, OUTCOMES, SAMPLES_PER_BATCH, Account
from mqtt_bridge.model import Tally


def balance_of(account, *, in_flight=0):
    return account.balance(in_flight=in_flight, queue_depth=0, queue_bytes=0, oldest_us=None)


def test_an_account_in_which_nothing_happened_balances():
    balance = balance_of(Account())

    assert balance.balanced
    assert balance.outcomes == dict.fromkeys(OUTCOMES, 0)
    assert (balance.latency_p50_s, balance.latency_p99_s) == (None, None)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_outcome_is_part_of_the_balance(outcome):
    account = Account()
    account.received = 3

    account.book(outcome, 2)

    assert not balance_of(account).balanced
    assert balance_of(account, in_flight=1).balanced
    assert balance_of(account).outcomes[outcome] == 2


def test_what_is_in_flight_is_not_computed_from_the_rest():
    account = Account()
    account.received = 5

    assert not balance_of(account, in_flight=4).balanced


def test_dead_letters_are_counted_by_stage():
    account = Account()
    for stage in ("decode", "store", "decode"):
        account.book_dead_letter(stage)

    assert balance_of(account).dead_letters == {"decode": 2, "store": 1}
    assert balance_of(account).outcomes["dead_lettered"] == 3


def test_rows_and_batches_are_counted():
    account = Account()
    account.book_rows({"readings": 3})
    account.book_rows({"readings": 2, "positions": 1})
    account.book_rows({})

    assert balance_of(account).rows == {"readings": 5, "positions": 1}
    assert balance_of(account).batches == 3


def test_tallies_add_up():
    account, tally = Account(), Tally(nan_skipped=1, nul_removed=2, time_replaced=3)
    tally.ignore("no_values")
    tally.ignore("no_values")
    tally.ignore("retained")

    account.book_tally(tally)
    account.book_tally(tally)

    assert balance_of(account).ignored == {"no_values": 4, "retained": 2}
    assert balance_of(account).repairs == {"nan_skipped": 2, "nul_removed": 4, "time_replaced": 6}


def test_latencies_are_told_in_seconds():
    account = Account()

    account.book_latencies([1_000_000 - number * 10_000 for number in range(10)], 1_000_000)

    assert balance_of(account).latency_p50_s == 0.05
    assert balance_of(account).latency_p99_s == 0.09


def test_a_clock_that_was_set_back_makes_no_negative_latency():
    account = Account()

    account.book_latencies([2_000_000], 1_000_000)

    assert balance_of(account).latency_p50_s == 0


def test_a_large_batch_leaves_a_sample_and_old_samples_are_forgotten():
    account = Account()
    account.book_latencies([0] * 1_000, 1_000_000)
    assert SAMPLES_PER_BATCH <= len(account._latencies_us) <= 2 * SAMPLES_PER_BATCH

    for _ in range(LATENCIES):
        account.book_latencies([0], 2_000_000)

    assert balance_of(account).latency_p50_s == 2
    assert len(account._latencies_us) == LATENCIES


def test_a_balance_does_not_change_afterwards():
    account = Account()
    account.book_rows({"readings": 1})
    balance = balance_of(account)
    before = replace(balance, rows=dict(balance.rows), outcomes=dict(balance.outcomes))

    account.book("stored")
    account.book_rows({"readings": 1})

    assert balance == before
