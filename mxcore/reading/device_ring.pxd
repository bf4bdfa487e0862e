# cython: language_level=3
from libc.stdint cimport int64_t, uint64_t

from mxcore.cuda.context cimport Context
from mxcore.cuda.driver cimport mx_context, mx_cuda_table, mx_event, mx_function, mx_stream
from mxcore.cuda.digest cimport Kernels
from mxcore.cuda.stream cimport Event
from mxcore.reading.cufile cimport mx_cufile_reads

cdef extern from "reading/device_load.h" nogil:
    enum: MX_RECORD_BYTES, MX_DEVICE_THREADS, MX_DEVICE_SLOTS
    ctypedef struct mx_device_load:
        const mx_cuda_table* cuda
        mx_context context
        mx_function stitch
        mx_event after
        char* slots
        uint64_t slots_on_device
        int64_t slot_bytes
        int threads, slots_each
        mx_stream* streams
        mx_event* events
        int status
        const char* call
        int64_t copies, launches
        mx_cufile_reads* reads

cdef class DeviceRing:
    cdef mx_device_load load
    cdef readonly Context context
    cdef readonly object buffer  # HostBuffer
    cdef object registration  # None: not pinned
    cdef object view
    cdef Kernels kernels
    cdef list streams
    cdef list events
    cdef Event after
    cdef int64_t piece
    cdef int require_open(self) except -1
    cdef int raise_failure(self) except -1
