"""PNGs of what results have: progress of each worker, T(N)/T(1), a heat map of pairs, processor seconds a GB."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from mxbench.results.files import Documents
from mxbench.results.units import unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Picture", "draw"]

_STRATEGIES = ("swarm", "doubling", "star")
_DOTS_PER_INCH = 96


class Picture(NamedTuple):
    """A PNG that was written, and what it shows."""

    file: Path
    caption: str


def draw(documents: Documents, folder: Path) -> list[Picture]:
    """Draws what there is data for into `folder`. Raises click.ClickException without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise click.ClickException("pictures need matplotlib: pip install 'matplotlib>=3.8'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for name, caption, paint, width in _wanted(documents):
        figure, axes = pyplot.subplots(figsize=(width, 4))
        paint(axes)
        figure.tight_layout()
        file = folder / f"{re.sub(r'[^a-zA-Z0-9_.-]+', '-', name)}.png"
        figure.savefig(file, dpi=_DOTS_PER_INCH, metadata={"Software": None})
        pyplot.close(figure)
        made.append(Picture(file, caption))
    return made


def _wanted(documents: Documents) -> Iterator[tuple[str, str, Any, float]]:
    """Name, caption, what paints it, width in inches."""
    for name, found in documents.items():
        if found.get("pairs"):
            yield f"pairs-{name}".rstrip("-"), "GB/s from each host to each other", _pairs(found["pairs"]), 5.5
    steps = [found for found in documents.values() if found.get("fan_out")]
    if steps:
        yield "fan-out", "Seconds of N receivers over seconds of one", _fan_out([step["fan_out"] for step in steps]), 6
    for name, found in documents.items():
        if found.get("progress"):
            caption = f"{name.rpartition('/')[2] or found['bench']}: what each worker has, % of the model"
            yield f"progress-{name}".rstrip("-"), caption, _progress(found["progress"], found["model_bytes"]), 7
    burnt = {
        f"{name.rpartition('/')[2]} {figure}".strip(): value
        for name, found in documents.items()
        for figure, value in found["figures"].items()
        if unit_of(figure) == "s/GB"
    }
    if burnt:
        yield "cpu", "Processor seconds for 10^9 bytes", _bars(burnt), 8


def _progress(lines: dict[str, list[tuple[float, int]]], model_bytes: int) -> Any:
    def paint(axes: Axes) -> None:
        for label, line in lines.items():
            axes.plot([at for at, _ in line], [100 * count / model_bytes for _, count in line], label=label)
        axes.set(xlabel="seconds", ylabel="% of the model", xlim=(0, None), ylim=(0, 101))
        if len(lines) <= 10:
            axes.legend(fontsize="small")

    return paint


def _fan_out(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.ticker import MaxNLocator

    def paint(axes: Axes) -> None:
        single = min((row["seconds"] for row in rows if row["receivers"] == 1), default=None)
        for strategy in _STRATEGIES:
            line = sorted((row["receivers"], row["seconds"]) for row in rows if row["strategy"] == strategy)
            if line and single:
                counts, ratios = [count for count, _ in line], [seconds / single for _, seconds in line]
                axes.plot(counts, ratios, marker="o", label=strategy)
        axes.axhline(1, linestyle="--", color="gray", label="the links' limit")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="receivers", ylabel="T(N) / T(1)", ylim=(0, None))
        axes.legend(fontsize="small")

    return paint


def _pairs(pairs: list[dict[str, Any]]) -> Any:
    def paint(axes: Axes) -> None:
        names = sorted({pair[end] for pair in pairs for end in ("from", "to")})
        rates = {(pair["from"], pair["to"]): pair["gbps"] for pair in pairs}
        grid = [[rates.get((giver, taker), float("nan")) for taker in names] for giver in names]
        shown = axes.imshow(grid, cmap="viridis", vmin=0)
        axes.figure.colorbar(shown, ax=axes, label="GB/s")
        axes.set(xlabel="to", ylabel="from")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        if len(names) <= 16:
            for row, giver in enumerate(names):
                for column, taker in enumerate(names):
                    if (giver, taker) in rates:
                        text = f"{rates[giver, taker]:.3g}"
                        dark = rates[giver, taker] < shown.norm.vmax / 2  # type: ignore[operator] # of viridis' colors
                        color = "white" if dark else "black"
                        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)

    return paint


def _bars(values: dict[str, float]) -> Any:
    def paint(axes: Axes) -> None:
        names = list(values)
        axes.barh(names, list(values.values()))
        axes.invert_yaxis()
        axes.set(xlabel="s/GB")
        axes.tick_params(axis="y", labelsize=7)

    return paint
