"""What is said to the database about a client id."""

from __future__ import annotations

import pytest

from mqtt_bridge.ledger import BatchKey
from mqtt_bridge.ownership import _spans


@pytest.mark.parametrize(
    ("keys", "spans"),
    [
        ([(1, 5)], [(1, 5, 5)]),
        ([(1, 5), (1, 6), (1, 7)], [(1, 5, 7)]),
        ([(1, 7), (1, 5), (1, 6)], [(1, 5, 7)]),
        ([(1, 5), (1, 7)], [(1, 5, 5), (1, 7, 7)]),
        ([(1, 5), (2, 6), (2, 7)], [(1, 5, 5), (2, 6, 7)]),
        ([(2, 1), (1, 1), (1, 2), (2, 4)], [(1, 1, 2), (2, 1, 1), (2, 4, 4)]),
    ],
)
def test_rows_are_pruned_by_spans_that_hold_them_and_no_other(keys, spans):
    assert list(_spans([BatchKey(*key) for key in keys])) == spans
