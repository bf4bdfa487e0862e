"""`mx bench load`: safetensors into existing tensors, our loader against others, with warm and cold page cache.

A multi-shard bf16 checkpoint is made; every candidate loads it in a fresh process, in turns, several rounds; each
tensor's content is checked. A ratio is the median of those within each round, as a machine's memory and disk change
their rate between rounds. Peers come with `make bench-deps`; those that are not installed are left out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxbench.results import NewFile, document

if TYPE_CHECKING:
    from mxbench.load.measure import Measured

MIB = 1024 * 1024
RATIOS = {
    "warm_vs_runai": ("warm", "runai"),
    "warm_vs_runai_best": ("warm", "runai_best"),
    "warm_vs_fastsafetensors": ("warm", "fastsafetensors"),
    "warm_vs_safetensors_pread": ("warm", "safetensors_pread"),
    "warm_vs_safetensors_mmap": ("warm", "safetensors_mmap"),
    "warm_vs_readinto": ("warm", "readinto"),
    "warm_vs_memcpy": ("warm", "memcpy"),
}
LIMITS = ("disk_limit", "disk_limit_deep")  # four reads in flight, and eight: the better one is the disk's limit
PEERS = ("runai", "runai_best", "fastsafetensors", "safetensors_mmap", "safetensors_pread", "readinto")
FORCED = ("ours_mapped", "ours_buffered", "ours_direct", "ours_uring")
HEADER_TENSORS = 20_000
ODD = ("ours", "safetensors_pread", "safetensors_mmap", "readinto")  # load many small tensors at odd offsets too
MOST_ROUNDS = 9  # where rounds scatter
SCATTER = 0.1  # a median so far above the fastest round is not one of a quiet machine
MOST_SECONDS = 420.0  # then no further round begins


@click.command("load")
@click.option("--size-mib", type=click.IntRange(1), default=2048, show_default=True, help="Size of the checkpoint.")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Loads of each candidate and state."
)
@click.option(
    "--odd-tensors",
    type=click.IntRange(0),
    default=20_000,
    show_default=True,
    help="Small tensors at odd offsets; 0: none.",
)
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="On the disk to measure.")
@click.option("--only", multiple=True, help="Candidates (default: all that are installed).")
@click.option("--chart", type=NewFile(), help="Draw bars into this PNG.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    size_mib: int,
    rounds: int,
    odd_tensors: int,
    folder: Path | None,
    only: tuple[str, ...],
    chart: Path | None,
    as_json: bool,
) -> None:
    """Load safetensors into existing tensors, against other loaders."""
    from mxbench.load import measure
    from mxbench.load.candidates import CANDIDATES, NEEDS

    unknown = sorted(set(only) - set(CANDIDATES))
    if unknown:
        raise click.UsageError(f"no candidate {unknown[0]}; there are {', '.join(CANDIDATES)}")
    missing = [name for name, module in NEEDS.items() if importlib.util.find_spec(module) is None]
    names = [name for name in CANDIDATES if name not in missing and (not only or name in only)]
    if missing:
        click.echo(f"left out: {', '.join(missing)} (make bench-deps)", err=True)
    deadline = time.monotonic() + MOST_SECONDS
    with tempfile.TemporaryDirectory(prefix="mx-bench-load-", dir=folder) as place:
        results, extra = _measure(Path(place), size_mib * MIB, rounds, names, deadline)
        odd = _odd(Path(place), odd_tensors, rounds, [name for name in ODD if name in names], deadline)
    medians = {
        state: {name: statistics.median(m.seconds for m in runs) for name, runs in group.items()}
        for state, group in results.items()
    }
    speeds = {
        state: {name: size_mib * MIB / seconds / 1e9 for name, seconds in group.items()}
        for state, group in medians.items()
    }
    ratios = _ratios(results) | odd
    figures = {name: statistics.median(values) for name, values in ratios.items()}
    if "ours" in extra:
        figures["extra_memory_bytes"] = extra["ours"]
    figures["header_us_per_tensor"] = measure.header_us(HEADER_TENSORS, 7)
    figures |= {f"{state}_{name}_gbps": speed for state, group in speeds.items() for name, speed in group.items()}
    if chart is not None:
        from mxbench.load.chart import draw

        draw(speeds, chart)
    if as_json:
        told = document(
            "load",
            {name: round(value, 4) for name, value in figures.items()},
            settings={"size_mib": size_mib, "rounds": rounds, "odd_tensors": odd_tensors, "only": list(only)},
            samples=ratios
            | {
                f"{state}_{name}_gbps": [size_mib * MIB / run.seconds / 1e9 for run in runs]
                for state, group in results.items()
                for name, runs in group.items()
            },
            size_bytes=size_mib * MIB,
            rounds=rounds,
            cores=len(os.sched_getaffinity(0)),
            load_average=os.getloadavg(),
            seconds={s: {n: [m.seconds for m in r] for n, r in g.items()} for s, g in results.items()},
            cpu_seconds={s: {n: [m.cpu_seconds for m in r] for n, r in g.items()} for s, g in results.items()},
            extra_memory_bytes=extra,
        )
        click.echo(json.dumps(told))
        return
    _print(speeds, extra, figures)


def _measure(
    place: Path, size_bytes: int, rounds: int, names: list[str], deadline: float
) -> tuple[dict[str, dict[str, list[Measured]]], dict[str, int]]:
    from mxbench.load import made, measure

    (place / "small").mkdir()
    (place / "whole").mkdir()
    made.checkpoint(place / "small", 4 * MIB)
    digests = made.checkpoint(place / "whole", size_bytes)
    measure.trim()
    small, files = sorted((place / "small").iterdir()), sorted((place / "whole").iterdir())
    results = {
        state: _rounds(
            state, names, rounds, deadline, lambda name, at: measure.measure(name, at, files, small, digests)
        )
        for state in ("warm", "cold")
    }
    extra: dict[str, int] = {}
    for group in results.values():
        for name, runs in group.items():
            extra[name] = max([extra.get(name, 0), *(run.extra_bytes for run in runs)])
    return results, extra


def _odd(place: Path, count: int, rounds: int, names: list[str], deadline: float) -> dict[str, list[float]]:
    """Ratios of others' seconds to ours in each round, for a file of many small tensors, the first at an odd offset."""
    from mxbench.load import made, measure

    if not count or "ours" not in names:
        return {}
    (place / "odd").mkdir()
    digests = made.odd_tensors(place / "odd", count)
    small, files = sorted((place / "small").iterdir()), sorted((place / "odd").iterdir())
    figures = {}
    for state in ("warm", "cold"):
        group = _rounds(
            state, names, rounds, deadline, lambda name, at: measure.measure(name, at, files, small, digests)
        )
        figures[f"odd_{state}_us_per_tensor"] = [run.seconds / count * 1e6 for run in group.get("ours", [])]
        figures |= {f"odd_{state}_vs_{name}": _against(group, name) for name in group if name != "ours"}
    return {name: values for name, values in figures.items() if values}


def _rounds(
    state: str, names: list[str], rounds: int, deadline: float, run: Callable[[str, str], Measured]
) -> dict[str, list[Measured]]:
    """All candidates in turns, `rounds` times; then those that scatter, beside ours and the limits, until they do not.

    A candidate that fails is told and left out of further rounds, so that the nth of each list is of the nth round.
    """
    from mxbench.load.candidates import CANDIDATES

    group: dict[str, list[Measured]] = {}
    left = [name for name in names if state in CANDIDATES[name].states]
    number = 0
    while left:
        for name in left[number % len(left) :] + left[: number % len(left)]:  # nobody is always first
            click.echo(f"\r{state} {number + 1} {name:20}", err=True, nl=False)
            try:
                group.setdefault(name, []).append(run(name, state))
            except RuntimeError as error:
                click.echo(f"\n{error}", err=True)
                left = [other for other in left if other != name]
        number += 1
        if number >= rounds:
            scatter = [name for name in left if _scatters(group.get(name, []))]
            more = scatter and number < min(MOST_ROUNDS, 3 * rounds) and time.monotonic() < deadline
            left = [name for name in left if name in (*scatter, "ours", *LIMITS)] if more else []
    click.echo(f"\r{'':40}\r", err=True, nl=False)
    return {name: runs for name, runs in group.items() if runs}


def _scatters(runs: list[Measured]) -> bool:
    seconds = [run.seconds for run in runs]
    return len(seconds) > 1 and statistics.median(seconds) > (1 + SCATTER) * min(seconds)


def _against(group: dict[str, list[Measured]], other: str) -> list[float]:
    """Another's seconds by ours, in each round that both ran."""
    return [
        theirs.seconds / ours.seconds for ours, theirs in zip(group.get("ours", []), group.get(other, []), strict=False)
    ]


def _ratios(results: dict[str, dict[str, list[Measured]]]) -> dict[str, list[float]]:
    ratios = {figure: _against(results[state], other) for figure, (state, other) in RATIOS.items()}
    for state, group in results.items():
        for figure, others in (
            (f"{state}_vs_best", PEERS),
            (f"{state}_vs_disk_limit", LIMITS),
            (f"{state}_auto_vs_best_forced", FORCED),
        ):
            ratios[figure] = _least(_against(group, name) for name in others)
    ratios["auto_vs_best_forced"] = _least(ratios[f"{state}_auto_vs_best_forced"] for state in results)
    return {figure: values for figure, values in ratios.items() if values}


def _least(ratios: Iterable[list[float]]) -> list[float]:
    """Those with the smallest median."""
    return min(filter(None, ratios), key=statistics.median, default=[])


def _print(speeds: dict[str, dict[str, float]], extra: dict[str, int], figures: dict[str, float]) -> None:
    for state, group in speeds.items():
        click.echo(f"{state} page cache")
        for name, speed in sorted(group.items(), key=lambda item: -item[1]):
            click.echo(f"  {name:20} {speed:7.2f} GB/s   {extra.get(name, 0) / MIB:8.0f} MiB beyond the model")
    for name, value in figures.items():
        if not name.endswith("_gbps"):
            click.echo(f"{name:28} {value:.2f}")


if __name__ == "__main__":
    sys.exit(command())
