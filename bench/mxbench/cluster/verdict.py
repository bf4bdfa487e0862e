"""What a run says in a few lines: fan-out against one receiver, storage, a kill, and which link is slow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

__all__ = ["figures_of", "slow_links", "verdict"]

SLOW = 0.5  # of the median
MORE = 1.5  # times the fastest link: another way


def figures_of(steps: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """The figures of the whole run."""
    figures: dict[str, float] = {}
    if (pairs := steps.get("pairs")) is not None:
        figures |= {name: value for name, value in pairs["figures"].items() if name.startswith("link_")}
        figures["slow_links"] = len(slow_links(pairs["pairs"]))
    rows = [step["fan_out"] for step in steps.values() if "fan_out" in step]
    single = next((row["seconds"] for row in rows if row["receivers"] == 1), None)
    if single is not None:
        figures["t1_seconds"] = single
        for row in rows:
            if row["receivers"] > 1:
                prefix = "" if row["strategy"] == "swarm" else f"{row['strategy']}_"
                figures[f"{prefix}t{row['receivers']}_over_t1"] = row["seconds"] / single
    if (read := steps.get("storage")) is not None:
        figures["storage_readers"] = read["figures"]["storage_readers"]
        figures["storage_seconds"] = read["figures"]["seconds"]
    if (updated := steps.get("update")) is not None:
        figures["update_seconds"] = updated["figures"]["seconds"]
    if (kill := steps.get("killed")) is not None:
        figures["killed_seconds"] = kill["figures"]["seconds"]
        most = max((row for row in rows if row["strategy"] == "swarm"), key=lambda row: row["receivers"], default=None)
        if most is not None:
            figures["killed_over_undisturbed"] = kill["figures"]["seconds"] / most["seconds"]
    return {name: round(value, 6) for name, value in figures.items()}


def slow_links(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those below half of the median, the slowest first."""
    middle = median(pair["gbps"] for pair in pairs)
    return sorted((pair for pair in pairs if pair["gbps"] < SLOW * middle), key=lambda pair: float(pair["gbps"]))


def verdict(steps: Mapping[str, dict[str, Any]], failed: Sequence[str]) -> Iterator[str]:
    """The last line is about the links."""
    figures = figures_of(steps)
    most = max((step["fan_out"]["receivers"] for step in steps.values() if "fan_out" in step), default=0)
    if f"t{most}_over_t1" in figures:
        others = [
            f"{name} {figures[f'{name}_t{most}_over_t1']:.2f}"
            for name in ("doubling", "star")
            if f"{name}_t{most}_over_t1" in figures
        ]
        beside = f" ({', '.join(others)})" if others else ""
        yield f"{most} receivers take {figures[f't{most}_over_t1']:.2f} times as long as one{beside}"
    if "link_fastest_gbps" in figures and (passed := _past_the_links(steps, figures["link_fastest_gbps"])):
        yield passed
    if "storage_readers" in figures:
        yield f"storage was read by {figures['storage_readers']:.0f} of all that started at once"
    if "killed_over_undisturbed" in figures:
        yield f"with a worker killed at half, the others took {figures['killed_over_undisturbed']:.2f} times as long"
    if failed:
        yield f"failed: {', '.join(failed)}"
    if "pairs" in steps:
        yield _about_links(steps["pairs"]["pairs"])


def _past_the_links(steps: Mapping[str, dict[str, Any]], fastest_gbps: float) -> str:
    """What is said of receivers that took from one holder alone, faster than any link gives; empty where none did."""
    rates = [
        step["figures"]["slowest_receiver_gbps"]
        for step in steps.values()
        if "fan_out" in step and (step["fan_out"]["receivers"] == 1 or step["fan_out"]["strategy"] == "star")
    ]
    if not rates or max(rates) <= MORE * fastest_gbps:
        return ""
    told = f"receivers had {max(rates):.3g} GB/s, the fastest link {fastest_gbps:.3g}"
    return f"{told}: they took another way than the links (one machine's memory, RDMA)"


def _about_links(pairs: Sequence[dict[str, Any]]) -> str:
    middle = median(pair["gbps"] for pair in pairs)
    slow = slow_links(pairs)
    if not slow:
        lowest = min(pair["gbps"] for pair in pairs)
        share = f"{100 * lowest / middle:.0f} % of the median {middle:.3g} GB/s"
        return f"no slow link: {len(pairs)} links, the slowest has {share}"
    names = {pair[end] for pair in pairs for end in ("from", "to")}
    for name in sorted(names):
        own = [pair for pair in pairs if name in (pair["from"], pair["to"])]
        if len(names) > 2 and all(pair in slow for pair in own):
            rate = median(pair["gbps"] for pair in own)
            return f"slow machine: every link of {name}, at {rate:.3g} GB/s, {100 * rate / middle:.0f} % of the median"
    told = [f"{pair['from']} -> {pair['to']} at {pair['gbps']:.3g} GB/s" for pair in slow]
    share = 100 * slow[0]["gbps"] / middle
    more = f" and {len(told) - 4} more" if len(told) > 4 else ""
    return f"slow links: {', '.join(told[:4])}{more}; the slowest has {share:.0f} % of the median {middle:.3g} GB/s"
