"""A device's primary context, and what everything in a context has in common; signatures and docs in context.pyi.

An object that exists has a valid handle, and holds its context: destruction order follows from who holds whom.
Destructors warn instead of raising. A context is pushed around every call that needs one, and popped after it, so that
whatever the thread had current stays so.
"""

cimport cython
from libc.stdint cimport uintptr_t

from mxcore.cuda.context cimport Context, ContextObject
from mxcore.cuda.driver cimport MX_CUDA_SUCCESS, check, cuda_table, mx_context, warn_failed

import threading
import weakref

cdef object contexts_lock = threading.Lock()
cdef object contexts = weakref.WeakValueDictionary()  # device index -> the context that is retained now


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class Context:
    def __cinit__(self, int index):
        cdef mx_context handle = NULL
        cdef int device = 0
        cdef int status
        self.cuda = cuda_table()
        self.ordinal = index
        check(self.cuda.device_get(&device, index), "cuDeviceGet", f"there is no device {index}")
        with nogil:
            status = self.cuda.primary_retain(&handle, device)
        check(status, "cuDevicePrimaryCtxRetain", f"device {index}")
        self.device = device
        self.handle = handle

    def __dealloc__(self):
        cdef int status
        if self.handle != NULL:
            with nogil:
                status = self.cuda.primary_release(self.device)
            warn_failed(status, "cuDevicePrimaryCtxRelease", f"the context of device {self.ordinal}")

    cdef int enter(self) noexcept nogil:
        return self.cuda.context_push(self.handle)

    cdef int leave(self, int status) noexcept nogil:
        """The status of the call that was made, or else of leaving."""
        cdef mx_context popped = NULL
        cdef int left = self.cuda.context_pop(&popped)
        return left if status == MX_CUDA_SUCCESS else status

    @property
    def index(self):
        return self.ordinal

    @property
    def address(self):
        return <uintptr_t>self.handle

    def synchronize(self):
        cdef int status
        with nogil:
            status = self.enter()
            if status == MX_CUDA_SUCCESS:
                status = self.leave(self.cuda.context_synchronize())
        check(status, "cuCtxSynchronize", f"device {self.ordinal}")

    def memory_info(self):
        cdef size_t free = 0
        cdef size_t total = 0
        cdef int status
        with nogil:
            status = self.enter()
            if status == MX_CUDA_SUCCESS:
                status = self.leave(self.cuda.memory_info(&free, &total))
        check(status, "cuMemGetInfo", f"device {self.ordinal}")
        return free, total


def context_of(int index):
    with contexts_lock:
        context = contexts.get(index)
        if context is None:
            context = contexts[index] = Context(index)
        return context


def current_context():
    """For tests: the handle that this thread has current, 0 for none."""
    cdef mx_context handle = NULL
    check(cuda_table().context_current(&handle), "cuCtxGetCurrent")
    return <uintptr_t>handle


@cython.no_gc
@cython.auto_pickle(False)
cdef class ContextObject:
    cdef int create(self) noexcept nogil:
        return MX_CUDA_SUCCESS

    cdef int release(self, uintptr_t handle) noexcept nogil:
        return MX_CUDA_SUCCESS

    cdef void released(self) noexcept:
        pass

    cdef int attempt(self, Context context) noexcept:
        cdef int status
        self.context = context
        with nogil:
            status = context.enter()
            if status == MX_CUDA_SUCCESS:
                status = context.leave(self.create())
        return status

    cdef int make(self, Context context, str call, str what) except -1:
        return check(self.attempt(context), call, what)

    cdef int free(self) noexcept:
        cdef uintptr_t handle = self.handle
        cdef int status = MX_CUDA_SUCCESS
        if handle != 0:
            self.handle = 0  # for every other thread, too: the next lines let them run
            with nogil:
                status = self.context.enter()
                if status == MX_CUDA_SUCCESS:
                    status = self.context.leave(self.release(handle))
            self.released()
        return status

    cdef int end(self, str call, str what) except? -1:
        return warn_failed(self.free(), call, what)
