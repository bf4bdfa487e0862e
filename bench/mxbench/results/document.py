"""The JSON document of a bench: `figures`, name → number, and `details` beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from mxbench.results.machine import machine
from mxbench.results.units import unit_of

__all__ = ["document", "quantile"]

_DIGITS = 6


def document(
    bench: str,
    figures: Mapping[str, float],
    *,
    settings: Mapping[str, Any],
    samples: Mapping[str, Sequence[float]] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What `mx bench NAME --json` prints.

    `samples`: a figure's value in each round; the figure itself is then usually their median. A figure without is one
    number of the whole run. `settings`: what was asked for. `more` stands beside them, for whoever looks closer.
    """
    rounds = samples or {}
    return {
        "bench": bench,
        **more,
        "figures": dict(figures),
        "details": {
            "figures": {name: _spread(name, rounds.get(name) or [value]) for name, value in figures.items()},
            "settings": dict(settings),
            "machine": machine(),
        },
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Of at least one value, between two of them in proportion."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {
        "unit": unit_of(name),
        "rounds": len(values),
        "median": round(median(values), _DIGITS),
        "p10": round(quantile(values, 0.1), _DIGITS),
        "p90": round(quantile(values, 0.9), _DIGITS),
    }
