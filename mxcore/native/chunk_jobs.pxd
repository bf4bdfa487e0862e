"""Declarations of chunk_jobs.h."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free

cdef extern from "native/threads.h" nogil:
    enum: MX_MOST_THREADS

cdef extern from "native/chunk_jobs.h" nogil:
    ctypedef struct mx_chunk_job:
        uint64_t key, digest
        int error
        size_t count
        uint64_t *stretches
    ctypedef struct mx_chunk_pool:
        pass

    bint mx_chunk_owned(const mx_chunk_pool *pool)
    void mx_chunk_ask(mx_chunk_pool *pool, mx_chunk_job *job)
    void mx_chunk_wake(mx_chunk_pool *pool)
    mx_chunk_job *mx_chunk_take(mx_chunk_pool *pool, int64_t longest_nanoseconds)


cdef inline list chunks_ended(mx_chunk_pool *pool, int64_t longest_nanoseconds, bint hashed):
    """Waits for so long at most (below 0: for ever); takes all that has ended: key, errno or 0, digest."""
    cdef mx_chunk_job *job
    cdef list found = []
    with nogil:
        job = mx_chunk_take(pool, longest_nanoseconds)
    while job != NULL:
        digest = job.digest.to_bytes(8, "little") if hashed and not job.error else b""
        found.append((job.key, job.error, digest))
        free(job)
        job = mx_chunk_take(pool, 0)
    return found
