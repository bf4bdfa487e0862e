# cython: language_level=3
from mxcore.cuda_driver cimport mx_context, mx_cuda_table, mx_event, mx_stream

cdef class Context:
    cdef const mx_cuda_table* cuda
    cdef mx_context handle
    cdef int device
    cdef int ordinal
    cdef object __weakref__
    cdef int enter(self) noexcept nogil
    cdef int leave(self, int status) noexcept nogil

cdef class Stream:
    cdef readonly Context context  # held: the context outlives its streams
    cdef mx_stream handle

cdef class Event:
    cdef readonly Context context
    cdef mx_event handle
