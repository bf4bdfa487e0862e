"""GB/s as bars, PNG, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

OURS, OTHERS, LIMITS = "#2563eb", "#94a3b8", "#f59e0b"
_LIMITS = {"memcpy", "disk_limit", "disk_limit_deep"}


def draw(speeds: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """`speeds`: warm and cold → candidate → GB/s. One panel each, the fastest first, ours and the limits in colour."""
    import matplotlib

    matplotlib.use("Agg")  # a file, on machines without a screen too
    from matplotlib import pyplot

    groups = {state: sorted(group.items(), key=lambda item: item[1]) for state, group in speeds.items() if group}
    heights = [len(group) + 1 for group in groups.values()]
    figure, panels = pyplot.subplots(
        len(groups),
        figsize=(9.6, 0.36 * sum(heights) + 0.6),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for (state, group), panel in zip(groups.items(), panels[:, 0], strict=True):
        bars = panel.barh(
            [name for name, _ in group],
            [speed for _, speed in group],
            color=[OURS if name.startswith("ours") else LIMITS if name in _LIMITS else OTHERS for name, _ in group],
        )
        panel.bar_label(bars, fmt="%.2f", padding=4)
        panel.set_title(f"{state} page cache", loc="left")
        panel.set_xlabel("GB/s, median (blue: ours, orange: limits of the machine)")
        panel.margins(x=0.1, y=0.02)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
