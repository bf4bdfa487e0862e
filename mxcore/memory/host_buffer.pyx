"""Aligned, reusable host memory with the buffer protocol and DLPack. Types and documentation: host_buffer.pyi."""

cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uintptr_t
from posix.unistd cimport _SC_PAGESIZE, sysconf

from mxcore.memory.dlpack cimport DL_CPU, Bytes, export_bytes
from mxcore.memory.host_buffer cimport HostBuffer

import os
import sys
import warnings

from mxcore.errors import HostBufferBusy, HostBufferClosed, HostMemoryError

cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MADV_HUGEPAGE
    void* MAP_FAILED
    void* mmap(void* address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void* address, size_t length)
    int madvise(void* address, size_t length, int advice)

cdef enum:
    HUGE_PAGE_BYTES = 2 * 1024 * 1024

MAX_BYTES = 1 << 46  # beyond what a process can map: keeps the sums below within 64 bits

cdef char* UNSIGNED_BYTES = b"B"
cdef size_t live_count = 0  # both these change under the GIL only
cdef size_t live_bytes = 0


cdef void unmap(HostBuffer buffer) noexcept:
    global live_count, live_bytes
    cdef void* base = buffer.base
    buffer.base = NULL  # closed from here on for every other thread: the next line lets them run
    with nogil:  # giving back gigabytes takes a while
        munmap(base, buffer.mapped)
    live_count -= 1
    live_bytes -= buffer.length


cdef void warn_unclosed(HostBuffer buffer) noexcept:
    """Where warnings are errors this is printed as "ignored", like everything that goes wrong in a destructor."""
    if warnings is None:  # the interpreter is going down and has cleared this module
        return
    warnings.warn(f"HostBuffer of {buffer.length} bytes made at {buffer.origin} was never closed", ResourceWarning)


@cython.final
@cython.auto_pickle(False)
cdef class HostBuffer:
    def __cinit__(self, size_bytes, *, alignment_bytes=4096, huge_pages=True):
        global live_count, live_bytes
        cdef size_t page = <size_t>sysconf(_SC_PAGESIZE)
        cdef size_t head, total
        cdef void* mapping
        if not 1 <= size_bytes <= MAX_BYTES:
            raise ValueError(f"size_bytes is {size_bytes}, has to be 1 to {MAX_BYTES}")
        if not 1 <= alignment_bytes <= MAX_BYTES or alignment_bytes & (alignment_bytes - 1):
            raise ValueError(f"alignment_bytes is {alignment_bytes}, has to be a power of two up to {MAX_BYTES}")
        self.length = size_bytes
        self.huge = bool(huge_pages) and self.length >= HUGE_PAGE_BYTES
        self.alignment = max(<size_t>alignment_bytes, page, <size_t>HUGE_PAGE_BYTES if self.huge else 0)
        self.mapped = (self.length + page - 1) // page * page
        total = self.mapped + self.alignment - page
        mapping = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if mapping == MAP_FAILED:
            raise HostMemoryError(f"{size_bytes} bytes of host memory cannot be had: {os.strerror(errno)}")
        head = -<uintptr_t>mapping % self.alignment
        if head:
            munmap(mapping, head)
        self.base = <uint8_t*>mapping + head
        if total - head > self.mapped:
            munmap(self.base + self.mapped, total - head - self.mapped)
        live_count += 1
        live_bytes += self.length
        if self.huge:
            self.huge = madvise(self.base, self.mapped, MADV_HUGEPAGE) == 0
        frame = sys._getframe()  # the caller's: compiled functions have none
        self.origin = f"{frame.f_code.co_filename}:{frame.f_lineno}"

    def __dealloc__(self):
        if self.base != NULL:
            if not self.left:
                warn_unclosed(self)
            unmap(self)

    def __getbuffer__(self, Py_buffer* view, int flags):
        self.require_open()
        view.buf = self.base
        view.obj = self
        view.len = <Py_ssize_t>self.length
        view.readonly = 0
        view.itemsize = 1
        view.format = UNSIGNED_BYTES if flags & PyBUF_FORMAT else NULL
        view.ndim = 1
        view.shape = &view.len if flags & PyBUF_ND else NULL
        view.strides = &view.itemsize if (flags & PyBUF_STRIDES) == PyBUF_STRIDES else NULL
        view.suboffsets = NULL
        view.internal = NULL
        self.export_count += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.export_count -= 1

    cdef int require_open(self) except -1:
        if self.base == NULL:
            raise HostBufferClosed(f"the HostBuffer of {self.length} bytes made at {self.origin} is closed")
        return 0

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        self.require_open()
        if stream is not None:
            raise BufferError(f"stream is {stream!r}: memory of the CPU has no streams")
        if dl_device is not None and tuple(dl_device) != (DL_CPU, 0):
            raise BufferError(f"dl_device is {dl_device!r}: this memory is on the CPU, (1, 0)")
        if copy:
            raise BufferError("copy=True: a HostBuffer is exported in place only")
        cdef Bytes what = Bytes(self.base, <int64_t>self.length, DL_CPU, 0, &self.export_count)
        return export_bytes(self, &what, max_version)

    def __dlpack_device__(self):
        return (DL_CPU, 0)

    def __len__(self):
        return self.length

    @property
    def address(self):
        self.require_open()
        return <uintptr_t>self.base

    @property
    def size_bytes(self):
        return self.length

    @property
    def alignment_bytes(self):
        return self.alignment

    @property
    def huge_pages(self):
        return bool(self.huge)

    @property
    def exports(self):
        return self.export_count

    @property
    def closed(self):
        return self.base == NULL

    def close(self):
        if self.base == NULL:
            return
        if self.export_count:
            raise HostBufferBusy(f"the HostBuffer of {self.length} bytes made at {self.origin} has "
                                 f"{self.export_count} exports (views, tensors): delete them first")
        unmap(self)

    def close_after_exports(self):
        self.left = True
        if not self.export_count:
            self.close()

    def __enter__(self):
        self.require_open()
        return self

    def __exit__(self, kind, error, traceback):
        self.close()

    def __repr__(self):
        state = "closed" if self.base == NULL else f"at {<uintptr_t>self.base:#x}, {self.export_count} exports"
        return f"<HostBuffer of {self.length} bytes, {state}>"


def live_host_buffers():
    return live_count


def live_host_bytes():
    return live_bytes
