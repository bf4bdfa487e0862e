"""What is wanted → what is read: ranges of all files, sorted and merged, for the compiled reader.

A part is `count` runs of contiguous bytes at one distance in the file and another one in memory
(reading/read_parts.h). A whole tensor is one run; a slice along an inner dimension many; what needs more than two
levels becomes several parts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from mxcore.errors import DestinationMismatch
from mxcore.storage.checkpoint import DTYPES, Checkpoint, Memory, TensorInfo, memory_of

__all__ = ["Box", "Want", "merged", "parts_of", "row", "shape_of_box"]

Box = tuple[tuple[int, int], ...]
"""For each dimension (first, end), in elements."""
Row = tuple[int, int, int, int, int, int, int]
"""file, offset, bytes, stride, count, address, address stride: a part as the compiled reader takes it."""


class Want(NamedTuple):
    """A tensor, or the box of it, and the memory that it goes to: a torch or numpy tensor of that shape and dtype.

    The destination's strides may be any positive ones. `box` None is all of the tensor.
    """

    name: str
    to: Any
    box: Box | None = None


class _Level(NamedTuple):
    """One dimension of a copy: `steps` steps of `stride` bytes in the file and `to_stride` bytes in memory."""

    steps: int
    stride: int
    to_stride: int


def shape_of_box(info: TensorInfo, box: Box | None) -> tuple[int, ...]:
    """The shape of a slice; raises IndexError for a box that is not within the tensor."""
    if box is None:
        return info.shape
    if len(box) != len(info.shape) or any(
        not 0 <= first <= end <= size for (first, end), size in zip(box, info.shape, strict=True)
    ):
        raise IndexError(f"{info.name}: {box} is no box of shape {info.shape}")
    return tuple(end - first for first, end in box)


def parts_of(checkpoint: Checkpoint, want: Want, on: str = "cpu") -> Iterator[Row]:
    """The parts of one want, whose destination has to be memory of the kind `on` (torch's name of a device type).

    Raises KeyError for an unknown name, IndexError for a box that is not within the tensor, DestinationMismatch for a
    destination of another shape, dtype or device, or one that overlaps itself.
    """
    info = checkpoint.tensors[want.name]
    memory = memory_of(want.to)
    shape = shape_of_box(info, want.box)
    _check(info, shape, memory, on)
    if 0 in shape:
        return
    bits = DTYPES[info.dtype].bits
    if memory.contiguous and want.box is None:
        yield (info.file, info.offset, info.size_bytes, 0, 1, memory.address, 0)
        return
    if bits % 8:
        yield from _packed(info, shape, want.box, memory, bits)
        return
    itemsize = bits // 8
    start, levels, step = info.offset, list[_Level](), itemsize
    for dimension in reversed(range(len(shape))):
        first = want.box[dimension][0] if want.box is not None else 0
        start += first * step
        if shape[dimension] != 1:
            levels.append(_Level(shape[dimension], step, memory.strides_bytes[dimension]))
        step *= info.shape[dimension]
    yield from _rows(info.file, start, itemsize, levels, memory.address)


def _check(info: TensorInfo, shape: tuple[int, ...], memory: Memory, on: str) -> None:
    bits = DTYPES[info.dtype].bits
    names = {info.dtype, "U8"} if bits % 8 or (memory.dtype == "U8" and bits == 8) else {info.dtype}
    if memory.device != on:
        place = "host memory" if on == "cpu" else f"memory of {on} devices"
        raise DestinationMismatch(f"{info.name}: the destination is on {memory.device}; this reads into {place}")
    if bits % 8:
        elements = 1
        for size in shape:
            elements *= size
        if memory.size_bytes * 8 != elements * bits or not memory.contiguous:
            raise DestinationMismatch(
                f"{info.name}: {elements} elements of {info.dtype} want {elements * bits // 8} bytes in a stretch, the "
                f"destination is {memory.dtype} {list(memory.shape)}"
            )
    elif memory.dtype not in names or memory.shape != shape:
        raise DestinationMismatch(
            f"{info.name} is {info.dtype} {list(shape)}, its destination {memory.dtype} {list(memory.shape)}"
        )


def _packed(info: TensorInfo, shape: tuple[int, ...], box: Box | None, memory: Memory, bits: int) -> Iterator[Row]:
    """Sub-byte elements: rows of the first dimension, where these fill whole bytes."""
    if box is None or all(size == whole for size, whole in zip(shape, info.shape, strict=True)):
        yield (info.file, info.offset, info.size_bytes, 0, 1, memory.address, 0)
        return
    row_bits = bits
    for size in info.shape[1:]:
        row_bits *= size
    first, end = box[0]
    if shape[1:] != info.shape[1:] or first * row_bits % 8 or end * row_bits % 8:
        raise DestinationMismatch(
            f"{info.name}: {box} of {info.dtype} {list(info.shape)} does not begin and end at bytes"
        )
    yield (info.file, info.offset + first * row_bits // 8, (end - first) * row_bits // 8, 0, 1, memory.address, 0)


def _rows(file: int, start: int, itemsize: int, levels: list[_Level], address: int) -> Iterator[Row]:
    """From the innermost level outward: what is contiguous on both sides is one run, the next one level its count."""
    run_bytes = itemsize
    while levels and levels[0].stride == run_bytes and levels[0].to_stride == run_bytes:
        run_bytes *= levels.pop(0).steps
    if not levels:
        yield (file, start, run_bytes, 0, 1, address, 0)
        return
    inner = levels.pop(0)
    count, stride, to_stride = inner
    while levels and levels[0].stride == stride * count and levels[0].to_stride == to_stride * count:
        count *= levels.pop(0).steps
    outer = list(reversed(levels))
    for place in product(*(range(level.steps) for level in outer)):
        offset = sum(step * level.stride for step, level in zip(place, outer, strict=True))
        to = sum(step * level.to_stride for step, level in zip(place, outer, strict=True))
        yield (file, start + offset, run_bytes, stride, count, address + to, to_stride)


def merged(rows: Iterable[Row]) -> list[Row]:
    """Sorted by file and offset; runs that follow each other on both sides become one."""
    result: list[Row] = []
    for part in sorted(rows):
        if result and part[4] == 1 and result[-1][4] == 1:
            file, offset, size, _, _, address, _ = result[-1]
            if file == part[0] and offset + size == part[1] and address + size == part[5]:
                result[-1] = (file, offset, size + part[2], 0, 1, address, 0)
                continue
        result.append(part)
    return result


def row(parts: Sequence[Row]) -> array[int]:
    """The parts as the compiled reader takes them: one array of int64."""
    flat = array("q")
    for part in parts:
        flat.extend(part)
    return flat
