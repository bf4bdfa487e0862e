"""Benchmarks of single parts under pytest-benchmark: `pytest bench/micro`.

Each file has a group of benchmarks, and in it the limit of the machine that they are held against (its name begins
with `limit`). Beside pytest-benchmark's own columns, the results (JSON: `--benchmark-autosave`) carry `gb_per_second`
or `per_second`, of the median, under `extra_info`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

Measure = Callable[..., Any]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the benchmarks counts."""
    for name in [name for name in os.environ if name.startswith(("MX_", "MODEL_EXPRESS_", "REDIS_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Measure:
    """`measure(function, total_bytes=…)` or `(function, times=…)`: runs it, notes the rate, returns what it returned.

    `times` is how many of what is counted one call does. `fresh` makes the arguments of each round, unmeasured;
    `rounds` then says how many there are.
    """

    def run(
        function: Callable[..., Any],
        *,
        total_bytes: int = 0,
        times: int = 0,
        fresh: Callable[[], tuple[Any, ...]] | None = None,
        rounds: int = 20,
    ) -> Any:
        if fresh is None:
            result = benchmark(function)
        else:
            made = fresh
            result = benchmark.pedantic(function, setup=lambda: (made(), {}), rounds=rounds)
        if benchmark.stats is not None:  # None where each runs once, unmeasured
            seconds = benchmark.stats.stats.median
            if total_bytes:
                benchmark.extra_info["gb_per_second"] = round(total_bytes / seconds / 1e9, 3)
            if times:
                benchmark.extra_info["per_second"] = round(times / seconds, 1)
        return result

    return run
