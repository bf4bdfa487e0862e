"""Checkpoints below a prefix of an object store: opened, and read by ranges into memory that exists.

What reads stores is imported when a store is meant: local checkpoints need none of it.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mxcore.memory import HostBuffer
from mxcore.storage.checkpoint import Checkpoint
from mxcore.storage.load import LoadReport
from mxcore.storage.plan import Progress, Row

if TYPE_CHECKING:
    from mxcore.storage.remote import ModelUri, RemoteFolder

__all__ = ["RemoteCheckpoint", "open_at"]

BATCH_BYTES = 256 * 1024 * 1024  # of one submission: long enough to hide a store's latency behind many ranges
_GAP_BYTES = 64 * 1024  # a gap this short costs less than a second request
_RANGES_AT_ONCE = 4096


class RemoteCheckpoint(Checkpoint):
    """A checkpoint below a prefix of an object store; its `files` are paths there. A context manager; thread-safe."""

    def __init__(self, folder: RemoteFolder) -> None:
        from mxcore.storage.remote import open_remote

        opened = open_remote(folder)
        super().__init__(opened.files, opened.tensors, opened.stamps)
        self.folder = folder

    def close(self) -> None:
        """Closes its connections. Idempotent; nothing can be read afterwards."""
        self.folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, rows: Sequence[Row], progress: Progress | None = None) -> LoadReport:
        """Reads parts into their memory, some at a time. Raises ObjectStoreError; then nothing arrives any more.

        Runs with short gaps between them are read with their gaps, into a bounded buffer.
        """
        started = time.perf_counter()
        report = LoadReport(wanted_bytes=sum(row[2] * row[4] for row in rows))
        done_bytes = 0
        for batch in _batches(rows):
            read_bytes = self._read_batch(batch)
            report.read_bytes += read_bytes
            done_bytes += sum(row[2] * row[4] for row in batch)
            if progress is not None:
                progress(done_bytes, report.wanted_bytes)
        self.folder.check_unchanged()
        report.bytes_by_way = {"object": report.wanted_bytes} if report.wanted_bytes else {}
        report.seconds = time.perf_counter() - started
        return report

    def _read_batch(self, rows: Sequence[Row]) -> int:
        """Returns the bytes that were asked for."""
        from mxcore.storage.remote import RemoteRange

        apart = [row for row in rows if row[4] == 1 or row[3] - row[2] > _GAP_BYTES]
        close = [row for row in rows if row[4] > 1 and row[3] - row[2] <= _GAP_BYTES]
        ranges = [
            RemoteRange(str(self.files[file]), offset + run * stride, size, address + run * to_stride)
            for file, offset, size, stride, count, address, to_stride in apart
            for run in range(count)
        ]
        spans = [(row[4] - 1) * row[3] + row[2] for row in close]
        if not spans:
            self.folder.read_into(ranges)
            return sum(part.length for part in ranges)
        with HostBuffer(sum(spans), huge_pages=False) as buffer:
            at = buffer.address
            for row, span in zip(close, spans, strict=True):
                ranges.append(RemoteRange(str(self.files[row[0]]), row[1], span, at))
                at += span
            self.folder.read_into(ranges)
            at = buffer.address
            for (_, _, size, stride, count, address, to_stride), span in zip(close, spans, strict=True):
                for run in range(count):
                    ctypes.memmove(address + run * to_stride, at + run * stride, size)
                at += span
        return sum(part.length for part in ranges)


def open_at(uri: ModelUri) -> RemoteCheckpoint:
    """Lists a prefix and reads the headers below it. Raises as `open_remote`, and ObjectStoreError."""
    from mxcore.storage.remote import ObjectFolder

    folder = ObjectFolder(uri)
    try:
        return RemoteCheckpoint(folder)
    except BaseException:
        folder.close()
        raise


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows whose memory, gaps included, and number of runs are bounded; a row that is longer comes in parts."""
    batch: list[Row] = []
    size_bytes = runs = 0
    for row in _bounded(rows):
        span = row[2] if row[4] == 1 else row[3] * row[4]
        if batch and (size_bytes + span > BATCH_BYTES or runs + row[4] > _RANGES_AT_ONCE):
            yield batch
            batch, size_bytes, runs = [], 0, 0
        batch.append(row)
        size_bytes += span
        runs += row[4]
    if batch:
        yield batch


def _bounded(rows: Iterable[Row]) -> Iterator[Row]:
    for file, offset, size, stride, count, address, to_stride in rows:
        if count == 1:
            for at in range(0, size, BATCH_BYTES):
                yield file, offset + at, min(BATCH_BYTES, size - at), 0, 1, address + at, 0
            continue
        most = max(1, min(_RANGES_AT_ONCE, BATCH_BYTES // max(stride, 1)))
        for first in range(0, count, most):
            part = min(most, count - first)
            where = (offset + first * stride, size, stride if part > 1 else 0, part)
            yield file, *where, address + first * to_stride, to_stride if part > 1 else 0
