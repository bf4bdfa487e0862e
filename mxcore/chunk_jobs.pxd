"""Declarations of chunk_jobs.h."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

cdef extern from "chunk_jobs.h" nogil:
    ctypedef struct mx_chunk_job:
        uint64_t key, digest
        int error
        size_t count
        uint64_t *stretches
    ctypedef struct mx_chunk_pool:
        pass
    enum: MX_CHUNK_MOST_THREADS

    void mx_chunk_ask(mx_chunk_pool *pool, mx_chunk_job *job)
    void mx_chunk_wake(mx_chunk_pool *pool)
    mx_chunk_job *mx_chunk_take(mx_chunk_pool *pool, int64_t longest_nanoseconds)
