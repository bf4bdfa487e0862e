# cython: language_level=3
from mxcore.cuda.context cimport ContextObject
from mxcore.cuda.driver cimport mx_device_address

cdef class Memory(ContextObject):
    cdef size_t length  # `handle` is the first byte's address
    cdef void counted(self, Py_ssize_t by) noexcept  # adds to what lives

cdef class PinnedBuffer(Memory):
    pass

cdef class Registration(Memory):
    cdef object buffer
    cdef object view  # held: nobody closes the buffer meanwhile
    cdef mx_device_address on_device
    cdef int mapped

cdef class DeviceBuffer(Memory):
    cdef size_t export_count
