"""Pinned host memory, device memory, and copies between them; signatures and docs in cuda_memory.pyi."""

cimport cython
from libc.stdint cimport int64_t, uintptr_t

from mxcore.cuda_driver cimport (
    MX_CUDA_SUCCESS, MX_HOST_MAPPED, MX_HOST_PORTABLE, check, mx_cuda_table, mx_device_address, mx_stream, warn_failed,
)
from mxcore.cuda_memory cimport DeviceBuffer, PinnedBuffer
from mxcore.cuda_stream cimport Context, Stream
from mxcore.dlpack cimport DL_CUDA, Bytes, export_bytes

from mxcore.errors import HostBufferBusy, HostBufferClosed

cdef size_t pinned_bytes = 0  # both change under the GIL only
cdef size_t device_bytes = 0

MAX_BYTES = 1 << 46


cdef size_t checked(object size_bytes) except 0:
    if not 1 <= size_bytes <= MAX_BYTES:
        raise ValueError(f"size_bytes is {size_bytes}, has to be 1 to {MAX_BYTES}")
    return size_bytes


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class PinnedBuffer:
    def __cinit__(self, Context context not None, size_bytes):
        global pinned_bytes
        cdef size_t length = checked(size_bytes)
        cdef void* base = NULL
        cdef int status
        self.context = context
        with nogil:
            status = context.enter()
            if status == MX_CUDA_SUCCESS:
                status = context.leave(context.cuda.host_alloc(&base, length, MX_HOST_PORTABLE | MX_HOST_MAPPED))
        check(status, "cuMemHostAlloc", f"{length} bytes of pinned host memory")
        self.base = base
        self.length = length
        pinned_bytes += length

    def __dealloc__(self):
        warn_failed(self.free(), "cuMemFreeHost", f"{self.length} bytes of pinned host memory")

    cdef int free(self) noexcept:
        global pinned_bytes
        cdef void* base = self.base
        cdef int status = MX_CUDA_SUCCESS
        if base != NULL:
            self.base = NULL
            pinned_bytes -= self.length
            with nogil:
                status = self.context.enter()
                if status == MX_CUDA_SUCCESS:
                    status = self.context.leave(self.context.cuda.host_free(base))
        return status

    @property
    def address(self):
        if self.base == NULL:
            raise HostBufferClosed(f"the pinned buffer of {self.length} bytes is closed")
        return <uintptr_t>self.base

    @property
    def size_bytes(self):
        return self.length

    def close(self):
        check(self.free(), "cuMemFreeHost")


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class Registration:
    cdef readonly Context context
    cdef object buffer
    cdef object view  # held: nobody closes the buffer meanwhile
    cdef void* base
    cdef size_t length
    cdef mx_device_address on_device

    def __cinit__(self, Context context not None, buffer):
        global pinned_bytes
        cdef void* base = <void*><uintptr_t>buffer.address
        cdef size_t length = buffer.size_bytes
        cdef int status, mapped = MX_CUDA_SUCCESS
        self.context = context
        with nogil:
            status = context.enter()
            if status == MX_CUDA_SUCCESS:
                status = context.cuda.host_register(base, length, MX_HOST_PORTABLE | MX_HOST_MAPPED)
                if status == MX_CUDA_SUCCESS:
                    mapped = context.cuda.host_device_address(&self.on_device, base, 0)
                    if mapped != MX_CUDA_SUCCESS:
                        context.cuda.host_unregister(base)
                status = context.leave(status)
        check(status, "cuMemHostRegister", f"{length} bytes of host memory")
        check(mapped, "cuMemHostGetDevicePointer", f"{length} bytes of host memory")
        self.buffer = buffer
        self.view = memoryview(buffer)
        self.base = base
        self.length = length
        pinned_bytes += length

    def __dealloc__(self):
        warn_failed(self.free(), "cuMemHostUnregister", f"the pinning of {self.length} bytes of host memory")

    cdef int free(self) noexcept:
        global pinned_bytes
        cdef void* base = self.base
        cdef int status = MX_CUDA_SUCCESS
        if base != NULL:
            self.base = NULL
            pinned_bytes -= self.length
            with nogil:
                status = self.context.enter()
                if status == MX_CUDA_SUCCESS:
                    status = self.context.leave(self.context.cuda.host_unregister(base))
            self.view = None
        return status

    @property
    def device_address(self):
        return self.on_device

    @property
    def size_bytes(self):
        return self.length

    def close(self):
        check(self.free(), "cuMemHostUnregister")


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class DeviceBuffer:
    def __cinit__(self, Context context not None, size_bytes):
        global device_bytes
        cdef size_t length = checked(size_bytes)
        cdef mx_device_address base = 0
        cdef int status
        self.context = context
        with nogil:
            status = context.enter()
            if status == MX_CUDA_SUCCESS:
                status = context.leave(context.cuda.memory_alloc(&base, length))
        check(status, "cuMemAlloc", f"{length} bytes on device {context.ordinal}")
        self.base = base
        self.length = length
        device_bytes += length

    def __dealloc__(self):
        warn_failed(self.free(), "cuMemFree", f"{self.length} bytes of device memory")

    cdef int free(self) noexcept:
        global device_bytes
        cdef mx_device_address base = self.base
        cdef int status = MX_CUDA_SUCCESS
        if base != 0:
            self.base = 0
            device_bytes -= self.length
            with nogil:
                status = self.context.enter()
                if status == MX_CUDA_SUCCESS:
                    status = self.context.leave(self.context.cuda.memory_free(base))
        return status

    @property
    def address(self):
        if self.base == 0:
            raise HostBufferClosed(f"the device buffer of {self.length} bytes is closed")
        return self.base

    @property
    def size_bytes(self):
        return self.length

    @property
    def exports(self):
        return self.export_count

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        cdef Bytes what = Bytes(<void*><uintptr_t>self.address, <int64_t>self.length, DL_CUDA, self.context.ordinal,
                                &self.export_count)
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
    cdef mx_stream place = stream.handle
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
