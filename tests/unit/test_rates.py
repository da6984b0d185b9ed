"""How many messages a second, over the last ten seconds."""

from __future__ import annotations

import pytest

from mqtt_bridge.rates import WINDOW, Rates


@pytest.mark.parametrize("samples", [0, 1])
def test_before_the_second_sample_there_is_no_rate(samples):
    rates = Rates()
    for _ in range(samples):
        rates.sample(5.0, received=100, stored=90)

    assert rates.per_second() == (0.0, 0.0)


def test_rates_are_differences_over_time():
    rates = Rates()
    rates.sample(10.0, received=100, stored=50)
    rates.sample(12.0, received=300, stored=150)

    assert rates.per_second() == (100.0, 50.0)


def test_what_is_older_than_the_window_does_not_count():
    rates = Rates()
    rates.sample(0.0, received=0, stored=0)
    for second in range(1, WINDOW + 1):
        rates.sample(float(second), received=1_000_000 + 10 * second, stored=1_000_000 + 5 * second)

    assert rates.per_second() == (10.0, 5.0)


def test_two_samples_at_one_moment_do_no_harm():
    rates = Rates()
    rates.sample(1.0, received=1, stored=1)
    rates.sample(1.0, received=1, stored=1)

    assert rates.per_second() == (0.0, 0.0)


def test_a_stream_that_ends_comes_down_to_nothing():
    rates = Rates()
    for second in range(2 * WINDOW):
        rates.sample(float(second), received=min(second, 3) * 10, stored=min(second, 3) * 10)

    assert rates.per_second() == (0.0, 0.0)
