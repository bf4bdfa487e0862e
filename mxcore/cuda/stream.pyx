"""Streams and events as objects; signatures and docs in stream.pyi."""

cimport cython
from libc.stdint cimport uintptr_t

from mxcore.cuda.context cimport Context, ContextObject
from mxcore.cuda.driver cimport (
    MX_CUDA_NOT_READY, MX_CUDA_SUCCESS, MX_EVENT_BLOCKING_SYNC, MX_EVENT_NO_TIMING, MX_STREAM_NON_BLOCKING, check,
    mx_event, mx_stream,
)
from mxcore.cuda.stream cimport Event, Stream


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class Stream(ContextObject):
    def __cinit__(self, Context context not None):
        self.make(context, "cuStreamCreate", f"device {context.ordinal}")

    def __dealloc__(self):
        self.end("cuStreamDestroy", "a stream")

    cdef int create(self) noexcept nogil:
        return self.context.cuda.stream_create(<mx_stream*>&self.handle, MX_STREAM_NON_BLOCKING)

    cdef int release(self, uintptr_t handle) noexcept nogil:
        return self.context.cuda.stream_destroy(<mx_stream>handle)

    @property
    def address(self):
        return self.handle

    def synchronize(self):
        cdef int status
        with nogil:
            status = self.context.cuda.stream_synchronize(<mx_stream>self.handle)
        check(status, "cuStreamSynchronize", f"device {self.context.ordinal}")

    def done(self):
        cdef int status
        with nogil:
            status = self.context.cuda.stream_query(<mx_stream>self.handle)
        if status == MX_CUDA_NOT_READY:
            return False
        check(status, "cuStreamQuery", f"device {self.context.ordinal}")
        return True

    def wait(self, Event event not None):
        cdef int status
        with nogil:
            status = self.context.enter()
            if status == MX_CUDA_SUCCESS:
                status = self.context.leave(
                    self.context.cuda.stream_wait_event(<mx_stream>self.handle, <mx_event>event.handle, 0))
        check(status, "cuStreamWaitEvent", f"device {self.context.ordinal}")


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class Event(ContextObject):
    def __cinit__(self, Context context not None, *, bint timing=False):
        self.flags = MX_EVENT_BLOCKING_SYNC | (0 if timing else MX_EVENT_NO_TIMING)
        self.make(context, "cuEventCreate", f"device {context.ordinal}")

    def __dealloc__(self):
        self.end("cuEventDestroy", "an event")

    cdef int create(self) noexcept nogil:
        return self.context.cuda.event_create(<mx_event*>&self.handle, self.flags)

    cdef int release(self, uintptr_t handle) noexcept nogil:
        return self.context.cuda.event_destroy(<mx_event>handle)

    @property
    def address(self):
        return self.handle

    def record(self, stream):
        """`stream`: a Stream, or the handle of somebody else's (torch's), 0 for the default stream."""
        cdef uintptr_t place = (<Stream>stream).handle if isinstance(stream, Stream) else <uintptr_t>stream
        cdef int status
        with nogil:
            status = self.context.enter()
            if status == MX_CUDA_SUCCESS:
                status = self.context.leave(
                    self.context.cuda.event_record(<mx_event>self.handle, <mx_stream>place))
        check(status, "cuEventRecord", f"device {self.context.ordinal}")

    def synchronize(self):
        cdef int status
        with nogil:
            status = self.context.cuda.event_synchronize(<mx_event>self.handle)
        check(status, "cuEventSynchronize", f"device {self.context.ordinal}")

    def done(self):
        cdef int status
        with nogil:
            status = self.context.cuda.event_query(<mx_event>self.handle)
        if status == MX_CUDA_NOT_READY:
            return False
        check(status, "cuEventQuery", f"device {self.context.ordinal}")
        return True

    def seconds_since(self, Event earlier not None):
        cdef float milliseconds = 0
        cdef int status
        with nogil:
            status = self.context.cuda.event_elapsed(
                &milliseconds, <mx_event>earlier.handle, <mx_event>self.handle)
        check(status, "cuEventElapsedTime", "both events have to be made with timing=True, recorded and done")
        return milliseconds / 1e3
