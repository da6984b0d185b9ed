"""One try to commit a batch: what it leaves behind when it fails."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import psycopg2
import pytest

from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.transactions import Batch, Transactions


class Data:
    """What a try has in its hands."""


def test_a_try_that_failed_keeps_nothing_of_its_batch_alive(monkeypatch):
    alive = []

    def fail(*_):
        data = Data()
        alive.append(weakref.ref(data))
        raise psycopg2.errors.DiskFull("no space left")

    transactions = Transactions(client_id="a", statement_timeout_s=30)
    monkeypatch.setattr(transactions, "_whole", fail)
    batch = Batch(Entry(BatchKey(1, 1), 1, 0, b""), (), ())
    gc.disable()  # what only the collector would find waits for it, batch after batch
    try:
        with pytest.raises(psycopg2.errors.DiskFull) as raised:
            transactions.run(SimpleNamespace(closed=0), batch)
        del raised
        assert alive[0]() is None
    finally:
        gc.enable()
