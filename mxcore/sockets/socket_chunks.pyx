"""Chunks over TCP connections. Types and documentation: socket_chunks.pyi."""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

import errno
import os
import ssl

from mxcore.native.chunk_jobs cimport (
    MX_MOST_THREADS, chunks_ended, mx_chunk_ask, mx_chunk_job, mx_chunk_pool, mx_chunk_wake,
)
from mxcore.digest.digest cimport mx_xxh3_use, xxh3_functions
from mxcore.memory import merge_adjoining

cdef extern from "Python.h":
    object PyMemoryView_FromMemory(char* place, Py_ssize_t size, int flags)
    int PyBUF_READ, PyBUF_WRITE

cdef extern from "sockets/socket_chunks.h" nogil:
    ctypedef struct mx_socket_link:
        int fd
        void* tls
    ctypedef struct mx_tls_functions:
        Py_ssize_t (*send)(void*, const void*, size_t) noexcept nogil
        Py_ssize_t (*take)(void*, void*, size_t) noexcept nogil
        void* (*begin)() noexcept nogil
        void (*end)(void*) noexcept nogil
    mx_tls_functions mx_tls
    ctypedef struct mx_socket_table:
        const uint64_t* addresses
        const uint64_t* lengths
        const uint64_t* starts
        size_t chunks
        unsigned char* allowed
    int mx_socket_serve(const mx_socket_table* table, const mx_socket_link* link, uint64_t* sent)

cdef extern from "sockets/socket_pool.h" nogil:
    ctypedef struct mx_socket_pool:
        mx_chunk_pool jobs
        int hashed
        uint64_t received
    int mx_socket_pool_open(mx_socket_pool* pool, const mx_socket_link* links, size_t count, int hashed)
    void mx_socket_pool_close(mx_socket_pool* pool)

cdef extern from *:
    """
    static inline uint64_t mx_look(const uint64_t *value) { return __atomic_load_n(value, __ATOMIC_RELAXED); }
    static inline void mx_allow(unsigned char *place, unsigned char bits)
    {
        __atomic_fetch_or(place, bits, __ATOMIC_RELEASE);
    }
    static inline void mx_forbid(unsigned char *place) { __atomic_store_n(place, 0, __ATOMIC_RELEASE); }
    /* Python's state of a thread of ours is kept: to make it anew for each record took 15 us. */
    static void *mx_python_begin(void)
    {
        PyGILState_Ensure();
        return PyEval_SaveThread();
    }
    static void mx_python_end(void *state)
    {
        PyEval_RestoreThread(state);
        PyGILState_Release(PyGILState_UNLOCKED);
    }
    """
    void* mx_python_begin() noexcept nogil
    void mx_python_end(void* state) noexcept nogil
    uint64_t mx_look(const uint64_t* value) nogil
    void mx_allow(unsigned char* place, unsigned char bits) nogil
    void mx_forbid(unsigned char* place) nogil

mx_xxh3_use(xxh3_functions())


cdef Py_ssize_t tls_send(void* tls, const void* data, size_t size) noexcept with gil:
    cdef object view = PyMemoryView_FromMemory(<char*>data, size, PyBUF_READ)
    cdef Py_ssize_t done = 0
    try:
        while done < <Py_ssize_t> size:
            done += (<object>tls).write(view[done:])
    except Exception as error:
        return -failure_of(error)
    return 0


cdef Py_ssize_t tls_take(void* tls, void* data, size_t size) noexcept with gil:
    try:
        # Not recv_into: once `shutdown` was called on the object, that one takes what comes as it is.
        return (<object>tls).read(size, PyMemoryView_FromMemory(<char*>data, size, PyBUF_WRITE))
    except Exception as error:
        return -failure_of(error)


cdef int failure_of(error) noexcept:
    """The errno of a TLS connection's failure: EBADMSG where a record is not what the other side sent."""
    if isinstance(error, ssl.SSLEOFError):
        return errno.ECONNRESET
    if isinstance(error, ssl.SSLError):
        return errno.EBADMSG
    found = getattr(error, "errno", None)
    return found if isinstance(found, int) and found > 0 else errno.EIO


mx_tls.send, mx_tls.take = tls_send, tls_take
mx_tls.begin, mx_tls.end = mx_python_begin, mx_python_end


cdef mx_socket_link link_of(connection) except *:
    cdef mx_socket_link link
    link.fd = connection.fileno()
    link.tls = <void*>connection if isinstance(connection, ssl.SSLSocket) else NULL
    return link


@cython.no_gc_clear  # the threads use the connections until they are joined
cdef class SocketReads:
    cdef mx_socket_pool pool
    cdef bint is_open
    cdef tuple connections

    def __init__(self, connections not None, *, bint hashed):
        cdef mx_socket_link[MX_MOST_THREADS] links
        cdef size_t count = 0
        if self.is_open:
            raise ValueError("opened already")
        if not 1 <= len(connections) <= MX_MOST_THREADS:
            raise ValueError(f"{len(connections)} connections, have to be 1 to {MX_MOST_THREADS}")
        self.connections = tuple(connections)
        for connection in self.connections:
            links[count] = link_of(connection)
            count += 1
        cdef int error = mx_socket_pool_open(&self.pool, links, count, hashed)
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
    cdef size_t allowed_bytes

    def __init__(self, const uint64_t[::1] addresses not None, const uint64_t[::1] lengths not None,
                 const uint64_t[::1] segment_starts not None):
        if self.table.allowed != NULL:
            raise ValueError("made already")
        cdef Py_ssize_t chunk, chunks = segment_starts.shape[0] - 1, count = lengths.shape[0]
        if addresses.shape[0] != count or count < 1 or chunks < 1:
            raise ValueError(f"{addresses.shape[0]} addresses, {count} lengths and {chunks} chunks")
        for chunk in range(chunks):
            if segment_starts[chunk] > segment_starts[chunk + 1]:
                raise ValueError(f"segment_starts falls at chunk {chunk}")
        if segment_starts[0] != 0 or segment_starts[chunks] != <uint64_t> count:
            raise ValueError(f"segment_starts has to begin with 0 and to end with the number of segments, {count}")
        self.allowed_bytes = (chunks + 7) // 8
        self.table.allowed = <unsigned char*>calloc(1, self.allowed_bytes)
        if self.table.allowed == NULL:
            raise MemoryError
        self.owners = (addresses, lengths, segment_starts)
        self.table.addresses, self.table.lengths = &addresses[0], &lengths[0]
        self.table.starts, self.table.chunks = &segment_starts[0], chunks

    def __dealloc__(self):
        free(self.table.allowed)

    def allow(self, chunks not None):
        cdef size_t chunk
        for number in chunks:
            chunk = number
            if chunk >= self.table.chunks:
                raise ValueError(f"chunk {chunk} of {self.table.chunks}")
            mx_allow(&self.table.allowed[chunk // 8], 1 << (chunk % 8))

    def forbid_all(self):
        cdef size_t index
        for index in range(self.allowed_bytes):
            mx_forbid(&self.table.allowed[index])

    def serve(self, connection not None):
        cdef mx_socket_link link = link_of(connection)
        cdef int error
        with nogil:
            error = mx_socket_serve(&self.table, &link, &self.sent)
        return error

    @property
    def sent_bytes(self):
        return mx_look(&self.sent)
