"""XXH3-64 and mixsum-64 over buffers and over raw memory. Types and documentation: digest.pyi.

The hashing runs without the GIL. A buffer's Py_buffer is held until it is done, so that its owner cannot free or
resize it; raw addresses are the caller's to keep alive.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_ND, PyBUF_SIMPLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from libc.stdint cimport uint64_t, uintptr_t

from mxcore.digest.digest cimport mx_xxh3_functions

import array
import sys

cdef extern from "digest/digest_dispatch.h" nogil:
    int mx_digest_choose(int widest)
    uint64_t mx_digest_segments(const uint64_t* addresses, const uint64_t* lengths, size_t count, uint64_t seed)
    const mx_xxh3_functions mx_digest_functions

cdef extern from "digest/mixsum_host.h" nogil:
    int mx_mixsum_choose(int widest)
    uint64_t mx_mixsum_segments(const uint64_t* addresses, const uint64_t* lengths, size_t count)

cdef extern from "native/vector_width.h":
    enum: MX_AVX512

cdef extern from "native/threads.h" nogil:
    enum: MX_MOST_THREADS
    size_t mx_claim(size_t* next)
    void mx_run_together(size_t workers, void (*run)(void* data, int worker) noexcept nogil, void* data)

cdef enum:
    KEEP_GIL_BYTES = 4096  # hashing this much takes less than giving the GIL away and taking it again

cdef tuple FORMATS = (b"Q", b"L", b"@Q", b"@L", b"=Q", b"<Q" if sys.byteorder == "little" else b">Q")

mx_digest_choose(MX_AVX512)
mx_mixsum_choose(MX_AVX512)


cdef const mx_xxh3_functions* xxh3_functions() noexcept:
    return &mx_digest_functions


ctypedef uint64_t (*Digest)(const uint64_t*, const uint64_t*, size_t) noexcept nogil


cdef uint64_t xxh3(const uint64_t* addresses, const uint64_t* lengths, size_t count) noexcept nogil:
    return mx_digest_segments(addresses, lengths, count, 0)


cdef uint64_t mixsum(const uint64_t* addresses, const uint64_t* lengths, size_t count) noexcept nogil:
    return mx_mixsum_segments(addresses, lengths, count)


@cython.internal
@cython.final
cdef class Uint64s:
    """A view on a buffer of native uint64, or on a copy of a sequence of integers; held as long as this object."""
    cdef Py_buffer view
    cdef const uint64_t* values
    cdef size_t count
    cdef bint viewed

    def __cinit__(self, source, str what):
        if not PyObject_CheckBuffer(source):
            source = array.array("Q", source)
        PyObject_GetBuffer(source, &self.view, PyBUF_ND | PyBUF_FORMAT)
        self.viewed = True
        if self.view.ndim != 1 or self.view.itemsize != 8 or self.view.format not in FORMATS:
            raise TypeError(f"{what} has to be a one-dimensional buffer of uint64, or a sequence of integers")
        self.values = <const uint64_t*>self.view.buf
        self.count = <size_t>(self.view.len // 8)

    def __dealloc__(self):
        if self.viewed:
            PyBuffer_Release(&self.view)


cdef int check_segments(Uint64s addresses, Uint64s lengths) except -1:
    cdef size_t index
    if addresses.count != lengths.count:
        raise ValueError(f"{addresses.count} addresses, but {lengths.count} lengths")
    for index in range(addresses.count):
        if lengths.values[index] and (addresses.values[index] == 0
                                      or lengths.values[index] > <uint64_t>-1 - addresses.values[index]):
            raise ValueError(f"segment {index}: {lengths.values[index]} bytes at {addresses.values[index]:#x} "
                             "are no memory")
    return 0


def xxh3_64(data, seed=0):
    cdef Py_buffer view
    cdef uint64_t address, length, digest
    cdef uint64_t start = seed
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        address = <uint64_t><uintptr_t>view.buf
        length = <uint64_t>view.len
        if length <= KEEP_GIL_BYTES:
            digest = mx_digest_segments(&address, &length, 1, start)
        else:
            with nogil:
                digest = mx_digest_segments(&address, &length, 1, start)
    finally:
        PyBuffer_Release(&view)
    return digest


def mixsum_64(data):
    cdef Py_buffer view
    cdef uint64_t address, length, digest
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        address = <uint64_t><uintptr_t>view.buf
        length = <uint64_t>view.len
        with nogil:
            digest = mx_mixsum_segments(&address, &length, 1)
    finally:
        PyBuffer_Release(&view)
    return digest


cdef object of_segments(Digest made, object addresses, object lengths):
    cdef Uint64s places = Uint64s(addresses, "addresses")
    cdef Uint64s sizes = Uint64s(lengths, "lengths")
    cdef uint64_t digest
    check_segments(places, sizes)
    with nogil:
        digest = made(places.values, sizes.values, places.count)
    return digest


def xxh3_64_segments(addresses, lengths):
    return of_segments(xxh3, addresses, lengths)


def mixsum_64_segments(addresses, lengths):
    return of_segments(mixsum, addresses, lengths)


cdef struct Groups:
    Digest made
    const uint64_t* addresses
    const uint64_t* lengths
    const uint64_t* starts  # count + 1
    size_t count
    size_t next  # claimed atomically
    unsigned char* digests  # 8 bytes each, little-endian


cdef void digest_groups(void* data, int worker) noexcept nogil:
    """What each thread runs: takes the next group until none is left."""
    cdef Groups* groups = <Groups*>data
    cdef size_t group, first, last
    cdef uint64_t digest
    cdef int index
    while True:
        group = mx_claim(&groups.next)
        if group >= groups.count:
            return
        first = groups.starts[group]
        last = groups.starts[group + 1]
        digest = groups.made(groups.addresses + first, groups.lengths + first, last - first)
        for index in range(8):
            groups.digests[8 * group + index] = <unsigned char>(digest >> (8 * index))


cdef bytes of_groups(Digest made, object addresses, object lengths, object segment_starts, object threads):
    cdef Uint64s places = Uint64s(addresses, "addresses")
    cdef Uint64s sizes = Uint64s(lengths, "lengths")
    cdef Uint64s starts = Uint64s(segment_starts, "segment_starts")
    cdef Groups groups
    cdef size_t index
    cdef bytes digests
    if not 1 <= threads <= MX_MOST_THREADS:
        raise ValueError(f"threads is {threads}, has to be 1 to {MX_MOST_THREADS}")
    check_segments(places, sizes)
    if starts.count == 0 or starts.values[0] != 0 or starts.values[starts.count - 1] != places.count:
        raise ValueError(f"segment_starts has to begin with 0 and to end with the number of segments, {places.count}")
    for index in range(1, starts.count):
        if starts.values[index] < starts.values[index - 1]:
            raise ValueError(f"segment_starts falls from {starts.values[index - 1]} to {starts.values[index]} "
                             f"at group {index - 1}")
    groups.made = made
    groups.addresses = places.values
    groups.lengths = sizes.values
    groups.starts = starts.values
    groups.count = starts.count - 1
    groups.next = 0
    digests = PyBytes_FromStringAndSize(NULL, 8 * groups.count)
    groups.digests = <unsigned char*>PyBytes_AsString(digests)
    cdef size_t workers = min(<size_t>threads, groups.count)
    with nogil:
        mx_run_together(workers, digest_groups, &groups)
    return digests  # written before anybody else has seen the object


def xxh3_64_many(addresses, lengths, segment_starts, *, threads=1):
    return of_groups(xxh3, addresses, lengths, segment_starts, threads)


def mixsum_64_many(addresses, lengths, segment_starts, *, threads=1):
    return of_groups(mixsum, addresses, lengths, segment_starts, threads)


def _choose_vectors(widest):
    return mx_digest_choose(widest)


def _choose_mixsum_vectors(widest):
    return mx_mixsum_choose(widest)
