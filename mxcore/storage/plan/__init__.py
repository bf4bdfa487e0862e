"""What is read, in which way, within which limit of host memory."""

from __future__ import annotations

from mxcore.storage.plan.memory_limit import SETTING, MemoryBudget, available_bytes, budget, parse_bytes
from mxcore.storage.plan.progress import Progress, ProgressDisplay
from mxcore.storage.plan.read_plan import Box, Row, Want, merged, parts_of, row
from mxcore.storage.plan.ways import (
    DIRECT_LANES,
    NAMES,
    Step,
    chosen_mode,
    for_device,
    steps,
    tell_fallbacks,
    tell_once,
)

__all__ = [
    "DIRECT_LANES",
    "NAMES",
    "SETTING",
    "Box",
    "MemoryBudget",
    "Progress",
    "ProgressDisplay",
    "Row",
    "Step",
    "Want",
    "available_bytes",
    "budget",
    "chosen_mode",
    "for_device",
    "merged",
    "parse_bytes",
    "parts_of",
    "row",
    "steps",
    "tell_fallbacks",
    "tell_once",
]
