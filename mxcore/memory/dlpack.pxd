# cython: language_level=3
"""DLPack 1.0's structures (https://dmlc.github.io/dlpack/latest/c_api.html), and the export of plain bytes."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    DL_CPU = 1
    DL_CUDA = 2

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

cdef struct Bytes:  # what is exported; `export_count` lies in `owner`, which every export holds
    void* data
    int64_t size_bytes
    int32_t device_type
    int32_t device_id
    size_t* export_count

cdef object export_bytes(object owner, Bytes* what, object max_version)
