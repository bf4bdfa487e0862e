"""Reading files, compiled: to host memory (pread, O_DIRECT, io_uring, mmap), to devices (pinned ring, cuFile)."""

from __future__ import annotations

from mxcore.reading import checkpoint_reader, cufile
from mxcore.reading.checkpoint_reader import BUFFERED, DIRECT, MAPPED, URING
from mxcore.reading.cufile import BLOCK_BYTES, LEAST_BYTES, FileHandles
from mxcore.reading.device_ring import DeviceRing, slot_bytes
from mxcore.reading.few_ranges import read_ranges
from mxcore.reading.file_set import FileSet
from mxcore.reading.read_jobs import JobList
from mxcore.reading.read_outcome import Outcome

__all__ = [
    "BLOCK_BYTES",
    "BUFFERED",
    "DIRECT",
    "LEAST_BYTES",
    "MAPPED",
    "URING",
    "DeviceRing",
    "FileHandles",
    "FileSet",
    "JobList",
    "Outcome",
    "checkpoint_reader",
    "cufile",
    "read_ranges",
    "slot_bytes",
]
