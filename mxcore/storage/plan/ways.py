"""Which way to read: one that was asked for, or what fits the file system and the page cache.

==========  =========================================================================================
buffered    preadv by threads, with read-ahead across files
mapped      copied out of a mapping, past the processor's cache; for what the page cache has
direct      O_DIRECT by threads, through a ring, or in place where the alignment allows it
uring       as direct, with io_uring
auto        for each stretch: in the page cache → mapped and buffered, whichever is faster in the first
            stretches; not there → direct, or buffered where a file system has no O_DIRECT
==========  =========================================================================================
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from array import array
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast, get_args

from mxcore.errors import ModeUnavailable, StorageError
from mxcore.reading import BUFFERED, DIRECT, MAPPED, URING, FileSet, JobList, Outcome, checkpoint_reader
from mxserver.wire import environment

__all__ = [
    "DIRECT_LANES",
    "NAMES",
    "ReadMode",
    "Step",
    "chosen_mode",
    "for_device",
    "steps",
    "tell_fallbacks",
    "tell_once",
]

_log = logging.getLogger(__name__)

ReadMode = Literal["auto", "buffered", "mapped", "direct", "uring"]
SETTING = "MX_READ_MODE"
NAMES = {BUFFERED: "buffered", MAPPED: "mapped", DIRECT: "direct", URING: "uring"}

_WARM = 255  # of 255: all pages looked at are in the page cache
_PROBE_JOBS = 192  # from so many on (1.5 GiB), trying two ways costs less than 2 %
DIRECT_LANES = 12  # of 8 MiB: four reads reach a disk's limit; the rest covers what is being copied
_READ_AHEAD_JOBS = 4
_LOCAL = {0xEF53, 0x58465342, 0xF2F52010}  # ext4, xfs, f2fs: O_DIRECT goes straight to a block device
_FUSE = 0x65735546


class Step(NamedTuple):
    """Some jobs, and how they are read: `way`, or `other_way` (-1: none) if that proves faster; see NAMES."""

    order: array[int]
    way: int
    other_way: int
    threads: int
    lanes: int
    read_ahead: int


def chosen_mode(mode: str | None, environ: Mapping[str, str] = os.environ) -> ReadMode:
    """What was asked for: the argument, MX_READ_MODE, or auto. A wrong setting warns; a wrong argument raises."""
    if mode is not None:
        if mode not in get_args(ReadMode):
            raise ValueError(f"mode is {mode!r}, has to be one of {', '.join(get_args(ReadMode))}")
        return cast(ReadMode, mode)
    text = environment.setting(environ, SETTING)
    if text is None or text.lower() == "engine":  # the engine's own loader reads: what is read here has no say in it
        return "auto"
    if text.lower() in get_args(ReadMode):
        return cast(ReadMode, text.lower())
    tell_once(
        logging.WARNING, f"{SETTING}={text!r} is refused: it is one of {', '.join(get_args(ReadMode))}; auto is used"
    )
    return "auto"


def steps(files: FileSet, jobs: JobList, mode: ReadMode) -> list[Step]:
    """How to read all jobs: one step for a forced way, one or two for auto. Opens and maps what that needs.

    Raises ModeUnavailable for a forced way that does not work on these files.
    """
    every = array("q", range(len(jobs)))
    if mode == "auto":
        return _auto(files, jobs)
    if mode == "mapped":
        for index in range(len(files)):
            files.map(index)
    if mode in ("direct", "uring"):
        _require_direct(files, mode)
    tell_once(logging.INFO, f"reading {mode}: asked for")
    return [_step(every, mode)]


def for_device(step: Step, threads: int) -> Step:
    """The same jobs by way of a ring of pinned memory: out of the page cache by reads, past it by direct ones."""
    past_cache = step.way in (DIRECT, URING)
    threads = max(1, min(threads, len(step.order), DIRECT_LANES if past_cache else threads))
    return Step(step.order, DIRECT if past_cache else BUFFERED, -1, threads, threads, 0)


def _require_direct(files: FileSet, mode: str) -> None:
    for index, path in enumerate(files.paths):
        if not files.open_direct(index):
            raise ModeUnavailable(f"{path}: its file system has no O_DIRECT, which {mode} wants: set {SETTING}=auto")
        if mode == "uring" and files.file_system(index) in (_FUSE, 0):
            # The kernel (6.18) goes on after a short read at the place where that began: other bytes, and no error.
            raise ModeUnavailable(f"{path}: io_uring reads wrong bytes from some FUSE file systems: set {SETTING}=auto")
    refused = checkpoint_reader.uring_refused() if mode == "uring" else 0
    if refused:
        raise ModeUnavailable(
            f"io_uring is not allowed here ({os.strerror(refused)}: kernel.io_uring_disabled, or a container's seccomp "
            f"profile): set {SETTING}=auto"
        )


def _auto(files: FileSet, jobs: JobList) -> list[Step]:
    for index in range(len(files)):
        try:
            files.map(index)
        except StorageError as error:  # no mappings on this file system, or no address space
            tell_once(logging.INFO, f"reading buffered: {error}")
            return [_step(array("q", range(len(jobs))), "buffered")]
    by_reading = any(not _may_ask(files.descriptor(index)) for index in range(len(files)))
    shares = jobs.resident(by_reading)
    warm = array("q", (job for job, share in enumerate(shares) if share >= _WARM))
    cold = array("q", (job for job, share in enumerate(shares) if share < _WARM))
    plan = []
    if cold:
        without = next((path for index, path in enumerate(files.paths) if not files.open_direct(index)), None)
        if without is None:
            step = _step(cold, "direct")
            local = all(files.file_system(index) in _LOCAL for index in range(len(files)))
            if not local and len(cold) >= _PROBE_JOBS:
                step = step._replace(other_way=BUFFERED, read_ahead=_READ_AHEAD_JOBS)
            plan.append(step)
            tell_once(
                logging.INFO,
                "reading direct what the page cache does not have: the file system has O_DIRECT"
                + ("" if local else "; buffered where that proves faster"),
            )
        else:
            plan.append(_step(cold, "buffered"))
            tell_once(logging.INFO, f"reading buffered: the file system of {without} has no O_DIRECT")
    if warm:
        step = _step(warm, "mapped")
        if len(warm) >= _PROBE_JOBS:
            step = step._replace(other_way=BUFFERED)
        tell_once(
            logging.INFO,
            "reading mapped what the page cache has"
            + (", or buffered where that proves faster" if step.other_way == BUFFERED else ""),
        )
        plan.append(step._replace(read_ahead=0))
    return plan


def _may_ask(descriptor: int) -> bool:
    """Whether mincore tells the truth about a file: to who owns it or may write it; to others all is in memory."""
    owner = os.fstat(descriptor).st_uid
    return os.geteuid() in (0, owner) or os.access(f"/proc/self/fd/{descriptor}", os.W_OK)


def _step(order: array[int], label: str) -> Step:
    cores = len(os.sched_getaffinity(0))
    if label == "direct":
        threads = min(DIRECT_LANES, max(1, len(order)))
        return Step(order, DIRECT, -1, threads, threads, 0)
    if label == "uring":
        threads = 1 if cores < 8 else 2
        lanes = max(threads, min(DIRECT_LANES, len(order)) // threads * threads)
        return Step(order, URING, -1, threads, lanes, 0)
    threads = max(1, min(cores, len(order), 16))
    way = MAPPED if label == "mapped" else BUFFERED
    return Step(order, way, -1, threads, threads, _READ_AHEAD_JOBS if label == "buffered" else 0)


_told: set[str] = set()
_told_lock = threading.Lock()


def tell_once(level: int, message: str) -> None:
    """Logs what no one has to hear twice in a process."""
    with _told_lock:
        if message in _told:
            return
        _told.add(message)
    _log.log(level, "%s", message)


def tell_fallbacks(outcome: Outcome) -> None:
    """Says once what a read could not do as planned."""
    if number := outcome["register_error"]:
        why = "RLIMIT_MEMLOCK is too small" if number == errno.ENOMEM else os.strerror(number)
        tell_once(logging.INFO, f"io_uring reads into memory that is not pinned: {why}")
    if number := outcome["setup_error"]:
        tell_once(logging.INFO, f"io_uring was refused ({os.strerror(number)}): direct reads instead")
    if outcome["fell_back"]:
        tell_once(logging.INFO, "O_DIRECT was refused for some reads: these went through the page cache")
