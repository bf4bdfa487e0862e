# cython: language_level=3
"""DLPack 1.0's structures (https://dmlc.github.io/dlpack/latest/c_api.html), and what HostBuffer is made of."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef struct DLDevice:
    int32_t device_type
    int32_t device_id

cdef struct DLDataType:
    uint8_t code
    uint8_t bits
    uint16_t lanes

cdef struct DLTensor:
    void* data
    DLDevice device
    int32_t ndim
    DLDataType dtype
    int64_t* shape
    int64_t* strides
    uint64_t byte_offset

cdef struct DLManagedTensor:
    DLTensor dl_tensor
    void* manager_ctx
    void (*deleter)(DLManagedTensor*) noexcept

cdef struct DLManagedTensorVersioned:
    uint32_t major
    uint32_t minor
    void* manager_ctx
    void (*deleter)(DLManagedTensorVersioned*) noexcept
    uint64_t flags
    DLTensor dl_tensor

cdef class HostBuffer:
    cdef uint8_t* base
    cdef size_t length  # bytes, as asked for
    cdef size_t mapped  # bytes, in whole pages
    cdef size_t alignment
    cdef size_t export_count
    cdef bint huge
    cdef bint left  # to its exports: who made it needs it no longer
    cdef str origin
    cdef int require_open(self) except -1
