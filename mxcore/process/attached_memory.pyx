"""Another process' memory, read by cross-memory attach. Types and documentation: attached_memory.pyi."""

cimport cython
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy

import os

from mxcore.native.chunk_jobs cimport (
    MX_MOST_THREADS, chunks_ended, mx_chunk_ask, mx_chunk_job, mx_chunk_owned, mx_chunk_pool, mx_chunk_wake,
)
from mxcore.digest.digest cimport mx_xxh3_use, xxh3_functions
from mxcore.memory import merge_adjoining

cdef extern from "process/attached_read.h" nogil:
    ctypedef int pid_t
    int mx_attached_allow()
    int mx_attached_read(pid_t pid, const uint64_t* local, const uint64_t* remote, const uint64_t* lengths,
                         size_t count, uint64_t* digest)

cdef extern from "process/attached_pool.h" nogil:
    ctypedef struct mx_attached_pool:
        mx_chunk_pool jobs
        int hashed
    int mx_attached_open(mx_attached_pool* pool, pid_t pid, int hashed, size_t threads)
    int mx_attached_close(mx_attached_pool* pool, int64_t longest_nanoseconds)

mx_xxh3_use(xxh3_functions())


@cython.boundscheck(False)
@cython.wraparound(False)
def read_attached(int pid, local_addresses not None, remote_addresses not None, lengths not None, *, bint hashed=True):
    if pid <= 0:
        raise ValueError(f"{pid} is no process")
    merged = merge_adjoining(local_addresses, remote_addresses, lengths)
    cdef const uint64_t[::1] local = merged[0], remote = merged[1], sizes = merged[2]
    cdef size_t count = sizes.shape[0]
    cdef uint64_t digest = 0
    cdef int error = 0
    if count:
        with nogil:
            error = mx_attached_read(pid, &local[0], &remote[0], &sizes[0], count, &digest if hashed else NULL)
    if error:
        raise OSError(error, os.strerror(error))
    if not hashed:
        return b""
    if not count:
        raise ValueError("nothing to read has no digest")
    return digest.to_bytes(8, "little")


def allow_attaching():
    return mx_attached_allow() == 0


cdef class AttachedReads:
    cdef mx_attached_pool pool
    cdef bint is_open
    cdef bint is_kept  # for ever: a thread may still use it

    def __init__(self, int pid, *, size_t threads, bint hashed):
        if pid <= 0:
            raise ValueError(f"{pid} is no process")
        if not 1 <= threads <= MX_MOST_THREADS:
            raise ValueError(f"threads is {threads}, has to be 1 to {MX_MOST_THREADS}")
        if self.is_open:
            raise ValueError("opened already")
        cdef int error = mx_attached_open(&self.pool, pid, hashed, threads)
        if error:
            raise OSError(error, os.strerror(error))
        self.is_open = True

    def __dealloc__(self):
        if self.is_open:
            with nogil:
                mx_attached_close(&self.pool, -1)

    def ask(self, uint64_t key, local_addresses not None, remote_addresses not None, lengths not None):
        merged = merge_adjoining(local_addresses, remote_addresses, lengths)
        if not self.is_open or self.is_kept or not mx_chunk_owned(&self.pool.jobs):  # no Python from here on
            raise ValueError("closed")
        cdef const uint64_t[::1] values
        cdef size_t count = len(merged[0]), place = 0
        if not count:
            raise ValueError("nothing to read has no digest")
        cdef mx_chunk_job* job = <mx_chunk_job*>malloc(sizeof(mx_chunk_job) + 3 * count * sizeof(uint64_t))
        if job == NULL:
            raise MemoryError
        for values in (merged[0], merged[2], merged[1]):
            memcpy(job.stretches + place, &values[0], count * sizeof(uint64_t))
            place += count
        job.key, job.count = key, count
        mx_chunk_ask(&self.pool.jobs, job)

    def ended(self, double seconds=-1.0):
        if not mx_chunk_owned(&self.pool.jobs):
            return []
        return chunks_ended(&self.pool.jobs, <int64_t> (min(seconds, 1e9) * 1e9), self.pool.hashed)

    def wake(self):
        if self.is_open and mx_chunk_owned(&self.pool.jobs):
            mx_chunk_wake(&self.pool.jobs)

    def close(self, double seconds=-1.0):
        cdef int ended
        cdef int64_t longest = <int64_t> (min(seconds, 1e9) * 1e9)
        if not self.is_open:
            return True
        with nogil:
            ended = mx_attached_close(&self.pool, longest)
        if ended:
            self.is_open = False
            if self.is_kept:
                self.is_kept = False
                Py_DECREF(self)
        elif not self.is_kept:
            self.is_kept = True
            Py_INCREF(self)
        return bool(ended)
