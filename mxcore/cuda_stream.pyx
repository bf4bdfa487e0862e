"""Contexts, streams and events as objects; signatures and docs in cuda_stream.pyi.

An object that exists has a valid handle, and holds its context: destruction order follows from who holds whom.
Destructors warn instead of raising. A context is pushed around every call that needs one, and popped after it, so that
whatever the thread had current stays so.
"""

cimport cython
from libc.stdint cimport uintptr_t

from mxcore.cuda_driver cimport (
    MX_CUDA_NOT_READY, MX_CUDA_SUCCESS, MX_EVENT_BLOCKING_SYNC, MX_EVENT_NO_TIMING, MX_STREAM_NON_BLOCKING, check,
    cuda_table, mx_context, mx_cuda_table, mx_event, mx_stream, warn_failed,
)
from mxcore.cuda_stream cimport Context, Event, Stream

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


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class Stream:
    def __cinit__(self, Context context not None):
        cdef mx_stream handle = NULL
        cdef int status
        self.context = context
        with nogil:
            status = context.enter()
            if status == MX_CUDA_SUCCESS:
                status = context.leave(context.cuda.stream_create(&handle, MX_STREAM_NON_BLOCKING))
        check(status, "cuStreamCreate", f"device {context.ordinal}")
        self.handle = handle

    def __dealloc__(self):
        cdef int status
        if self.handle != NULL:
            with nogil:
                status = self.context.cuda.stream_destroy(self.handle)
            warn_failed(status, "cuStreamDestroy", "a stream")

    @property
    def address(self):
        return <uintptr_t>self.handle

    def synchronize(self):
        cdef int status
        with nogil:
            status = self.context.cuda.stream_synchronize(self.handle)
        check(status, "cuStreamSynchronize", f"device {self.context.ordinal}")

    def done(self):
        cdef int status
        with nogil:
            status = self.context.cuda.stream_query(self.handle)
        if status == MX_CUDA_NOT_READY:
            return False
        check(status, "cuStreamQuery", f"device {self.context.ordinal}")
        return True

    def wait(self, Event event not None):
        cdef int status
        with nogil:
            status = self.context.enter()
            if status == MX_CUDA_SUCCESS:
                status = self.context.leave(self.context.cuda.stream_wait_event(self.handle, event.handle, 0))
        check(status, "cuStreamWaitEvent", f"device {self.context.ordinal}")


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class Event:
    def __cinit__(self, Context context not None, *, bint timing=False):
        cdef mx_event handle = NULL
        cdef unsigned int flags = MX_EVENT_BLOCKING_SYNC | (0 if timing else MX_EVENT_NO_TIMING)
        cdef int status
        self.context = context
        with nogil:
            status = context.enter()
            if status == MX_CUDA_SUCCESS:
                status = context.leave(context.cuda.event_create(&handle, flags))
        check(status, "cuEventCreate", f"device {context.ordinal}")
        self.handle = handle

    def __dealloc__(self):
        cdef int status
        if self.handle != NULL:
            with nogil:
                status = self.context.cuda.event_destroy(self.handle)
            warn_failed(status, "cuEventDestroy", "an event")

    @property
    def address(self):
        return <uintptr_t>self.handle

    def record(self, stream):
        """`stream`: a Stream, or the handle of somebody else's (torch's), 0 for the default stream."""
        cdef mx_stream place = (<Stream>stream).handle if isinstance(stream, Stream) else <mx_stream><uintptr_t>stream
        cdef int status
        with nogil:
            status = self.context.enter()
            if status == MX_CUDA_SUCCESS:
                status = self.context.leave(self.context.cuda.event_record(self.handle, place))
        check(status, "cuEventRecord", f"device {self.context.ordinal}")

    def synchronize(self):
        cdef int status
        with nogil:
            status = self.context.cuda.event_synchronize(self.handle)
        check(status, "cuEventSynchronize", f"device {self.context.ordinal}")

    def done(self):
        cdef int status
        with nogil:
            status = self.context.cuda.event_query(self.handle)
        if status == MX_CUDA_NOT_READY:
            return False
        check(status, "cuEventQuery", f"device {self.context.ordinal}")
        return True

    def seconds_since(self, Event earlier not None):
        cdef float milliseconds = 0
        cdef int status
        with nogil:
            status = self.context.cuda.event_elapsed(&milliseconds, earlier.handle, self.handle)
        check(status, "cuEventElapsedTime", "both events have to be made with timing=True, recorded and done")
        return milliseconds / 1e3
