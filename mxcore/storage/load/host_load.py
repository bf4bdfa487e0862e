"""Tensors of a checkpoint into memory that exists: plan, choose a way, read, report."""

from __future__ import annotations

import errno
import logging
import os
import resource
import sys
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from mxcore.errors import StorageError
from mxcore.memory import HostBuffer
from mxcore.process import collection_paused
from mxcore.reading import DeviceRing, FileHandles, FileSet, JobList, Outcome, checkpoint_reader
from mxcore.safetensors import FileStamp
from mxcore.storage.checkpoint import Checkpoint
from mxcore.storage.load.device_direct import DirectReads, chosen
from mxcore.storage.plan import (
    DIRECT_LANES,
    NAMES,
    MemoryBudget,
    Progress,
    Row,
    Step,
    Want,
    budget,
    chosen_mode,
    for_device,
    merged,
    parts_of,
    row,
    steps,
    tell_fallbacks,
)

__all__ = ["LoadReport", "Reader", "load", "read_rows"]

_log = logging.getLogger(__name__)

PIECE_BYTES = 8 * 1024 * 1024  # what a thread takes: long enough to be worth it, short enough to share
_LEAST_PIECE_BYTES = 128 * 1024
STRAIGHT = "gpudirect"
_GAP_BYTES = 64 * 1024  # read past the cache, a gap this short costs less than a second read


@dataclass
class LoadReport:
    """What a load did. `read_bytes` came from the files: less than `wanted_bytes` never, more by gaps and alignment.

    `bytes_by_way`: of what was wanted; "gpudirect" came from the disk straight into device memory (`device_direct`).
    """

    wanted_bytes: int = 0
    read_bytes: int = 0
    seconds: float = 0.0
    ring_bytes: int = 0
    bytes_by_way: dict[str, int] = field(default_factory=dict)
    digests: list[int] = field(default_factory=list)

    def add(self, other: LoadReport) -> None:
        """What another read did, after this one."""
        self.wanted_bytes += other.wanted_bytes
        self.read_bytes += other.read_bytes
        self.seconds += other.seconds
        self.ring_bytes = max(self.ring_bytes, other.ring_bytes)
        for way, count in other.bytes_by_way.items():
            self.bytes_by_way[way] = self.bytes_by_way.get(way, 0) + count
        self.digests += other.digests

    @property
    def gigabytes_per_second(self) -> float:
        """Of wanted bytes; 10**9 bytes."""
        return self.wanted_bytes / self.seconds / 1e9 if self.seconds else 0.0


def load(
    checkpoint: Checkpoint,
    wants: Mapping[str, Any] | Iterable[Want],
    *,
    mode: str | None = None,
    keep_order: bool = False,
    progress: Progress | None = None,
    leave_cache_clean: bool = False,
    memory: MemoryBudget | None = None,
) -> LoadReport:
    """Reads tensors, or boxes of them, into the memory of torch or numpy tensors; returns when all is there.

    `wants` maps names to destinations of the tensor's shape and dtype (uint8 is taken for the one-byte types, F4
    among them, and any dtype of the right size for F6), or is a sequence of Want. The ranges of all files are sorted
    and merged; `keep_order` reads in the order given instead. `mode` forces a way to read (storage/plan/ways.py;
    default MX_READ_MODE or auto). `leave_cache_clean` drops the files that were read from the page cache.

    One call uses several threads; any threads may call at once, into different memory. The ring counts against
    `memory` (default: the process' budget); it gets smaller where that is short.

    Raises before anything is read: KeyError, IndexError, DestinationMismatch (see `parts_of`), StorageError,
    TruncatedRead, FileChanged (it is not the file whose header was read), ModeUnavailable, HostMemoryLimit. While
    reading: StorageError, TruncatedRead, FileChanged, what `progress` raises, KeyboardInterrupt; what the destinations
    hold is undefined then, and nothing writes to them.
    """
    with collection_paused():
        listed = [Want(name, to) for name, to in wants.items()] if isinstance(wants, Mapping) else list(wants)
        rows = [part for want in listed for part in parts_of(checkpoint, want)]
        rows = rows if keep_order else merged(rows)
    return read_rows(
        checkpoint.files,
        rows,
        mode=mode,
        progress=progress,
        leave_cache_clean=leave_cache_clean,
        memory=memory,
        stamps=checkpoint.stamps,
    )


def read_rows(
    files: Sequence[str | os.PathLike[str]],
    rows: Sequence[Row],
    *,
    mode: str | None = None,
    progress: Progress | None = None,
    leave_cache_clean: bool = False,
    memory: MemoryBudget | None = None,
    groups: array[int] | None = None,
    stamps: Sequence[FileStamp | None] = (),
) -> LoadReport:
    """Reads parts as the plan gives them (mxcore.storage.plan.read_plan); raises as `load`. `stamps`: see FileSet.

    Of more files than a quarter of those that this process may have open, so many are opened at once, unless `groups`
    (digests over files) asks for all: then some are read before others are looked at.
    """
    started = time.perf_counter()
    if groups is None and len(parts := _of_few_files(rows, _most_files())) > 1:
        whole, total_bytes = LoadReport(), sum(part[2] * part[4] for part in rows)
        for some in parts:
            told = None if progress is None else _behind(progress, whole.wanted_bytes, total_bytes)
            whole.add(
                read_rows(
                    files,
                    some,
                    mode=mode,
                    progress=told,
                    leave_cache_clean=leave_cache_clean,
                    memory=memory,
                    stamps=stamps,
                )
            )
        return whole
    used = sorted({part[0] for part in rows})
    place_of = {file: place for place, file in enumerate(used)}
    known = [stamps[file] for file in used] if stamps else []
    with Reader([files[file] for file in used], mode=mode, memory=memory, stamps=known) as reader:
        with collection_paused():
            moved = [(place_of[part[0]], *part[1:]) for part in rows]
        report = reader.read(moved, progress=progress, groups=groups)
        if leave_cache_clean:
            reader.drop_from_cache()
    report.seconds = time.perf_counter() - started
    return report


def _most_files() -> int:
    """How many files one read opens at once: each may need two handles, and others need some."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(1, limit // 4)


def _of_few_files(rows: Sequence[Row], most: int) -> list[list[Row]]:
    """The rows in their order, cut where one more file would be too many."""
    parts: list[list[Row]] = [[]]
    seen: set[int] = set()
    for part in rows:
        if part[0] not in seen and len(seen) == most:
            parts.append([])
            seen = set()
        seen.add(part[0])
        parts[-1].append(part)
    return parts


def _behind(progress: Progress, before_bytes: int, total_bytes: int) -> Progress:
    return lambda done_bytes, _: progress(before_bytes + done_bytes, total_bytes)


class Reader:
    """Open files and a ring, for several reads one after the other. One thread at a time; close it at the end."""

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        *,
        mode: str | None = None,
        memory: MemoryBudget | None = None,
        stamps: Sequence[FileStamp | None] = (),
        gpudirect_storage: str | None = None,
    ) -> None:
        """`stamps`: see FileSet; without one of a file, it is not looked whether a file that is opened again is it."""
        direct = chosen(gpudirect_storage)
        self._device: DeviceRing | None = None  # of the read that is under way
        self._mode = chosen_mode(mode)
        self._memory = memory or budget()
        self._ring: HostBuffer | None = None
        self._paths = files
        self._stamps = stamps
        self._straight = direct
        self._may_reopen = True
        self._files = FileSet(files, stamps)
        self._direct = DirectReads(self._files, direct)

    def read(
        self,
        rows: Sequence[Row],
        *,
        progress: Progress | None = None,
        groups: array[int] | None = None,
        device: DeviceRing | None = None,
    ) -> LoadReport:
        """Reads parts into their memory; raises as `load`.

        With `device`, rows have addresses of its memory, and bytes pass that ring, or come by GPUDirect Storage. Where
        a file server has forgotten what is open (ESTALE), the files are opened again, once.
        """
        try:
            return self._read(rows, progress, groups, device)
        except StorageError as error:
            if error.errno != errno.ESTALE or not self._may_reopen:
                raise
            _log.warning("%s; the files are opened again", error)
        self._may_reopen = False
        self._direct.close()
        self._files.close()
        self._files = FileSet(self._paths, self._stamps)
        self._direct = DirectReads(self._files, self._straight)
        return self._read(rows, progress, groups, device)

    def _read(
        self, rows: Sequence[Row], progress: Progress | None, groups: array[int] | None, device: DeviceRing | None
    ) -> LoadReport:
        started = time.perf_counter()
        self._device = device
        report = LoadReport()
        piece_bytes = self._affordable_piece()
        jobs = JobList(self._files, row(rows), piece_bytes=piece_bytes, gap_bytes=_GAP_BYTES, groups=groups)
        digests = array("q", bytes(8 * jobs.digest_count))
        report.wanted_bytes = jobs.total_bytes
        plan = steps(self._files, jobs, self._mode) if len(jobs) else []
        straight = None
        if device is not None:
            plan = [for_device(step, device.threads) for step in plan]
            if any(step.way == checkpoint_reader.DIRECT for step in plan):  # before anything is read: it may be tried
                straight = self._direct.handles(device, rows)
        for step in plan:
            self._run(jobs, step, straight, digests, progress, report)
        self._files.check_unchanged()
        report.digests = [digest & 0xFFFFFFFFFFFFFFFF for digest in digests]
        report.seconds = time.perf_counter() - started
        if progress is not None:
            progress(report.wanted_bytes, report.wanted_bytes)
        return report

    def _run(
        self,
        jobs: JobList,
        step: Step,
        straight: FileHandles | None,
        digests: array[int],
        progress: Progress | None,
        report: LoadReport,
    ) -> None:
        before = sum(report.bytes_by_way.values())

        def tell(done_bytes: int) -> None:
            if progress is not None:
                progress(before + done_bytes, jobs.total_bytes)

        outcome = checkpoint_reader.read_jobs(
            jobs,
            step.order,
            way=step.way,
            other_way=step.other_way,
            threads=step.threads,
            lanes=step.lanes,
            read_ahead=step.read_ahead,
            slots=self._slots(jobs, step),
            digests=digests,
            progress=None if progress is None else tell,
            device=self._device,
            straight=straight if step.way == checkpoint_reader.DIRECT else None,
        )
        tell_fallbacks(outcome)
        self._count(report, step, outcome)
        if outcome["left"]:
            self._direct.give_up()
            self._run(jobs, step._replace(order=outcome["left"]), None, digests, progress, report)

    def _count(self, report: LoadReport, step: Step, outcome: Outcome) -> None:
        report.read_bytes += outcome["read_bytes"]
        ring = self._ring if self._device is None else self._device.buffer
        report.ring_bytes = ring.size_bytes if ring is not None else 0
        straight = outcome["straight_bytes"]
        read = outcome["bytes"] if self._device is None else (outcome["done_bytes"] - straight, 0)
        for way, size_bytes in (
            (NAMES[step.way], read[0]),
            (NAMES.get(step.other_way, ""), read[1]),
            (STRAIGHT, straight),
        ):
            if size_bytes:
                report.bytes_by_way[way] = report.bytes_by_way.get(way, 0) + int(size_bytes)

    def _affordable_piece(self) -> int:
        """Half of what may still be held is for the ring; with less than small pieces want, taking it has to say so."""
        if self._device is not None:
            return self._device.piece_bytes
        free_bytes = self._memory.free_bytes + (self._ring.size_bytes if self._ring is not None else 0)
        if free_bytes >= 2 * DIRECT_LANES * checkpoint_reader.SLOT_PIECE_BYTES:
            return PIECE_BYTES
        piece_bytes = checkpoint_reader.SLOT_PIECE_BYTES
        while piece_bytes > _LEAST_PIECE_BYTES and 2 * DIRECT_LANES * piece_bytes > free_bytes:
            piece_bytes //= 2
        return piece_bytes

    def _slots(self, jobs: JobList, step: Step) -> HostBuffer | None:
        """The ring, for the ways that read past the page cache; counted against the ceiling."""
        if step.way not in (checkpoint_reader.DIRECT, checkpoint_reader.URING) or self._device is not None:
            return None
        size_bytes = step.lanes * checkpoint_reader.slot_bytes(jobs)
        if self._ring is not None and self._ring.size_bytes < size_bytes:
            self._drop_ring()
        if self._ring is None:
            self._memory.take(size_bytes, "the ring between disk and destination")
            try:
                self._ring = HostBuffer(size_bytes)
            except BaseException:
                self._memory.give_back(size_bytes)
                raise
        return self._ring

    def _drop_ring(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._memory.give_back(self._ring.size_bytes)
            self._ring = None

    def drop_from_cache(self) -> None:
        """Takes the files out of the page cache, as far as nobody else maps them or has them dirty."""
        for index in range(len(self._files)):
            os.posix_fadvise(self._files.descriptor(index), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Closes the files and frees the ring; idempotent."""
        self._direct.close()
        self._drop_ring()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
