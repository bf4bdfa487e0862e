"""Chunks over TCP connections. Types and documentation: socket_chunks.pyi."""

cimport cython
from cpython.bytes cimport PyBytes_AsString
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

import os

from mxcore.native.chunk_jobs cimport (
    MX_MOST_THREADS, chunks_ended, mx_chunk_ask, mx_chunk_job, mx_chunk_pool, mx_chunk_wake,
)
from mxcore.digest.digest cimport mx_xxh3_use, xxh3_functions
from mxcore.memory import merge_adjoining

cdef extern from "sockets/socket_pool.h" nogil:
    ctypedef struct mx_socket_pool:
        mx_chunk_pool jobs
        int hashed
        uint64_t received
    int mx_socket_pool_open(mx_socket_pool* pool, const int* fds, size_t count, int hashed)
    void mx_socket_pool_close(mx_socket_pool* pool)

cdef extern from "sockets/socket_chunks.h" nogil:
    ctypedef struct mx_socket_table:
        const uint64_t* addresses
        const uint64_t* lengths
        const uint64_t* starts
        size_t chunks
        unsigned char* have
    int mx_socket_serve(const mx_socket_table* table, int fd, uint64_t* sent)

cdef extern from *:
    """
    static inline uint64_t mx_look(const uint64_t *value) { return __atomic_load_n(value, __ATOMIC_RELAXED); }
    static inline void mx_put(unsigned char *place, unsigned char value)
    {
        __atomic_store_n(place, value, __ATOMIC_RELEASE);
    }
    """
    uint64_t mx_look(const uint64_t* value) nogil
    void mx_put(unsigned char* place, unsigned char value) nogil

mx_xxh3_use(xxh3_functions())


cdef class SocketReads:
    cdef mx_socket_pool pool
    cdef bint is_open

    def __init__(self, fds not None, *, bint hashed):
        cdef int[MX_MOST_THREADS] numbers
        cdef size_t count = 0
        if self.is_open:
            raise ValueError("opened already")
        if not 1 <= len(fds) <= MX_MOST_THREADS:
            raise ValueError(f"{len(fds)} connections, have to be 1 to {MX_MOST_THREADS}")
        for fd in fds:
            numbers[count] = fd
            count += 1
        cdef int error = mx_socket_pool_open(&self.pool, numbers, count, hashed)
        if error:
            raise OSError(error, os.strerror(error))
        self.is_open = True

    def __dealloc__(self):
        self._close()  # not a method that a subclass may have replaced

    def ask(self, uint64_t chunk, addresses not None, lengths not None):
        if not self.is_open:
            raise ValueError("closed")
        if chunk >> 32:
            raise ValueError(f"chunk {chunk} has no place in a request")
        merged = merge_adjoining(addresses, addresses, lengths)
        cdef const uint64_t[::1] places = merged[0], sizes = merged[2]
        cdef size_t count = sizes.shape[0]
        if not count:
            raise ValueError("a chunk without bytes")
        cdef mx_chunk_job* job = <mx_chunk_job*>malloc(sizeof(mx_chunk_job) + 2 * count * sizeof(uint64_t))
        if job == NULL:
            raise MemoryError
        memcpy(job.stretches, &places[0], count * sizeof(uint64_t))
        memcpy(job.stretches + count, &sizes[0], count * sizeof(uint64_t))
        job.key, job.count = chunk, count
        mx_chunk_ask(&self.pool.jobs, job)

    def ended(self, double seconds):
        return chunks_ended(&self.pool.jobs, <int64_t> (min(max(seconds, 0.0), 1e9) * 1e9), self.pool.hashed)

    def wake(self):
        if self.is_open:
            mx_chunk_wake(&self.pool.jobs)

    @property
    def received_bytes(self):
        return mx_look(&self.pool.received)

    def close(self):
        self._close()

    cdef void _close(self) noexcept:
        if self.is_open:
            self.is_open = False
            with nogil:
                mx_socket_pool_close(&self.pool)


@cython.boundscheck(False)
@cython.wraparound(False)
cdef class ChunkSender:
    cdef mx_socket_table table
    cdef uint64_t sent
    cdef object owners  # of the arrays
    cdef size_t have_bytes

    def __init__(self, const uint64_t[::1] addresses not None, const uint64_t[::1] lengths not None,
                 const uint64_t[::1] segment_starts not None):
        if self.table.have != NULL:
            raise ValueError("made already")
        cdef Py_ssize_t chunk, chunks = segment_starts.shape[0] - 1, count = lengths.shape[0]
        if addresses.shape[0] != count or count < 1 or chunks < 1:
            raise ValueError(f"{addresses.shape[0]} addresses, {count} lengths and {chunks} chunks")
        for chunk in range(chunks):
            if segment_starts[chunk] > segment_starts[chunk + 1]:
                raise ValueError(f"segment_starts falls at chunk {chunk}")
        if segment_starts[0] != 0 or segment_starts[chunks] != <uint64_t> count:
            raise ValueError(f"segment_starts has to begin with 0 and to end with the number of segments, {count}")
        self.have_bytes = (chunks + 7) // 8
        self.table.have = <unsigned char*>calloc(1, self.have_bytes)
        if self.table.have == NULL:
            raise MemoryError
        self.owners = (addresses, lengths, segment_starts)
        self.table.addresses, self.table.lengths = &addresses[0], &lengths[0]
        self.table.starts, self.table.chunks = &segment_starts[0], chunks

    def __dealloc__(self):
        free(self.table.have)

    def set_have(self, bytes have not None):
        cdef size_t index
        if <size_t> len(have) != self.have_bytes:
            raise ValueError(f"{len(have)} bytes for {self.table.chunks} chunks")
        cdef const unsigned char* values = <const unsigned char*>PyBytes_AsString(have)
        for index in range(self.have_bytes):
            mx_put(&self.table.have[index], values[index])

    def serve(self, int fd):
        cdef int error
        with nogil:
            error = mx_socket_serve(&self.table, fd, &self.sent)
        return error

    @property
    def sent_bytes(self):
        return mx_look(&self.sent)
