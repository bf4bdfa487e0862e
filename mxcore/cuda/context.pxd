# cython: language_level=3
from libc.stdint cimport uintptr_t

from mxcore.cuda.driver cimport mx_context, mx_cuda_table

cdef class Context:
    cdef const mx_cuda_table* cuda
    cdef mx_context handle
    cdef int device
    cdef int ordinal
    cdef object __weakref__
    cdef int enter(self) noexcept nogil
    cdef int leave(self, int status) noexcept nogil

cdef class ContextObject:
    """Something of the driver's that lives in a context. Subclasses say how it is made and released.

    `create` and `release` are called with the context current, without the GIL; each returns the driver's status.
    """
    cdef readonly Context context  # held: the context outlives what is in it
    cdef uintptr_t handle  # or address; 0: there is none, or not any more
    cdef int create(self) noexcept nogil  # sets `handle`
    cdef int release(self, uintptr_t handle) noexcept nogil
    cdef void released(self) noexcept  # with the GIL, after `release`, whatever that said
    cdef int attempt(self, Context context) noexcept  # `create`; the driver's status
    cdef int make(self, Context context, str call, str what) except -1  # raises CudaError, and there is nothing then
    cdef int free(self) noexcept  # once; the driver's status
    cdef int end(self, str call, str what) except? -1  # `free`, for destructors: warns
