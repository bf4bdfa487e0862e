"""What a figure's name says: its unit, and whether more or less of it is better."""

from __future__ import annotations

import re
from typing import Literal

__all__ = ["Better", "better", "unit_of"]

Better = Literal["higher", "lower", ""]

_UNITS: tuple[tuple[str, str], ...] = (  # the first that is found in the name counts
    (r"cpu_(seconds_per|s_a)_gb", "s/GB"),
    (r"tb_per_second", "TB/s"),
    (r"(core_share|_cores$)", "cores"),
    (r"(_vs_|^vs_|_over_|_ratio|_share)", "ratio"),
    (r"(_per_core_second|_per_rank_second|_per_second|_a_second)", "1/s"),
    (r"(_gbps|_gb_s)", "GB/s"),
    (r"_us_per_tensor", "µs"),
    (r"_seconds", "s"),
    (r"_bytes", "B"),
    (r"_mib", "MiB"),
)
_LOWER_UNITS = ("s/GB", "cores", "s", "µs", "B", "MiB")
_HIGHER_UNITS = ("GB/s", "TB/s", "1/s")
_LOWER_RATIOS = re.compile(r"_over_|resent|overhead|again")
_BAD_COUNTS = re.compile(
    r"error|fail|lost|wrong|dropped|refused|stale|twice|unfinished|exits_not_0|strangers_let_in|written_by|not_right|more$"
)
_JUDGED_BY_NOBODY = re.compile(r"_limit$|_limit_|acknowledged_bytes|size_bytes|model_bytes")


def unit_of(name: str) -> str:
    """The unit of a figure, by its name: GB/s (10^9 bytes a second), s, s/GB, B, MiB, 1/s, ratio, cores; else count."""
    return next((unit for pattern, unit in _UNITS if re.search(pattern, name)), "count")


def better(name: str) -> Better:
    """Whether more or less of a figure is better; empty where neither is, as for the number of runs."""
    unit = unit_of(name)
    if _JUDGED_BY_NOBODY.search(name):
        return ""
    if unit == "ratio":
        return "lower" if _LOWER_RATIOS.search(name) else "higher"
    if unit in _HIGHER_UNITS:
        return "higher"
    if unit in _LOWER_UNITS:
        return "lower"
    return "lower" if _BAD_COUNTS.search(name) else ""
