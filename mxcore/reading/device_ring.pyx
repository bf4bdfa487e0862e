"""The slots, streams and events that bytes pass on their way to a device; signatures and docs in device_ring.pyi.

What the threads of a read do with them is C: cuda_load.h. checkpoint_reader runs it.
"""

cimport cython
from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memset

from mxcore.cuda.context cimport Context
from mxcore.cuda.digest cimport kernels_of
from mxcore.cuda.driver cimport MX_CUDA_SUCCESS, check, mx_event, mx_stream
from mxcore.reading.device_ring cimport DeviceRing
from mxcore.cuda.stream cimport Event, Stream

from mxcore.cuda import Registration
from mxcore.errors import CudaError

cdef enum:
    PAGE_BYTES = 4096

MAX_THREADS, MAX_SLOTS = MX_DEVICE_THREADS, MX_DEVICE_SLOTS


def slot_bytes(piece_bytes):
    """Of a piece, with room for alignment on both sides and for records; a multiple of a page."""
    return (piece_bytes + 2 * PAGE_BYTES + MX_RECORD_BYTES + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class DeviceRing:
    def __cinit__(self, Context context not None, buffer, *, piece_bytes, int threads, int slots=2, bint pinned=True):
        cdef int index
        if not 1 <= threads <= MX_DEVICE_THREADS or not 1 <= slots <= MX_DEVICE_SLOTS:
            raise ValueError(f"{threads} threads with {slots} slots: 1 to {MAX_THREADS}, and 1 to {MAX_SLOTS}")
        if piece_bytes < PAGE_BYTES or buffer.size_bytes < threads * slots * slot_bytes(piece_bytes):
            raise ValueError(f"{threads * slots} slots for pieces of {piece_bytes} bytes want "
                             f"{threads * slots * slot_bytes(piece_bytes)} bytes, the buffer has {buffer.size_bytes}")
        if buffer.address % PAGE_BYTES:
            raise ValueError("the buffer does not begin at a page")
        memset(&self.load, 0, sizeof(self.load))
        self.context = context
        self.piece = piece_bytes
        self.streams, self.events = [], []
        self.load.cuda = context.cuda
        self.load.context = context.handle
        self.load.threads, self.load.slots_each = threads, slots
        self.load.slot_bytes = slot_bytes(piece_bytes)
        for index in range(threads):
            self.streams.append(Stream(context))
            self.load.streams[index] = <mx_stream>(<Stream>self.streams[index]).handle
        for index in range(threads * slots):
            self.events.append(Event(context))
            self.load.events[index] = <mx_event>(<Event>self.events[index]).handle
        self.after = Event(context)
        self.buffer = buffer
        self.view = memoryview(buffer)
        self.load.slots = <char*><uintptr_t>buffer.address
        if pinned:
            self.registration = Registration(context, buffer)
            self.load.slots_on_device = self.registration.device_address
            self.kernels = kernels_of(context)
            self.load.stitch = self.kernels.stitch

    cdef int require_open(self) except -1:
        if self.load.slots == NULL:
            raise CudaError("this ring is closed")
        return 0

    cdef int raise_failure(self) except -1:
        """After a run: the driver's failure, if there was one."""
        cdef int status = self.load.status
        self.load.status = MX_CUDA_SUCCESS
        return check(status, self.load.call.decode() if self.load.call != NULL else "",
                     f"loading to device {self.context.ordinal}")

    @property
    def piece_bytes(self):
        return self.piece

    @property
    def threads(self):
        return self.load.threads

    @property
    def pinned(self):
        return self.registration is not None

    @property
    def copies(self):
        return self.load.copies

    @property
    def launches(self):
        return self.load.launches

    def start_after(self, stream):
        self.require_open()
        if stream is None:
            self.load.after = NULL
        else:
            self.after.record(stream)
            self.load.after = <mx_event>self.after.handle

    def wait(self):
        self.require_open()
        if self.load.after != NULL:
            self.after.synchronize()

    def close(self):
        self.load.slots = NULL
        if self.registration is not None:
            self.registration.close()
        self.view = None
