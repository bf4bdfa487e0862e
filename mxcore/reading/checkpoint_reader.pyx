"""Reads the jobs of a list, in the way it is told. Types and documentation: checkpoint_reader.pyi.

The work is in C (read_parts.h says what a part, a job and a piece are); here are the checks, the memory between disk and
destination, what the calling thread does between two reads, and the errors.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.string cimport memset

from mxcore.reading.device_ring cimport DeviceRing
from mxcore.reading.cufile cimport FileHandles
from mxcore.digest.digest cimport mx_xxh3_use, xxh3_functions
from mxcore.reading.file_set cimport FileSet
from mxcore.reading.read_jobs cimport _Int64s, JobList
from mxcore.reading.read_parts cimport mx_file, mx_job, mx_limits, mx_part

import array
import os

from mxcore.errors import StorageError, TruncatedRead
from mxcore.memory import HostBuffer

cdef extern from "reading/uring_way.h" nogil:
    ctypedef struct mx_work:
        const mx_part* parts
        mx_file* files
        const mx_job* jobs
        const int64_t* order
        size_t count
        mx_limits limits
        int way, other_way, read_ahead
        uint64_t* digests
        char* slots
        int64_t slot_bytes
        int lanes, threads
        int (*tick)(void*) noexcept nogil
        void* tick_data
        void (*run)(mx_work*, int) noexcept nogil
        void* run_data
        size_t next, fell_back
        int stopped, register_error, failed_setup, error
        int64_t done_bytes, read_bytes
        int64_t probe_ns[2]
        int64_t probe_bytes[2]
        int64_t failed_file, failed_offset, failed_bytes, failed_got
    enum: MX_BUFFERED, MX_MAPPED, MX_DIRECT, MX_URING, MX_MAX_LANES
    void mx_run_work(mx_work* work)
    int mx_bus_guard_begin()
    void mx_bus_guard_end()
    int mx_uring_refused()

cdef extern from "native/clock.h" nogil:
    int64_t mx_now_ns()

cdef extern from "native/threads.h":
    enum: MX_MOST_THREADS

cdef extern from "reading/device_load.h" nogil:
    void mx_device_jobs(mx_work* work, int index)

cdef enum:
    PAGE_BYTES = 4096
    TICK_NS = 100_000_000
    MOST_SLOT_BYTES = 8 * 1024 * 1024  # of one read past the page cache: smaller ones leave a disk idle while they are copied

BUFFERED, MAPPED, DIRECT, URING = MX_BUFFERED, MX_MAPPED, MX_DIRECT, MX_URING
MAX_THREADS, MAX_LANES = MX_MOST_THREADS, MX_MAX_LANES
SLOT_PIECE_BYTES = MOST_SLOT_BYTES

mx_xxh3_use(xxh3_functions())


cdef struct Pulse:  # what `tick` is given
    int64_t looked_ns
    void* caller


@cython.internal
@cython.final
cdef class Caller:
    """What the calling thread does between two reads: Ctrl-C, progress."""
    cdef mx_work* work
    cdef object progress
    cdef object error

    cdef int look(self) noexcept:
        try:
            PyErr_CheckSignals()
            if self.progress is not None:
                self.progress(self.work.done_bytes)
        except BaseException as error:
            self.error = error  # raised when all threads have ended
            return 1
        return 0


cdef int look(void* caller) noexcept with gil:
    return (<Caller>caller).look()


cdef int tick(void* data) noexcept nogil:
    cdef Pulse* pulse = <Pulse*>data
    cdef int64_t now = mx_now_ns()
    if now - pulse.looked_ns < TICK_NS:
        return 0
    pulse.looked_ns = now
    return look(pulse.caller)


cdef object failure(FileSet files, mx_work* work):
    path = files.paths[work.failed_file]
    wanted = f"{path}: {work.failed_bytes} bytes at {work.failed_offset}"
    where = {"file": str(path), "offset": work.failed_offset, "wanted": work.failed_bytes, "got": work.failed_got}
    files.check_unchanged()
    if work.error == 0:
        return TruncatedRead(f"{wanted} wanted, but the file ends after {work.failed_got} of them: it is not complete, or "
                             "was cut short meanwhile", **where)
    reason = "the storage does not give what is mapped" if work.error < 0 else os.strerror(work.error)
    return StorageError(f"{wanted} cannot be read (after {work.failed_got}): {reason}", errno=max(0, work.error),
                        **where)


cdef int check(JobList jobs, _Int64s order, int way, int other_way, int threads, int lanes) except -1:
    cdef size_t index
    if not MX_BUFFERED <= way <= MX_URING or not -1 <= other_way < MX_URING or (other_way >= 0 and way == MX_URING):
        raise ValueError(f"ways {way} and {other_way}")
    if not 1 <= threads <= MX_MOST_THREADS or not threads <= lanes <= MX_MAX_LANES:
        raise ValueError(f"{threads} threads, {lanes} lanes: 1 to {MX_MOST_THREADS}, and up to {MX_MAX_LANES}, at least "
                         "one for each thread")
    for index in range(order.count):
        if not 0 <= order.values[index] < <int64_t>jobs.job_count:
            raise ValueError(f"there is no job {order.values[index]}")
    return 0


cdef int check_files(FileSet files, bint mapped) except -1:
    cdef size_t index
    for index in range(files.count):
        files.require(index)
        if mapped and files.files[index].map == NULL and files.sizes[index]:
            raise ValueError(f"{files.paths[index]} is not mapped")
    return 0


cdef int run(mx_work* work, slots, bint mapped, DeviceRing device) except -1:
    if mapped and mx_bus_guard_begin() != 0:
        raise StorageError(f"SIGBUS cannot be caught: {os.strerror(errno)}")
    view = memoryview(slots) if slots is not None else None  # nobody closes it meanwhile
    try:
        with nogil:
            mx_run_work(work)
    finally:
        if device is not None:
            device.load.reads = NULL
        if mapped:
            mx_bus_guard_end()
        if view is not None:
            view.release()
    return 0


def slot_bytes(JobList jobs not None):
    return min(jobs.limits.piece_bytes, <int64_t>MOST_SLOT_BYTES) + 2 * PAGE_BYTES


def read_jobs(JobList jobs not None, order, *, way, other_way=-1, threads=1, lanes=1, read_ahead=0, slots=None,
              digests=None, progress=None, DeviceRing device=None, FileHandles straight=None):
    cdef mx_work work
    cdef Pulse pulse
    cdef FileSet files = jobs.files
    cdef _Int64s chosen = _Int64s(order, "order")
    cdef _Int64s made = None
    cdef Caller caller = Caller()
    cdef bint mapped = way == MX_MAPPED or other_way == MX_MAPPED
    cdef bint past_cache = way >= MX_DIRECT or other_way >= MX_DIRECT
    memset(&work, 0, sizeof(work))
    check(jobs, chosen, way, other_way, threads, lanes)
    check_files(files, mapped)
    if jobs.digest_count:
        made = _Int64s(digests, "digests")
        if <int64_t>made.count != jobs.digest_count:
            raise ValueError(f"{jobs.digest_count} digests, but room for {made.count}")
        work.digests = <uint64_t*>made.values
    if device is not None:
        device.require_open()
        if jobs.limits.piece_bytes != device.piece or threads > device.load.threads or mapped:
            raise ValueError(f"pieces of {jobs.limits.piece_bytes} bytes by {threads} threads on a ring for "
                             f"{device.piece} and {device.load.threads}, way {way}")
        work.run = mx_device_jobs
        work.run_data = &device.load
        device.load.reads = NULL
        if straight is not None:
            if straight.files is not files:
                raise ValueError("the handles are of other files than the jobs")
            straight.begin()
            device.load.reads = &straight.reads
    elif straight is not None:
        raise ValueError("handles of cuFile are for a device alone")
    elif past_cache:
        if slots is None or slots.size_bytes < lanes * slot_bytes(jobs) or slots.address % PAGE_BYTES:
            raise ValueError(f"{lanes} lanes want slots of {lanes * slot_bytes(jobs)} bytes")
        work.slots = <char*><uintptr_t>slots.address
    work.slot_bytes = slot_bytes(jobs)
    work.parts = jobs.parts
    work.files = files.files
    work.jobs = jobs.jobs
    work.limits = jobs.limits
    if past_cache and device is None:
        work.limits.piece_bytes = work.slot_bytes - 2 * PAGE_BYTES
    work.order = chosen.values
    work.count = chosen.count
    work.way, work.other_way = way, other_way
    work.threads, work.lanes = threads, lanes
    work.read_ahead = read_ahead
    work.tick = tick
    work.tick_data = &pulse
    pulse.looked_ns = mx_now_ns()
    pulse.caller = <void*>caller
    caller.work = &work
    caller.progress = progress
    files.begin()
    try:
        run(&work, slots, mapped, device)
        if caller.error is not None:
            raise caller.error
        if device is not None:
            device.raise_failure()
        if work.stopped:
            raise failure(files, &work)
    finally:
        files.end()
    return {
        "straight_bytes": straight.reads.bytes if straight is not None else 0,
        "left": array.array("q", straight.left() if straight is not None else ()),
        "done_bytes": work.done_bytes, "read_bytes": work.read_bytes, "fell_back": work.fell_back,
        "register_error": work.register_error, "setup_error": work.failed_setup,
        "seconds": (work.probe_ns[0] / 1e9, work.probe_ns[1] / 1e9), "bytes": (work.probe_bytes[0], work.probe_bytes[1]),
    }


def uring_refused():
    return mx_uring_refused()
