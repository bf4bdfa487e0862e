"""Tensors one after the other through a bounded ring, and whole checkpoints on one stretch of memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from mxcore.errors import HostMemoryLimit
from mxcore.memory import HostBuffer
from mxcore.storage.checkpoint import (
    Checkpoint,
    Framework,
    TensorInfo,
    TensorViews,
    open_checkpoint,
    refuse_unknown,
)
from mxcore.storage.load.host_load import read_rows
from mxcore.storage.plan import MemoryBudget, Progress, Row, budget, merged

__all__ = ["BATCH_BYTES", "load_file", "stream"]

BATCH_BYTES = 64 * 1024 * 1024
_LEAST_BATCH_BYTES = 1024 * 1024
_PAGE_BYTES = 4096  # memory and file agree modulo this, so that O_DIRECT reads in place


class _Placed(NamedTuple):
    info: TensorInfo
    begin: int  # byte of the buffer


class _Batch(NamedTuple):
    """Tensors that lie near each other in one file, and the room that an image of that stretch wants."""

    tensors: list[_Placed]
    size_bytes: int
    first_byte: int  # of the file, at the buffer's start


def stream(
    checkpoint: Checkpoint,
    names: Collection[str] | None = None,
    *,
    framework: Framework = "torch",
    batch_bytes: int = BATCH_BYTES,
    mode: str | None = None,
    progress: Progress | None = None,
    memory: MemoryBudget | None = None,
    read: Callable[[Sequence[Row]], object] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yields (name, tensor) in file order; `names` picks some. Two batches of `batch_bytes` are held: one is read while
    the other is used; a larger tensor is a batch of its own. `read` fills a batch's memory instead of local files.

    A tensor lies in the ring, without a copy. Who keeps one keeps its batch's memory: that is left to it, and the ring
    gets new memory, so a kept tensor stays what it is. The ring counts against `memory`, which makes batches smaller;
    where two do not fit, nothing is read ahead; a tensor that does not fit at all raises HostMemoryLimit. Raises as
    `load`, and CheckpointError (`refuse_unknown`). One thread at a time; ends its thread and frees the ring when it is
    exhausted, closed or has raised.
    """
    ceiling = memory or budget()
    room = max(_LEAST_BATCH_BYTES, min(batch_bytes, ceiling.free_bytes // 3))
    picked = (
        checkpoint.tensors.keys() if names is None else set(names)
    )  # a list would be looked through for each tensor
    wanted = [info for name, info in checkpoint.tensors.items() if name in picked]
    if len(wanted) != len(picked):
        raise KeyError(next(name for name in picked if name not in checkpoint.tensors))
    refuse_unknown(wanted, framework)
    batches = _batches(wanted, room)
    total_bytes = sum(info.size_bytes for info in wanted)
    ring = _BatchRing(
        framework,
        ceiling,
        read or partial(read_rows, checkpoint.files, mode=mode, memory=ceiling, stamps=checkpoint.stamps),
    )
    try:
        done_bytes = 0
        for number, batch in enumerate(batches):
            following = batches[number + 1] if number + 1 < len(batches) else None
            views = ring.take(batch, following)
            for info, begin in batch.tensors:
                yield info.name, views.tensor(info, begin)
                done_bytes += info.size_bytes
            del views
            ring.done()
            if progress is not None:
                progress(done_bytes, total_bytes)
    finally:
        ring.close()


def _batches(wanted: Sequence[TensorInfo], room: int) -> list[_Batch]:
    batches: list[_Batch] = []
    open_batch: list[TensorInfo] = []

    def close() -> None:
        if open_batch:
            batches.append(_image(open_batch))
            open_batch.clear()

    for info in sorted(wanted, key=lambda info: (info.file, info.offset, info.size_bytes)):
        if open_batch:
            first = open_batch[0]
            if info.file != first.file or info.offset + info.size_bytes - first.offset > room:
                close()
        open_batch.append(info)
    close()
    return batches


def _image(tensors: Sequence[TensorInfo]) -> _Batch:
    first_byte = tensors[0].offset // _PAGE_BYTES * _PAGE_BYTES
    end = max(info.offset + info.size_bytes for info in tensors)
    return _Batch([_Placed(info, info.offset - first_byte) for info in tensors], max(1, end - first_byte), first_byte)


def _rows(batch: _Batch, buffer: HostBuffer) -> list[Row]:
    address = buffer.address
    return merged(
        (info.file, info.offset, info.size_bytes, 0, 1, address + begin, 0)
        for info, begin in batch.tensors
        if info.size_bytes
    )


class _BatchRing:
    """Two buffers in turn, and the thread that fills the next one."""

    def __init__(self, framework: Framework, memory: MemoryBudget, read: Callable[[Sequence[Row]], object]) -> None:
        self._framework: Framework = framework
        self._memory = memory
        self._read = read
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="mx-stream")
        self._free: list[HostBuffer] = []
        self._used: HostBuffer | None = None
        self._next: tuple[HostBuffer, Future[object]] | None = None

    def take(self, batch: _Batch, following: _Batch | None) -> TensorViews:
        """The batch, read; the following one is being read from now on, where there is room for both."""
        buffer, filled = self._next or self._start(batch)
        self._next, self._used = None, buffer
        if following is not None:
            with suppress(HostMemoryLimit):  # no room for two: it is read when this one is used up
                self._next = self._start(following)
        filled.result()
        return TensorViews(buffer, self._framework)

    def done(self) -> None:
        """The batch that was taken is used up; what somebody still holds of it is theirs."""
        buffer, self._used = self._used, None
        if buffer is None:
            return
        if buffer.exports:
            self._leave(buffer)
        else:
            self._free.append(buffer)

    def _start(self, batch: _Batch) -> tuple[HostBuffer, Future[object]]:
        buffer = self._buffer(batch.size_bytes)
        rows = _rows(batch, buffer)
        return buffer, self._reader.submit(self._read, rows)

    def _buffer(self, size_bytes: int) -> HostBuffer:
        while self._free:
            buffer = self._free.pop()
            if buffer.size_bytes >= size_bytes:
                return buffer
            self._leave(buffer)
        self._memory.take(size_bytes, "a batch of tensors")
        try:
            return HostBuffer(size_bytes)
        except BaseException:
            self._memory.give_back(size_bytes)
            raise

    def _leave(self, buffer: HostBuffer) -> None:
        self._memory.give_back(buffer.size_bytes)
        buffer.close_after_exports()

    def close(self) -> None:
        self._reader.shutdown(wait=True)  # nothing writes into the ring from here on
        if self._next is not None:
            self._free.append(self._next[0])
            self._next = None
        if self._used is not None:
            self._free.append(self._used)
            self._used = None
        while self._free:
            self._leave(self._free.pop())


def load_file(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    framework: Framework = "torch",
    mode: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All tensors of a checkpoint by name, in file order, on one stretch of memory that lives as long as any of them.

    A tensor that is misaligned there is a copy. Raises as `open_checkpoint` and `load`.
    """
    checkpoint = open_checkpoint(path)
    refuse_unknown(checkpoint.tensors.values(), framework)
    images, at = [], 0
    by_file: dict[int, list[TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        by_file.setdefault(info.file, []).append(info)
    for tensors in by_file.values():
        image = _image(tensors)
        images += [_Placed(info, at + begin) for info, begin in image.tensors]
        at += -(-image.size_bytes // _PAGE_BYTES) * _PAGE_BYTES
    buffer = HostBuffer(max(at, 1))
    try:
        rows = _rows(_Batch(images, at, 0), buffer)
        read_rows(checkpoint.files, rows, mode=mode, progress=progress, stamps=checkpoint.stamps)
        views = TensorViews(buffer, framework)
        return {info.name: views.tensor(info, begin) for info, begin in images}
    finally:
        buffer.close_after_exports()
