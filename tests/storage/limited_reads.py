"""What tests of limits run in a process of its own (tests.storage.limited). Each function limits that for good."""

from __future__ import annotations

import errno
import logging
import os
import resource
from array import array
from pathlib import Path

import numpy as np
import pytest

from mxcore.errors import ModeUnavailable, StorageError
from mxcore.memory import HostBuffer
from mxcore.reading import URING, FileSet, JobList, checkpoint_reader
from mxcore.storage.checkpoint import open_checkpoint
from mxcore.storage.load import Reader, load
from mxcore.storage.plan import Want, merged, parts_of, row, tell_fallbacks, ways
from tests.storage.limited import IO_URING_ENTER, IO_URING_SETUP, refuse

NUMBERS = np.arange(3_000_000, dtype=np.float32)
"""Tensor `x` of the files that these functions are given."""

_NOBODY = 65534


class _Told(logging.Handler):
    """What was logged of the ways to read."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"

    def __enter__(self) -> _Told:
        ways._told.clear()
        ways._log.addHandler(self)
        ways._log.setLevel(logging.INFO)
        return self

    def __exit__(self, *raised: object) -> None:
        ways._log.removeHandler(self)


def _become_nobody() -> None:
    """Root may pin as much as it likes."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def unpinned_reads(file: Path, offset: int, size: int) -> None:
    """A range of ones, into memory that could not be pinned."""
    there = HostBuffer(8192)
    slots = HostBuffer(8 << 20)
    with FileSet([file]) as files:
        files.open_direct(0)
        _become_nobody()
        parts = row([(0, offset, size, 0, 1, there.address, 0)])
        jobs = JobList(files, parts, piece_bytes=1 << 20)
        outcome = checkpoint_reader.read_jobs(jobs, array("q", [0]), way=URING, lanes=4, slots=slots)
    assert outcome["register_error"] == errno.ENOMEM, outcome
    assert memoryview(there)[:size].cast("f").tolist() == [1.0] * (size // 4)
    slots.close()


def unpinned_load(file: Path) -> None:
    """It goes on, and says so."""
    checkpoint = open_checkpoint(file)
    open_file = os.open(file, os.O_RDONLY)  # pytest's folders are for this user only
    _become_nobody()
    there = np.zeros_like(NUMBERS)
    told = _Told()
    with told, Reader([f"/proc/self/fd/{open_file}"], mode="uring") as reader:
        report = reader.read(merged(parts_of(checkpoint, Want("x", there))))
    assert (there == NUMBERS).all()
    assert report.bytes_by_way == {"uring": NUMBERS.nbytes}
    assert "not pinned: RLIMIT_MEMLOCK is too small" in told.text, told.text


def without_io_uring(file: Path) -> None:
    """`auto` reads; `uring` is refused; where it goes only later, blocking reads do the work, and that is said."""
    checkpoint = open_checkpoint(file)
    refuse(IO_URING_SETUP, errno.EPERM)
    there = np.zeros_like(NUMBERS)
    load(checkpoint, {"x": there})
    assert (there == NUMBERS).all()
    with pytest.raises(ModeUnavailable, match=r"not allowed here \(Operation not permitted.*MX_READ_MODE=auto"):
        load(checkpoint, {"x": there}, mode="uring")
    there[:] = 0
    with FileSet(checkpoint.files) as files, HostBuffer(36 << 20) as slots:
        files.open_direct(0)
        jobs = JobList(files, row(merged(parts_of(checkpoint, Want("x", there)))))
        order = array("q", range(len(jobs)))
        outcome = checkpoint_reader.read_jobs(jobs, order, way=URING, lanes=4, slots=slots)
    assert outcome["setup_error"] == errno.EPERM
    assert (there == NUMBERS).all()
    told = _Told()
    with told:
        tell_fallbacks(outcome)
    assert "io_uring was refused (Operation not permitted): direct reads instead" in told.text


def without_reads_by_io_uring(file: Path) -> None:
    """A ring that can be made and takes nothing."""
    checkpoint = open_checkpoint(file)
    refuse(IO_URING_ENTER, errno.EACCES)
    with pytest.raises(StorageError, match="Permission denied"):
        load(checkpoint, {"x": np.zeros_like(NUMBERS)}, mode="uring")


def without_descriptors(file: Path) -> None:
    """No ring can be made any more."""
    checkpoint = open_checkpoint(file)
    there = np.zeros_like(NUMBERS)
    with Reader([file], mode="uring") as reader:
        parts = merged(parts_of(checkpoint, Want("x", there)))
        reader.read(parts)
        free = os.open("/dev/null", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))
        with pytest.raises(ModeUnavailable, match=r"io_uring is not allowed here.*MX_READ_MODE=auto"):
            reader.read(parts)
