# cython: language_level=3
from libc.stdint cimport int64_t

from mxcore.reading.file_set cimport FileSet
from mxcore.reading.read_parts cimport mx_cursor, mx_job, mx_limits, mx_part

cdef class _Int64s:
    cdef Py_buffer view
    cdef const int64_t* values
    cdef size_t count
    cdef bint viewed

cdef class JobList:
    cdef _Int64s table
    cdef readonly FileSet files
    cdef const mx_part* parts
    cdef size_t part_count
    cdef mx_job* jobs
    cdef size_t job_count, capacity
    cdef mx_limits limits
    cdef readonly int64_t total_bytes
    cdef readonly int64_t digest_count
    cdef int check(self, FileSet files) except -1
    cdef int add(self, mx_cursor start, int64_t payload, int64_t digest) except -1
    cdef int64_t payload(self, size_t first, size_t end) noexcept
    cdef int cut(self, size_t first, size_t end) except -1
    cdef int group(self, _Int64s starts) except -1
