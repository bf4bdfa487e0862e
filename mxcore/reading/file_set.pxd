# cython: language_level=3
from libc.stdint cimport int64_t

from mxcore.reading.read_parts cimport mx_file

cdef class FileSet:
    cdef readonly tuple paths
    cdef mx_file* files
    cdef int64_t* sizes
    cdef size_t count  # of both; `paths` may be gone in __dealloc__
    cdef list stamps  # (device, inode, size, time of the last change) when opened
    cdef size_t readers  # that run now, counted under the GIL; the last one closes what is `closing`
    cdef bint closing
    cdef int begin(self) except -1
    cdef void end(self) noexcept
    cdef int opened(self, size_t index, int more) except -2
    cdef object error(self, size_t index, str what, int number)
    cdef object stamp(self, size_t index, expected)
    cdef object changed(self, size_t index, before, now, str when)
    cdef void release(self) noexcept
    cdef int require(self, size_t index) except -1
