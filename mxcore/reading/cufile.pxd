# cython: language_level=3
from libc.stdint cimport int64_t
from posix.types cimport off_t

from mxcore.reading.file_set cimport FileSet

cdef extern from "reading/cufile_library.h" nogil:
    enum: MX_CUFILE_CUDA_DRIVER_ERROR, MX_CUFILE_ALLOW_COMPAT_MODE, MX_CUFILE_POLLS
    ctypedef struct mx_cufile_error:
        int err, cu_err
    ctypedef struct mx_cufile_properties:
        pass
    ctypedef struct mx_cufile_table:
        mx_cufile_error (*open)() noexcept nogil
        mx_cufile_error (*close)() noexcept nogil
        long (*use_count)() noexcept nogil
        mx_cufile_error (*properties)(mx_cufile_properties*) noexcept nogil
        mx_cufile_error (*version)(int*) noexcept nogil
        mx_cufile_error (*set_flag)(int, bint) noexcept nogil
        void (*handle_deregister)(void*) noexcept nogil
        Py_ssize_t (*read)(void*, void*, size_t, off_t, off_t) noexcept nogil
    int mx_cufile_open(const char* path, int stand_in, mx_cufile_table* table, char* reason, size_t reason_bytes)
    unsigned int mx_cufile_control_flags(const mx_cufile_properties* properties)
    mx_cufile_error mx_cufile_register(const mx_cufile_table* table, int fd, void** handle)

cdef extern from "reading/cufile_read.h" nogil:
    enum: MX_CUFILE_BLOCK, MX_CUFILE_LEAST
    ctypedef struct mx_cufile_reads:
        const mx_cufile_table* cufile
        void** handles
        int64_t bytes
        int given_up
        size_t failures
        int64_t* left
        int64_t file, offset, wanted, result
        int error

cdef class FileHandles:
    cdef readonly FileSet files  # held: its descriptors outlive the handles
    cdef mx_cufile_reads reads
    cdef size_t count
    cdef bint holds_driver
    cdef int require(self, size_t index) except -1
    cdef int begin(self) except -1  # before a run
    cdef list left(self)  # jobs of the last run that are to be read again
    cdef object read_failure(self, int64_t file, int64_t offset, int64_t wanted, int64_t result, int error)
    cdef object release(self)  # what the driver said at its end, or None
