"""Tensors of a checkpoint that are read when somebody needs their elements, and only as much of them as he takes.

vLLM's weight loaders take their rank's part with `narrow`, slicing or indexing, and end with `copy_` into a parameter.
Up to the copy nothing is read; then the part goes from the file straight into the parameter: in host memory, or through
the pinned ring, or by GPUDirect Storage, in a CUDA device's. It is all there when the copy returns: loaders read the
parameter in their next line. What cannot go straight (another dtype, elements strewn over device memory) goes by
way of a bounded piece of host memory. Whatever else a loader does gets an ordinary tensor with the same elements.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from safetensors import safe_open

from mxcore.engine.signed_model import verified_weights
from mxcore.errors import CudaError, FileChanged, HostMemoryError, TruncatedRead
from mxcore.storage.checkpoint import DTYPES, Checkpoint, TensorInfo, refuse_unknown
from mxcore.storage.load import STRAIGHT, LoadReport, Reader, ReadRecord, load, stream
from mxcore.storage.plan import Box, Want, merged, parts_of
from mxcore.storage.signed import VerifiedFiles
from mxserver.wire import MxError

__all__ = ["LazyTensor", "lazy_weights"]

Needed: TypeAlias = Callable[[torch.Tensor], Sequence[tuple[int, int]]]

LAZY_LEAST_BYTES = 1024 * 1024  # smaller ones come together through a ring
STAGED_BYTES = 64 * 1024 * 1024  # of host memory, for what cannot go straight
_LEAST_RUN_BYTES = 256  # shorter ones are strewn over a device faster by torch

# What was read before is of another file than what would be read now: no loader makes one model of both.
_NOT_THE_SAME_FILE = (FileChanged, TruncatedRead)

_ATEN = torch.ops.aten
_log = logging.getLogger(__name__)


class LazyTensor(torch.Tensor):  # type: ignore[misc]  # torch is not type-checked
    """A box of a checkpoint's tensor that is not read yet, with the shape, strides, dtype and device of the real one.

    `materialized` keeps what it read. One thread at a time for all tensors of one iteration. `_whole` is what this was
    cut out of: who writes to a part writes to the whole, which is read for that.
    """

    _source: _Source
    _info: TensorInfo
    _box: Box
    _kept: tuple[int, ...]
    _real: torch.Tensor | None
    _whole: LazyTensor | None

    @staticmethod
    def __new__(
        cls, source: _Source, info: TensorInfo, box: Box, kept: tuple[int, ...], whole: LazyTensor | None = None
    ) -> LazyTensor:
        """`kept`: the dimensions of the checkpoint's tensor that this has; the others were indexed away."""
        shape = [box[dimension][1] - box[dimension][0] for dimension in kept]
        dtype = getattr(torch, DTYPES[info.dtype].torch_name or "uint8")
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu")
        made._source, made._info, made._box, made._kept = source, info, box, kept
        made._real, made._whole = None, whole
        return made  # type: ignore[no-any-return]  # torch has no types for it

    @classmethod
    def whole(cls, source: _Source, info: TensorInfo) -> LazyTensor:
        """All of a tensor."""
        return cls(source, info, tuple((0, size) for size in info.shape), tuple(range(len(info.shape))))

    @property
    def has_been_read(self) -> bool:
        """Whether it became an ordinary tensor, or what it was cut out of did."""
        return self._real is not None or (self._whole is not None and self._whole._real is not None)

    def materialized(self) -> torch.Tensor:
        """The ordinary tensor: reads the box once, into new memory; a view of the whole where that was read."""
        if self._whole is not None and self._whole._real is not None:
            place = (slice(*ends) if index in self._kept else ends[0] for index, ends in enumerate(self._box))
            return self._whole._real[tuple(place)]
        if self._real is None:
            real = torch.empty(tuple(self.shape), dtype=self.dtype, device="cpu")
            self.read_into(real, recorded=False)
            self._real = real
        return self._real

    def writable(self) -> torch.Tensor:
        """As `materialized`; what is written there is in the whole, and in all that is cut out of it from then on."""
        if self._whole is not None:
            self._whole.materialized()
        return self.materialized()

    def read_into(self, to: torch.Tensor, *, recorded: bool = True) -> None:
        """Reads the box into a tensor of this shape: straight where that can be, else by way of host memory.

        `recorded` in the iteration's record, for what stays there.
        """
        full = to
        for dimension in range(len(self._info.shape)):
            if dimension not in self._kept:
                full = full.unsqueeze(dimension)
        want = Want(self._info.name, full, self._box)
        if to.dtype != self.dtype or not (
            self._source.read(want, recorded) if to.device.type == "cpu" else self._source.read_to_device(want)
        ):
            self._read_staged(to)

    def _read_staged(self, to: torch.Tensor) -> None:
        """Rows of the first dimension, as many at a time as fit into STAGED_BYTES; torch copies them on."""
        if not self._kept or self.nbytes <= STAGED_BYTES:
            to.copy_(self.materialized())
            return
        rows = max(1, STAGED_BYTES * self.shape[0] // self.nbytes)
        for first in range(0, self.shape[0], rows):
            end = min(first + rows, self.shape[0])
            to[first:end].copy_(self.narrowed(0, first, end).materialized())

    def copy_into(self, to: torch.Tensor) -> None:
        """As `read_into`, but only what the iteration's `needed` says of this destination."""
        needed = self._source.needed
        if needed is None:
            self.read_into(to)
            return
        to = to.detach()
        for first, end in needed(to):
            if self._kept:
                self.narrowed(0, first, end).read_into(to[first:end])
            else:
                self.read_into(to)

    def narrowed(self, dimension: int, first: int, end: int) -> LazyTensor:
        """This, from `first` to `end` of a dimension; nothing is read."""
        place = self._kept[dimension]
        begin = self._box[place][0]
        box = (*self._box[:place], (begin + first, begin + end), *self._box[place + 1 :])
        return LazyTensor(self._source, self._info, box, self._kept, self if self._whole is None else self._whole)

    def indexed(self, dimension: int, index: int) -> LazyTensor:
        """This at an index of a dimension, which is gone then; nothing is read."""
        one = self.narrowed(dimension, index, index + 1)
        kept = (*self._kept[:dimension], *self._kept[dimension + 1 :])
        return LazyTensor(one._source, one._info, one._box, kept, one._whole)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        state = "read" if self.has_been_read else "not read"
        return f"<LazyTensor {self._info.name} {self._box}, {state}>"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _NEEDS_MEMORY:
            args = tuple(_ordinary(argument) for argument in args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None and not kwargs:
            result = rule(*args)
            if result is not None:
                return result
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                torch.utils._pytree.tree_map_only(LazyTensor, LazyTensor.writable, given)
        args, kwargs = torch.utils._pytree.tree_map_only(LazyTensor, _ordinary, (args, kwargs))
        return func(*args, **kwargs)


def _ordinary(value: Any) -> Any:
    return value.materialized() if isinstance(value, LazyTensor) else value


def _slice(tensor: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if not isinstance(tensor, LazyTensor) or tensor.has_been_read or step != 1:
        return None
    dim %= tensor.dim()
    first, last, _ = slice(start, end).indices(tensor.shape[dim])
    return tensor.narrowed(dim, first, max(first, last))


def _select(tensor: Any, dim: int, index: int) -> Any:
    if not isinstance(tensor, LazyTensor) or tensor.has_been_read:
        return None
    dim %= tensor.dim()
    size = tensor.shape[dim]
    return tensor.indexed(dim, index % size) if -size <= index < size else None


def _alias(tensor: Any) -> Any:
    if not isinstance(tensor, LazyTensor) or tensor.has_been_read:
        return None
    whole = tensor if tensor._whole is None else tensor._whole
    return LazyTensor(tensor._source, tensor._info, tensor._box, tensor._kept, whole)


def _copy(to: Any, tensor: Any, non_blocking: bool = False) -> Any:
    """Into a destination of that shape, apart from itself: straight, or by pieces; None: as torch does it."""
    if not isinstance(tensor, LazyTensor) or isinstance(to, LazyTensor) or tensor.has_been_read:
        return None
    if to.layout != torch.strided or type(to) not in (torch.Tensor, torch.nn.Parameter):
        return None
    return to if _fill(to, tensor) else None


def _fill(to: Any, tensor: LazyTensor) -> bool:
    """False: torch's own copy of an ordinary tensor does it as well, or has to say what is wrong."""
    if to.device.type not in ("cpu", "cuda") or to.shape != tensor.shape or 0 in to.stride():
        return False
    if to.dtype != tensor.dtype and (tensor._source.needed is not None or tensor.nbytes <= STAGED_BYTES):
        return False
    tensor.copy_into(to)
    return True


_RULES: dict[Any, Callable[..., Any]] = {
    _ATEN.slice.Tensor: _slice,
    _ATEN.select.int: _select,
    _ATEN.alias.default: _alias,
    _ATEN.detach.default: _alias,
    _ATEN.copy_.default: _copy,
}
_NEEDS_MEMORY = {
    torch.Tensor.numpy,
    torch.Tensor.data_ptr,
    torch.Tensor.untyped_storage,
    torch.Tensor.storage_offset,
    torch.Tensor.tolist,
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
    torch.Tensor.share_memory_,
}


class _Source:
    """What the lazy tensors of one iteration read through."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        mode: str | None,
        needed: Needed | None,
        read: Callable[[int], None],
        gpudirect_storage: str | None,
        record: ReadRecord | None,
    ) -> None:
        self._record = record
        self._checkpoint = checkpoint
        self._gpudirect_storage = gpudirect_storage
        self.needed = needed
        self.read_bytes = self._straight_bytes = 0
        self._read = read
        self._mode = mode
        self._reader: Reader | None = Reader(
            checkpoint.files, mode=mode, stamps=checkpoint.stamps, gpudirect_storage=gpudirect_storage
        )
        self._no_ring = False  # to any device: one that failed once is not tried again

    def read(self, want: Want, recorded: bool) -> bool:
        """Into host memory. Always True: what we fail to read is read with safetensors, or raises."""
        try:
            self._count(self._load(want, recorded))
        except _NOT_THE_SAME_FILE:
            raise
        except MxError as error:
            self.read_plainly(want, error)
        return True

    def _load(self, want: Want, recorded: bool) -> LoadReport:
        if self._reader is None:  # kept beyond the iteration
            return load(self._checkpoint, [want], mode=self._mode)
        rows = merged(parts_of(self._checkpoint, want))
        if self._record is None or not recorded:
            return self._reader.read(rows)
        rows, starts = self._record.cut(rows)
        report = self._reader.read(rows, groups=starts)
        self._record.note(self._checkpoint, rows, starts, report.digests)
        return report

    def read_to_device(self, want: Want) -> bool:
        """Into a CUDA device's memory, through its ring; False if it cannot be so: then nothing writes there.

        Starts after what torch's current stream was given, and returns when the bytes are there. Raises FileChanged,
        TruncatedRead.
        """
        rows = list(parts_of(self._checkpoint, want, on="cuda"))
        if self._no_ring or any(row[4] > 1 and row[2] < _LEAST_RUN_BYTES for row in rows):
            return False
        from mxcore.storage.load import device_load  # the driver is asked for only where there is a device

        after = torch.cuda.current_stream(want.to.device).cuda_stream
        index, files = want.to.device.index, self._checkpoint.files
        try:
            if self._reader is None:
                report = device_load.read_rows_to_device(
                    self._checkpoint,
                    merged(rows),
                    device_index=index,
                    after=after,
                    mode=self._mode,
                    gpudirect_storage=self._gpudirect_storage,
                )
            else:
                report = device_load.read_open_files(self._reader, files, merged(rows), device_index=index, after=after)
        except _NOT_THE_SAME_FILE:
            raise
        except MxError as error:
            self._no_ring = isinstance(error, (CudaError, HostMemoryError))
            _log.warning("%s goes to the device by way of ordinary host memory: %s", want.name, error)
            return False
        self._count(report)
        return True

    def _count(self, report: LoadReport) -> None:
        self.read_bytes += report.read_bytes
        self._straight_bytes += report.bytes_by_way.get(STRAIGHT, 0)
        self._read(report.read_bytes)

    def read_plainly(self, want: Want, error: MxError) -> None:
        """With safetensors, as the engine's own loader; raises what that raises."""
        _log.warning("%s: %s; read with safetensors instead", want.name, error)
        box = tuple(slice(first, end) for first, end in want.box or ())
        want.to.copy_(self.plain(want.name)[box])

    def plain(self, name: str) -> torch.Tensor:
        with safe_open(self._checkpoint.files[self._checkpoint[name].file], "pt") as opened:
            return opened.get_tensor(name)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
            if self._straight_bytes:
                _log.info("%d bytes came by GPUDirect Storage, of %d read", self._straight_bytes, self.read_bytes)


def lazy_weights(
    checkpoint: Checkpoint,
    names: Collection[str] | None = None,
    *,
    mode: str | None = None,
    told: Callable[[int], None] | None = None,
    lazy_least_bytes: int = LAZY_LEAST_BYTES,
    needed: Needed | None = None,
    read: Callable[[int], None] = lambda count: None,
    gpudirect_storage: str | None = None,
    record: ReadRecord | None = None,
    verified: VerifiedFiles | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) in file order: large ones lazily, small ones read, many at a time, through a ring.

    A lazy tensor that is used after the iteration has ended reads through files opened anew. `told` is called with the
    bytes handed over so far, `read` with those that a lazy tensor has read. With `needed`, all are lazy, and a plain
    copy of one reads only the ranges of the destination's first dimension that it returns. `record` takes digests of
    what goes straight into host memory, made on the way. What we fail to read is read
    with safetensors, and a warning: a tensor raises what that raises, and FileChanged or TruncatedRead for a file that
    is not what it was when its header was read. Raises StorageError if the files cannot be opened, when the first
    tensor is asked for, and CheckpointError for a type that torch does not have.

    With `verified` nothing is lazy: files are read in order and whole, and each byte is hashed before it is handed over
    (`VerifiedFiles.stream`); what fails raises, and `needed` and `record` have no effect.
    """
    if verified is not None:
        yield from verified_weights(checkpoint, names, verified, mode=mode, told=told, read=read)
        return
    chosen = [info for name, info in checkpoint.tensors.items() if names is None or name in names]
    refuse_unknown(chosen, "torch")
    least_bytes = lazy_least_bytes if needed is None else 0
    lazy = {info.name for info in chosen if _can_be_lazy(info) and info.size_bytes >= least_bytes}
    small = [info.name for info in chosen if info.name not in lazy]
    source = _Source(checkpoint, mode, needed, read, gpudirect_storage, record)
    ready = stream(checkpoint, small, mode=mode)
    done_bytes = 0
    try:
        for info in chosen:
            if info.name in lazy:
                yield info.name, LazyTensor.whole(source, info)
            else:
                yield info.name, _next_small(ready, source, info.name)
            done_bytes += info.size_bytes
            if told is not None:
                told(done_bytes)
    finally:
        ready.close()  # type: ignore[attr-defined]  # it is a generator
        source.close()


def _next_small(ready: Iterator[tuple[str, torch.Tensor]], source: _Source, name: str) -> torch.Tensor:
    """A stream that has failed is exhausted: what is left comes from safetensors."""
    try:
        found, tensor = next(ready, ("", None))
    except _NOT_THE_SAME_FILE:
        raise
    except MxError as error:
        _log.warning("%s: %s; read with safetensors instead", name, error)
        return source.plain(name)
    return tensor if found == name and tensor is not None else source.plain(name)


def _can_be_lazy(info: TensorInfo) -> bool:
    return hasattr(torch, DTYPES[info.dtype].torch_name or "") and bool(info.shape)
