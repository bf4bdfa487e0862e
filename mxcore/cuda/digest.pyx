"""mixsum-64 of device memory by kernels; signatures and docs in digest.pyi.

The records that the kernels read and the sums that they write lie in pinned host memory: nothing is allocated on the
device. The work is planned in C (cuda_plan.h), without the GIL.
"""

import threading
import weakref
from pathlib import Path

cimport cython
from cpython.bytes cimport PyBytes_AsString
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from mxcore.cuda.context cimport Context, ContextObject
from mxcore.cuda.driver cimport (
    MX_CUDA_SUCCESS, MX_JIT_ERROR_LOG, MX_JIT_ERROR_LOG_BYTES, check, mx_cuda_table, mx_function, mx_module,
    mx_stream,
)
from mxcore.cuda.digest cimport Kernels
from mxcore.cuda.memory cimport PinnedBuffer
from mxcore.cuda.stream cimport Stream

from mxcore.errors import CudaError

cdef extern from "cuda/cuda_plan.h" nogil:
    enum: MX_PLAN_TILES, MX_PLAN_SEAMS
    ctypedef struct mx_plan_memory:
        pass
    ctypedef struct mx_plan:
        const mx_cuda_table* cuda
        mx_stream stream
        mx_function sum_tiles, sum_seams
        mx_plan_memory* memory
        uint32_t* tile_groups
        uint32_t* seam_groups
        uint64_t* sums
        uint32_t tiles, seams
    int mx_plan_digests(mx_plan* plan, const uint64_t* addresses, const uint64_t* lengths, const uint64_t* starts,
                        size_t groups, uint64_t* bytes, const char** call)
    uint64_t mx_mixsum_end(uint64_t sum, uint64_t bytes)

cdef enum:
    LOG_BYTES = 4096

PLAN_BYTES = sizeof(mx_plan_memory)
PTX_FILE = Path(__file__).with_name("cuda_kernels.ptx")

cdef object kernels_lock = threading.Lock()
cdef object kernels = weakref.WeakKeyDictionary()  # Context -> Kernels


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class Kernels(ContextObject):
    def __cinit__(self, Context context not None):
        cdef char log[LOG_BYTES]
        cdef int status
        self.image = PTX_FILE.read_bytes()  # ends with a zero byte in memory, as the driver wants it
        self.text = PyBytes_AsString(self.image)
        self.log = log
        log[0] = log[LOG_BYTES - 1] = 0
        status = self.attempt(context)
        self.log = NULL
        log[LOG_BYTES - 1] = 0
        said = (<bytes>log).decode("utf-8", "replace").strip()  # up to its zero byte
        check(status, "cuModuleLoadDataEx", f"device {context.ordinal} takes no kernels of {PTX_FILE.name}: {said}")
        self.sum_tiles = self.function(b"mx_sum_tiles")
        self.sum_seams = self.function(b"mx_sum_seams")
        self.stitch = self.function(b"mx_stitch")

    def __dealloc__(self):
        self.end("cuModuleUnload", "the kernels")

    cdef int create(self) noexcept nogil:
        cdef int[2] names
        cdef void* values[2]
        names[0], names[1] = MX_JIT_ERROR_LOG, MX_JIT_ERROR_LOG_BYTES
        values[0], values[1] = <void*>self.log, <void*><uintptr_t>LOG_BYTES
        return self.context.cuda.module_load(<mx_module*>&self.handle, self.text, 2, names, values)

    cdef int release(self, uintptr_t handle) noexcept nogil:
        return self.context.cuda.module_unload(<mx_module>handle)

    cdef mx_function function(self, bytes name) except NULL:
        cdef mx_function found = NULL
        cdef int status = self.context.enter()
        if status == MX_CUDA_SUCCESS:
            status = self.context.leave(self.context.cuda.module_function(&found, <mx_module>self.handle, name))
        check(status, "cuModuleGetFunction", name.decode())
        return found


cdef Kernels kernels_of(Context context):
    with kernels_lock:
        found = kernels.get(context)
        made = found() if found is not None else None
        if made is None:
            made = Kernels(context)
            kernels[context] = weakref.ref(made)
        return made


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class DeviceDigest:
    cdef readonly Context context
    cdef Kernels kernels
    cdef Stream stream
    cdef PinnedBuffer memory
    cdef uint32_t* groups
    cdef object lock

    def __cinit__(self, Context context not None):
        self.context = context
        self.lock = threading.Lock()
        self.kernels = kernels_of(context)
        self.stream = Stream(context)
        self.groups = <uint32_t*>PyMem_Calloc(MX_PLAN_TILES + MX_PLAN_SEAMS, sizeof(uint32_t))
        if self.groups == NULL:
            raise MemoryError
        self.memory = PinnedBuffer(context, PLAN_BYTES)

    def __dealloc__(self):
        PyMem_Free(self.groups)

    def many(self, addresses, lengths, segment_starts):
        cdef const uint64_t[::1] places = memoryview(addresses)
        cdef const uint64_t[::1] sizes = memoryview(lengths)
        cdef const uint64_t[::1] starts = memoryview(segment_starts)
        cdef size_t groups = starts.shape[0] - 1 if starts.shape[0] else 0
        cdef size_t index
        if places.shape[0] != sizes.shape[0] or starts.shape[0] == 0 or starts[0] != 0:
            raise ValueError(f"{places.shape[0]} addresses, {sizes.shape[0]} lengths, {starts.shape[0]} starts")
        for index in range(groups):
            if starts[index + 1] < starts[index]:
                raise ValueError(f"segment_starts falls at group {index}")
        if starts[groups] != <uint64_t>places.shape[0]:
            raise ValueError(f"segment_starts ends with {starts[groups]}, there are {places.shape[0]} segments")
        if groups == 0:
            return b""
        if groups >= 1 << 32:
            raise ValueError(f"{groups} groups are too many")
        with self.lock:
            return self.run(places, sizes, starts, groups)

    cdef bytes run(self, const uint64_t[::1] places, const uint64_t[::1] sizes, const uint64_t[::1] starts,
                   size_t groups):
        cdef mx_plan plan
        cdef const char* call = NULL
        cdef const uint64_t* addresses = &places[0] if places.shape[0] else NULL
        cdef const uint64_t* lengths = &sizes[0] if sizes.shape[0] else NULL
        cdef uint64_t* sums = <uint64_t*>PyMem_Calloc(2 * groups, sizeof(uint64_t))
        cdef uint64_t* bytes_of = sums + groups
        cdef size_t index
        cdef int status
        if sums == NULL:
            raise MemoryError
        try:
            if self.memory.handle == 0:
                raise CudaError("this digest is closed")
            plan.cuda = self.context.cuda
            plan.stream = <mx_stream>self.stream.handle
            plan.sum_tiles = self.kernels.sum_tiles
            plan.sum_seams = self.kernels.sum_seams
            plan.memory = <mx_plan_memory*>self.memory.handle
            plan.tile_groups = self.groups
            plan.seam_groups = self.groups + MX_PLAN_TILES
            plan.sums = sums
            plan.tiles = plan.seams = 0
            with nogil:
                status = self.context.enter()
                if status == MX_CUDA_SUCCESS:
                    status = self.context.leave(mx_plan_digests(&plan, addresses, lengths, &starts[0], groups, bytes_of,
                                                                &call))
            check(status, call.decode() if call != NULL else "cuCtxPushCurrent", f"digests on device {self.context.ordinal}")
            for index in range(groups):
                sums[index] = mx_mixsum_end(sums[index], bytes_of[index])
            return (<const char*>sums)[:8 * groups]  # little-endian, as mixsum_host.h requires of the machine
        finally:
            PyMem_Free(sums)

    def close(self):
        with self.lock:
            self.memory.close()
