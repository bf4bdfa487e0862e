# cython: language_level=3
from mxcore.cuda.context cimport ContextObject

cdef class Stream(ContextObject):
    pass  # `handle` is an mx_stream

cdef class Event(ContextObject):
    cdef unsigned int flags  # `handle` is an mx_event
