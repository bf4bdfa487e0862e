"""A few small ranges of files, read into memory by threads that share the latency of the storage."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence

from mxcore.reading import checkpoint_reader
from mxcore.reading.file_set import FileSet
from mxcore.reading.read_jobs import JobList

__all__ = ["read_ranges"]

_PIECE_BYTES = 8 * 1024 * 1024  # of a longer range


def read_ranges(
    files: Sequence[str | os.PathLike[str]], ranges: Iterable[tuple[int, int, int, int]], *, threads: int
) -> None:
    """Reads (file, offset, bytes, address) through the page cache, by `threads` threads (1 to 64).

    For a few small ranges, of which each thread waits for one. Neighbours in the list and in the file are read
    together; empty ranges may have any address. Destinations are the caller's to keep alive. Any threads may call at
    once. Raises StorageError, TruncatedRead, KeyboardInterrupt.
    """
    parts = array("q")
    for file, offset, size_bytes, address in ranges:
        if size_bytes:
            parts.extend((file, offset, size_bytes, 0, 1, address, 0))
    if not parts:
        return
    with FileSet(files) as opened:
        jobs = JobList(opened, parts, piece_bytes=_PIECE_BYTES, gap_bytes=0)
        workers = min(threads, len(jobs))
        order = array("q", range(len(jobs)))
        checkpoint_reader.read_jobs(jobs, order, way=checkpoint_reader.BUFFERED, threads=workers, lanes=workers)
