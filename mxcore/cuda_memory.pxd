# cython: language_level=3
from mxcore.cuda_driver cimport mx_device_address
from mxcore.cuda_stream cimport Context

cdef class PinnedBuffer:
    cdef readonly Context context
    cdef void* base
    cdef size_t length
    cdef int free(self) noexcept

cdef class DeviceBuffer:
    cdef readonly Context context
    cdef mx_device_address base
    cdef size_t length
    cdef size_t export_count
    cdef int free(self) noexcept
