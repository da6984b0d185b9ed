"""How busy it is."""

from __future__ import annotations

import pytest

from mqtt_bridge.pace import EVERY_S, FULL_PER_S, Pace


@pytest.mark.parametrize(
    ("per_s", "busy"), [(0, 0.0), (FULL_PER_S // 2, 0.5), (FULL_PER_S, 1.0), (10 * FULL_PER_S, 1.0)]
)
def test_it_is_as_busy_as_messages_come(per_s, busy):
    now_s = 100.0
    pace = Pace(clock=lambda: now_s)

    now_s += 1.0
    pace.note(per_s)

    assert pace.busy == pytest.approx(busy)


def test_the_rate_is_that_of_the_last_moment_not_of_all_times():
    now_s = 100.0
    pace = Pace(clock=lambda: now_s)
    now_s += 1.0
    pace.note(FULL_PER_S)

    now_s += EVERY_S / 2
    pace.note(FULL_PER_S)
    assert pace.busy == 1.0, "too soon to tell"
    now_s += EVERY_S
    pace.note(FULL_PER_S)

    assert pace.busy == 0.0
