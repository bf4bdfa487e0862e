"""What a source gives away at most."""

from __future__ import annotations

import pytest

from mxcore.transfer.serve.rate_limit import RateLimit


def test_without_a_limit_everything_goes() -> None:
    assert RateLimit(0, burst_bytes=1).allowed(1000, 1 << 30) == (1000, 0.0)


def test_no_more_than_the_rate_on_average() -> None:
    now = 0.0
    limit = RateLimit(1000, burst_bytes=100, clock=lambda: now)
    assert limit.allowed(10, 100) == (2, 0.0)  # a quarter of a second's worth
    units, pause = limit.allowed(10, 100)
    assert (units, pause) == (0, pytest.approx(0.05))
    now += pause
    assert limit.allowed(10, 100) == (1, 0.0)
    total = 0
    for _ in range(1000):
        now += 0.01
        total += limit.allowed(10, 100)[0]
    assert total == pytest.approx(100, abs=2)
    now += 1000
    assert limit.allowed(10, 100)[0] == 2  # what was not used does not pile up
    assert limit.allowed(0, 100) == (0, 0.0)


def test_a_unit_larger_than_the_burst_still_goes() -> None:
    now = 0.0
    limit = RateLimit(10, burst_bytes=100, clock=lambda: now)
    assert limit.allowed(1, 100) == (1, 0.0)
    units, pause = limit.allowed(1, 100)
    assert (units, pause) == (0, pytest.approx(10))
    now += pause
    assert limit.allowed(1, 100) == (1, 0.0)
