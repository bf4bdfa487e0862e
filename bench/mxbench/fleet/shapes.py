"""The models that are moved, as runs of (how many tensors, bytes of each)."""

from __future__ import annotations

__all__ = ["ALIGNED_BYTES", "SHAPES", "Shape", "scaled", "stretches", "total_bytes"]

Shape = list[tuple[int, int]]

ALIGNED_BYTES = 512  # where a caching allocator for an accelerator begins a tensor
_MANY_BYTES, _FEW = 50 << 10, 8


def scaled(kind: str, size_bytes: int) -> Shape:
    """A model of about this size: `few` large tensors, or `many` of 50 KiB."""
    if kind == "few":
        return [(_FEW, max(1, size_bytes // _FEW))]
    return [(max(1, size_bytes // _MANY_BYTES), min(_MANY_BYTES, size_bytes))]


SHAPES = ("few", "many")


def stretches(shape: Shape) -> list[tuple[int, int]]:
    """Where each tensor begins and ends, one beside the other."""
    end, found = 0, []
    for count, size_bytes in shape:
        for _ in range(count):
            begin = -(-end // ALIGNED_BYTES) * ALIGNED_BYTES
            end = begin + size_bytes
            found.append((begin, end))
    return found


def total_bytes(shape: Shape) -> int:
    """Of all tensors."""
    return sum(count * size_bytes for count, size_bytes in shape)
