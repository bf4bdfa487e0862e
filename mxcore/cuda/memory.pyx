"""Pinned host memory, device memory, and copies between them; signatures and docs in memory.pyi."""

cimport cython
from libc.stdint cimport int64_t, uintptr_t

from mxcore.cuda.context cimport Context, ContextObject
from mxcore.cuda.driver cimport (
    MX_CUDA_SUCCESS, MX_HOST_MAPPED, MX_HOST_PORTABLE, check, mx_cuda_table, mx_device_address, mx_stream,
)
from mxcore.cuda.memory cimport DeviceBuffer, Memory, PinnedBuffer, Registration
from mxcore.cuda.stream cimport Stream
from mxcore.memory.dlpack cimport DL_CUDA, Bytes, export_bytes

from mxcore.errors import HostBufferBusy, HostBufferClosed

cdef size_t pinned_bytes = 0  # both change under the GIL only
cdef size_t device_bytes = 0

MAX_BYTES = 1 << 46


cdef size_t checked(object size_bytes) except 0:
    if not 1 <= size_bytes <= MAX_BYTES:
        raise ValueError(f"size_bytes is {size_bytes}, has to be 1 to {MAX_BYTES}")
    return size_bytes


@cython.no_gc
@cython.auto_pickle(False)
cdef class Memory(ContextObject):
    cdef void counted(self, Py_ssize_t by) noexcept:
        global pinned_bytes
        pinned_bytes += by

    cdef void released(self) noexcept:
        self.counted(-<Py_ssize_t>self.length)

    @property
    def size_bytes(self):
        return self.length


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class PinnedBuffer(Memory):
    def __cinit__(self, Context context not None, size_bytes):
        self.length = checked(size_bytes)
        self.make(context, "cuMemHostAlloc", f"{self.length} bytes of pinned host memory")
        self.counted(self.length)

    def __dealloc__(self):
        self.end("cuMemFreeHost", f"{self.length} bytes of pinned host memory")

    cdef int create(self) noexcept nogil:
        return self.context.cuda.host_alloc(<void**>&self.handle, self.length, MX_HOST_PORTABLE | MX_HOST_MAPPED)

    cdef int release(self, uintptr_t handle) noexcept nogil:
        return self.context.cuda.host_free(<void*>handle)

    @property
    def address(self):
        if self.handle == 0:
            raise HostBufferClosed(f"the pinned buffer of {self.length} bytes is closed")
        return self.handle

    def close(self):
        check(self.free(), "cuMemFreeHost")


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class Registration(Memory):
    def __cinit__(self, Context context not None, buffer):
        cdef int status
        self.length = buffer.size_bytes
        self.on_device = <uintptr_t>buffer.address  # until it is pinned, where it is
        status = self.attempt(context)
        check(self.mapped, "cuMemHostGetDevicePointer", f"{self.length} bytes of host memory")
        check(status, "cuMemHostRegister", f"{self.length} bytes of host memory")
        self.buffer = buffer
        self.view = memoryview(buffer)
        self.counted(self.length)

    def __dealloc__(self):
        self.end("cuMemHostUnregister", f"the pinning of {self.length} bytes of host memory")

    cdef int create(self) noexcept nogil:
        cdef const mx_cuda_table* cuda = self.context.cuda
        cdef void* base = <void*><uintptr_t>self.on_device
        cdef int status = cuda.host_register(base, self.length, MX_HOST_PORTABLE | MX_HOST_MAPPED)
        if status != MX_CUDA_SUCCESS:
            return status
        self.mapped = cuda.host_device_address(&self.on_device, base, 0)
        if self.mapped != MX_CUDA_SUCCESS:
            cuda.host_unregister(base)
            return self.mapped
        self.handle = <uintptr_t>base
        return status

    cdef int release(self, uintptr_t handle) noexcept nogil:
        return self.context.cuda.host_unregister(<void*>handle)

    cdef void released(self) noexcept:
        self.counted(-<Py_ssize_t>self.length)
        self.view = None

    @property
    def device_address(self):
        return self.on_device

    def close(self):
        check(self.free(), "cuMemHostUnregister")


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class DeviceBuffer(Memory):
    def __cinit__(self, Context context not None, size_bytes):
        self.length = checked(size_bytes)
        self.make(context, "cuMemAlloc", f"{self.length} bytes on device {context.ordinal}")
        self.counted(self.length)

    def __dealloc__(self):
        self.end("cuMemFree", f"{self.length} bytes of device memory")

    cdef int create(self) noexcept nogil:
        return self.context.cuda.memory_alloc(<mx_device_address*>&self.handle, self.length)

    cdef int release(self, uintptr_t handle) noexcept nogil:
        return self.context.cuda.memory_free(handle)

    cdef void counted(self, Py_ssize_t by) noexcept:
        global device_bytes
        device_bytes += by

    @property
    def address(self):
        if self.handle == 0:
            raise HostBufferClosed(f"the device buffer of {self.length} bytes is closed")
        return self.handle

    @property
    def exports(self):
        return self.export_count

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        cdef Bytes what = Bytes(<void*><uintptr_t>self.address, <int64_t>self.length, DL_CUDA, self.context.ordinal,
                                &self.export_count)
        # None and 1: the default stream, 2: the thread's, -1: no stream, others: a handle. All the same here, since
        # nothing is under way in memory that is exported; 0 may mean either default stream, and is not allowed.
        if stream is not None and (not isinstance(stream, int) or stream == 0 or stream < -1):
            raise BufferError(f"stream is {stream!r}: None, -1, 1, 2 or a stream's handle")
        if dl_device is not None and tuple(dl_device) != (DL_CUDA, self.context.ordinal):
            raise BufferError(f"dl_device is {dl_device!r}: this memory is on ({DL_CUDA}, {self.context.ordinal})")
        if copy:
            raise BufferError("copy=True: device memory is exported in place only")
        return export_bytes(self, &what, max_version)

    def __dlpack_device__(self):
        return (DL_CUDA, self.context.ordinal)

    def close(self):
        if self.export_count:
            raise HostBufferBusy(f"the device buffer of {self.length} bytes has {self.export_count} exports (tensors): "
                                 "delete them first")
        check(self.free(), "cuMemFree")


cdef enum:
    TO_DEVICE, TO_HOST, ON_DEVICE


cdef int copy(int direction, object to, object source, object size_bytes, Stream stream) except -1:
    cdef uintptr_t into = to
    cdef uintptr_t begin = source
    cdef size_t length = size_bytes
    cdef Context context = stream.context
    cdef const mx_cuda_table* cuda = context.cuda
    cdef mx_stream place = <mx_stream>stream.handle
    cdef int status
    with nogil:
        status = context.enter()
        if status == MX_CUDA_SUCCESS:
            if direction == TO_DEVICE:
                status = cuda.copy_to_device(into, <const void*>begin, length, place)
            elif direction == TO_HOST:
                status = cuda.copy_to_host(<void*>into, begin, length, place)
            else:
                status = cuda.copy_on_device(into, begin, length, place)
            status = context.leave(status)
    return check(status, ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync")[direction],
                 f"{length} bytes from {begin:#x} to {into:#x}")


def copy_to_device(to, source, size_bytes, Stream stream not None):
    copy(TO_DEVICE, to, source, size_bytes, stream)


def copy_to_host(to, source, size_bytes, Stream stream not None):
    copy(TO_HOST, to, source, size_bytes, stream)


def copy_on_device(to, source, size_bytes, Stream stream not None):
    copy(ON_DEVICE, to, source, size_bytes, stream)


def live_pinned_bytes():
    return pinned_bytes


def live_device_bytes():
    return device_bytes
