"""Makes the charts of the README from results in docs/figures/*.json: `make charts`.

A result is what a bench printed with --json, with `measured`: date, command and machine. Each SVG names the digest of
its result in its description, so that a test sees a chart that is older than its figures (tests/tools/test_charts.py).
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
OURS, OTHERS, LIMIT = "#2563eb", "#94a3b8", "#f59e0b"
SIZE = (7.2, 2.6)  # inches


def digest(file: Path) -> str:
    """Of a result, as its chart names it."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def bars(axis: Any, rows: list[tuple[str, float, str]], unit: str) -> None:
    """Horizontal bars from above: name, value, colour."""
    names, values, colours = zip(*reversed(rows), strict=True)
    drawn = axis.barh(names, values, color=colours, height=0.62)
    axis.bar_label(drawn, labels=[f"{value:,.4g}{unit}" for value in values], padding=4)
    axis.margins(x=0.14)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(left=False)


def fanout(axis: Any, result: dict[str, Any]) -> None:
    """T(N) over T(1) of the three ways, beside the limit; ours also for more receivers."""
    figures, (receivers, *more) = result["figures"], result["settings"]["receivers"]
    rows = [
        ("limit: the time of one", 1.0, LIMIT),
        ("ours", figures[f"t{receivers}_over_t1"], OURS),
        *((f"ours, {count} receivers", figures[f"t{count}_over_t1"], OURS) for count in more),
        ("doubling by finished copies", figures[f"doubling_t{receivers}_over_t1"], OTHERS),
        ("all from the seed", figures[f"star_t{receivers}_over_t1"], OTHERS),
    ]
    bars(axis, rows, " ×")
    axis.set_title(f"{receivers} receivers of one model: time, in times of one receiver", loc="left", fontsize=10)


def load(axis: Any, result: dict[str, Any]) -> None:
    """GB/s of a checkpoint from the page cache, by who reads it."""
    runs = result["seconds"]["warm"]
    speeds = {name: result["size_bytes"] / statistics.median(seconds) / 1e9 for name, seconds in runs.items()}
    names = {
        "memcpy": ("memcpy by torch (memory to memory)", LIMIT),
        "ours": ("ours", OURS),
        "safetensors_mmap": ("safetensors (mmap)", OTHERS),
        "runai_best": ("Run:ai's streamer, its best setting", OTHERS),
        "fastsafetensors": ("fastsafetensors", OTHERS),
        "runai": ("Run:ai's streamer", OTHERS),
    }
    bars(axis, [(label, speeds[name], colour) for name, (label, colour) in names.items() if name in speeds], " GB/s")
    axis.set_title("A checkpoint into host memory, page cache warm", loc="left", fontsize=10)


def faults(axis: Any, result: dict[str, Any]) -> None:
    """What was done to fleets, and what of it ended well."""
    figures = result["figures"]
    runs, flips, liars = figures["runs"], figures["flipped_bytes"], figures["receives_from_liars"]
    rows = [
        ("runs with kills, stops and cuts", (runs - figures["unfinished"] - figures["engines_lost"]) / runs, runs),
        ("flipped bytes that were caught", figures["flipped_bytes_caught"] / flips, flips),
        ("right weights with a liar among three", 1 - figures["wrong_from_liars"] / liars, liars),
    ]
    bars(axis, [(f"{name}\n(of {count:,})", 100 * share, OURS) for name, share, count in rows], " %")
    axis.set_xlim(0, 112)
    axis.set_title("Faults: what went well", loc="left", fontsize=10)


CHARTS: dict[str, Callable[[Any, dict[str, Any]], None]] = {"fanout": fanout, "load": load, "faults": faults}


def draw(name: str) -> None:
    """One chart, from the result of its name."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
    )
    from matplotlib import pyplot

    source = FOLDER / f"{name}.json"
    result = json.loads(source.read_text())
    figure, axis = pyplot.subplots(figsize=SIZE, layout="constrained")
    CHARTS[name](axis, result)
    measured = result["measured"]
    axis.set_xlabel(f"{measured['command']}, {measured['date']}; {measured['machine']}", fontsize=7, loc="left")
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Description": f"made of {digest(source)}"})
    pyplot.close(figure)


def main() -> int:
    """The command; returns the exit code."""
    for name in CHARTS:
        draw(name)
    source = FOLDER / "architecture.dot"
    try:
        subprocess.run(["dot", "-Tsvg", source, "-o", source.with_suffix(".svg")], check=True)
    except FileNotFoundError:
        print("architecture.svg needs graphviz: apt-get install graphviz", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
