"""How a worker's tensors lie in memory, apart from where that memory is.

A layout lists tensors by name with dtype, shape, stride, and the stretch of memory (extent) that each lies in. Two
workers whose layouts have the same fingerprint can exchange the bytes of their extents one to one: tied tensors and
views share an extent and travel once, whatever lies between the elements of a strided tensor travels with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

from mxcore.errors import LayoutMismatch, LayoutUnsupported
from mxcore.transfer.layout.scalars import Scalars
from mxserver.wire.proto import mx_pb2

__all__ = ["Kind", "Layout", "LayoutTensor", "LocalTensor", "Manifest", "Placement", "build_layout"]

Kind = Literal["processed", "raw"]
DeviceType = Literal["cpu", "cuda"]

_CANONICAL_FORM = "mx-layout-1"


@dataclass(frozen=True)
class LocalTensor:
    """A tensor of this process, without the engine's own object.

    `shape` and `stride` count elements, `address` is the first element's, `storage_address` and `storage_bytes` are
    the allocation that the tensor lies in, `dtype` is `str(tensor.dtype)`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    address: int
    itemsize_bytes: int
    storage_address: int
    storage_bytes: int
    device_type: DeviceType
    device_index: int

    @property
    def span_bytes(self) -> int:
        """From the first byte of the first element to the last byte of the last; 0 without elements."""
        if 0 in self.shape:
            return 0
        last = sum((length - 1) * step for length, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.itemsize_bytes


@dataclass(frozen=True)
class LayoutTensor:
    """A tensor without its address.

    `extent` is the index of the stretch of memory that it lies in and `offset_bytes` where its first element is
    in it; a tensor without elements lies nowhere (None and 0). The stride of a dimension of length 1, and every stride
    of a tensor without elements, has no effect and is 0 here.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    extent: int | None
    offset_bytes: int


@dataclass(frozen=True)
class Placement:
    """Where a layout's extents are in this process: one address and device index each, all of one device type."""

    addresses: tuple[int, ...]
    device_indices: tuple[int, ...]
    device_type: DeviceType


@dataclass(frozen=True)
class Layout:
    """The tensors, sorted by name, and the sizes of the extents that they lie in. Immutable; safe from any thread."""

    kind: str
    tensors: tuple[LayoutTensor, ...]
    extent_bytes: tuple[int, ...]

    @cached_property
    def total_bytes(self) -> int:
        """The bytes that a complete transfer moves."""
        return sum(self.extent_bytes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (lower hex) of a canonical form of the layout; equal exactly for equal layouts."""
        rows = [[t.name, t.dtype, t.shape, t.stride, t.extent, t.offset_bytes] for t in self.tensors]
        canonical = json.dumps(
            [_CANONICAL_FORM, self.kind, rows, self.extent_bytes], ensure_ascii=True, separators=(",", ":")
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    def differences(self, other: Layout) -> list[str]:
        """One line for every name that differs, sorted by name; empty exactly when the fingerprints are equal."""
        lines = [] if self.kind == other.kind else [f"kind: {self.kind} here, {other.kind} there"]
        ours = {tensor.name: tensor for tensor in self.tensors}
        theirs = {tensor.name: tensor for tensor in other.tensors}
        for name in sorted(ours.keys() | theirs.keys()):
            mine, its = ours.get(name), theirs.get(name)
            if mine is None:
                lines.append(f"{name}: only there")
            elif its is None:
                lines.append(f"{name}: only here")
            elif mine != its:
                lines.append(f"{name}: {_difference(mine, its)}")
        if not lines and self.extent_bytes != other.extent_bytes:
            lines.append(f"memory between tensors: {self.total_bytes} bytes here, {other.total_bytes} bytes there")
        return lines

    def to_proto(self) -> mx_pb2.Layout:
        """The form that travels between workers."""
        return mx_pb2.Layout(
            kind=self.kind,
            extent_bytes=self.extent_bytes,
            tensors=(
                mx_pb2.Tensor(
                    name=tensor.name,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    stride=tensor.stride,
                    extent=tensor.extent or 0,
                    offset=tensor.offset_bytes,
                )
                for tensor in self.tensors
            ),
        )

    @classmethod
    def from_proto(cls, message: mx_pb2.Layout) -> Layout:
        """Reads what another worker sent.

        Raises:
            LayoutMismatch: it contradicts itself (an extent that is not there, a name twice or out of order).
        """
        tensors = tuple(_tensor_from_proto(tensor, len(message.extent_bytes)) for tensor in message.tensors)
        for before, after in pairwise(tensors):
            if before.name >= after.name:
                raise LayoutMismatch(f"the holder's layout is not sorted by name: {before.name!r}, {after.name!r}")
        return cls(message.kind, tensors, tuple(message.extent_bytes))


@dataclass(frozen=True)
class Manifest:
    """What a holder says that its weights are: the layout, what is no tensor, and the size of its chunks."""

    layout: Layout
    scalars: Scalars
    chunk_bytes: int


def build_layout(kind: Kind, tensors: Sequence[LocalTensor]) -> tuple[Layout, Placement]:
    """The layout of `tensors`, in any order, and where it lies in this process.

    Tensors whose bytes overlap share an extent, whether or not the engine knows that they do. Extents are numbered
    by the first name that lies in them.

    Raises:
        LayoutUnsupported: a tensor that cannot be described: a name twice, a negative stride, an address outside of
            its storage, several device types in one layout. The message names it.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    _check(ordered)
    starts: dict[str, tuple[int, int]] = {}  # name -> (device index, address) of the stretch that it lies in
    sizes: dict[tuple[int, int], int] = {}
    for device_index, begin, end, names in _merge(ordered):
        sizes[device_index, begin] = end - begin
        starts.update((name, (device_index, begin)) for name in names)
    numbers: dict[tuple[int, int], int] = {}
    rows = []
    for tensor in ordered:
        extent, offset = None, 0
        if (start := starts.get(tensor.name)) is not None:
            extent = numbers.setdefault(start, len(numbers))
            offset = tensor.address - start[1]
        rows.append(LayoutTensor(tensor.name, tensor.dtype, tensor.shape, _placing_stride(tensor), extent, offset))
    layout = Layout(kind, tuple(rows), tuple(sizes[start] for start in numbers))
    placement = Placement(
        tuple(address for _, address in numbers),
        tuple(device_index for device_index, _ in numbers),
        ordered[0].device_type if ordered else "cpu",
    )
    return layout, placement


def _check(ordered: Sequence[LocalTensor]) -> None:
    problems = []
    for before, tensor in zip((None, *ordered), ordered, strict=False):
        if before is not None and before.name == tensor.name:
            problems.append(f"{tensor.name!r} occurs twice")
        if len(tensor.shape) != len(tensor.stride) or any(n < 0 for n in (*tensor.shape, *tensor.stride)):
            problems.append(f"{tensor.name!r} has shape {tensor.shape} and stride {tensor.stride}")
            continue
        begin, end = tensor.address, tensor.address + tensor.span_bytes
        storage_end = tensor.storage_address + tensor.storage_bytes
        if begin < end and not tensor.storage_address <= begin < end <= storage_end:
            problems.append(
                f"{tensor.name!r} lies at {begin:#x} to {end:#x}, outside of its storage "
                f"({tensor.storage_address:#x} to {storage_end:#x})"
            )
        if tensor.device_type != ordered[0].device_type:
            problems.append(f"{tensor.name!r} is on {tensor.device_type}, others on {ordered[0].device_type}")
    if problems:
        raise LayoutUnsupported(_first(problems))


def _merge(ordered: Iterable[LocalTensor]) -> list[tuple[int, int, int, list[str]]]:
    """Stretches (device index, begin, end, names) that overlap nowhere."""
    stretches = sorted(
        (tensor.device_index, tensor.address, tensor.address + tensor.span_bytes, tensor.name)
        for tensor in ordered
        if tensor.span_bytes
    )
    merged: list[tuple[int, int, int, list[str]]] = []
    for device_index, begin, end, name in stretches:
        if merged and merged[-1][0] == device_index and begin < merged[-1][2]:
            _, first, last, names = merged[-1]
            names.append(name)
            merged[-1] = (device_index, first, max(last, end), names)
        else:
            merged.append((device_index, begin, end, [name]))
    return merged


def _placing_stride(tensor: LocalTensor) -> tuple[int, ...]:
    if not tensor.span_bytes:
        return (0,) * len(tensor.stride)
    return tuple(0 if length == 1 else step for length, step in zip(tensor.shape, tensor.stride, strict=True))


def _difference(mine: LayoutTensor, its: LayoutTensor) -> str:
    for field in ("dtype", "shape", "stride"):
        here, there = getattr(mine, field), getattr(its, field)
        if here != there:
            return f"{field} {here} here, {there} there"
    return (
        f"memory shared differently with other tensors (extent {mine.extent} + {mine.offset_bytes} here, "
        f"{its.extent} + {its.offset_bytes} there)"
    )


def _tensor_from_proto(message: mx_pb2.Tensor, extents: int) -> LayoutTensor:
    shape = tuple(message.shape)
    empty = 0 in shape
    if not empty and message.extent >= extents:
        raise LayoutMismatch(f"the holder's layout puts {message.name!r} into extent {message.extent} of {extents}")
    return LayoutTensor(
        message.name, message.dtype, shape, tuple(message.stride), None if empty else message.extent, message.offset
    )


def _first(problems: list[str], limit: int = 5) -> str:
    more = f" and {len(problems) - limit} more" if len(problems) > limit else ""
    return f"tensors that cannot be described: {'; '.join(problems[:limit])}{more}"
