# cython: language_level=3
"""What HostBuffer is made of."""

from libc.stdint cimport uint8_t

cdef class HostBuffer:
    cdef uint8_t* base
    cdef size_t length  # bytes, as asked for
    cdef size_t mapped  # bytes, in whole pages
    cdef size_t alignment
    cdef size_t export_count
    cdef bint huge
    cdef bint left  # to its exports: who made it needs it no longer
    cdef str origin
    cdef int require_open(self) except -1
