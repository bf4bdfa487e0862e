"""The models that are moved, as runs of (how many tensors, bytes of each)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

__all__ = ["ALIGNED_BYTES", "SHAPES", "Shape", "places_of", "scaled", "stretches", "total_bytes"]

Shape = list[tuple[int, int]]

ALIGNED_BYTES = 512  # where a caching allocator for an accelerator begins a tensor
_MANY_BYTES, _FEW = 50 << 10, 8
_PARTS = 64


def scaled(kind: str, size_bytes: int) -> Shape:
    """A model of about this size: `few` large tensors, or `many` of 50 KiB."""
    if kind == "few":
        return [(_FEW, max(1, size_bytes // _FEW))]
    return [(max(1, size_bytes // _MANY_BYTES), min(_MANY_BYTES, size_bytes))]


SHAPES = ("few", "many")


def places_of(task: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Where each tensor of a worker's model begins and ends: `shape`, or `model_bytes` cut into 64 anywhere."""
    if "shape" in task:
        return stretches(task["shape"], task.get("gap_bytes", 0))
    cuts = [task["model_bytes"] * number // _PARTS for number in range(_PARTS + 1)]
    return list(itertools.pairwise(cuts))


def stretches(shape: Shape, gap_bytes: int = 0) -> list[tuple[int, int]]:
    """Where each tensor begins and ends: one beside the other, aligned, or with a gap."""
    end, found = 0, []
    for count, size_bytes in shape:
        for _ in range(count):
            begin = -(-(end + gap_bytes) // ALIGNED_BYTES) * ALIGNED_BYTES
            end = begin + size_bytes
            found.append((begin, end))
    return found


def total_bytes(shape: Shape) -> int:
    """Of all tensors."""
    return sum(count * size_bytes for count, size_bytes in shape)
