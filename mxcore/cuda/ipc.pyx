"""Device memory of one process in another one; signatures and docs in ipc.pyi."""

cimport cython
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy

from mxcore.cuda.context cimport Context, ContextObject
from mxcore.cuda.driver cimport (
    MX_CUDA_SUCCESS, MX_IPC_LAZY_PEER_ACCESS, check, cuda_table, mx_cuda_table,
    mx_device_address, mx_ipc_handle,
)

from mxcore.cuda.driver import address_range

HANDLE_BYTES = sizeof(mx_ipc_handle)


def export_memory(Context context not None, address):
    cdef mx_ipc_handle handle
    cdef mx_device_address place = address
    cdef int status
    with nogil:
        status = context.enter()
        if status == MX_CUDA_SUCCESS:
            status = context.leave(context.cuda.ipc_handle(&handle, place))
    check(status, "cuIpcGetMemHandle", f"address {place:#x}")
    return (<const char*>&handle)[:sizeof(handle)], address - address_range(address)[0]


@cython.final
@cython.no_gc
@cython.auto_pickle(False)
cdef class OpenedMemory(ContextObject):
    cdef mx_ipc_handle exported

    def __cinit__(self, Context context not None, bytes handle not None):
        if len(handle) != sizeof(mx_ipc_handle):
            raise ValueError(f"a handle of {len(handle)} bytes: it has {HANDLE_BYTES}")
        memcpy(&self.exported, <const char*>handle, sizeof(mx_ipc_handle))
        self.make(context, "cuIpcOpenMemHandle", f"memory of another process, on device {context.ordinal}")

    def __dealloc__(self):
        self.end("cuIpcCloseMemHandle", "memory of another process")

    cdef int create(self) noexcept nogil:
        return self.context.cuda.ipc_open(<mx_device_address*>&self.handle, self.exported, MX_IPC_LAZY_PEER_ACCESS)

    cdef int release(self, uintptr_t handle) noexcept nogil:
        return self.context.cuda.ipc_close(handle)

    @property
    def address(self):
        return self.handle

    def close(self):
        check(self.free(), "cuIpcCloseMemHandle")
