# cython: language_level=3
"""The driver's table, for the compiled modules that call it. `cuda_table` fills it at the first use."""

cdef extern from "cuda/cuda_driver.h" nogil:
    ctypedef void* mx_context
    ctypedef void* mx_stream
    ctypedef void* mx_event
    ctypedef void* mx_module
    ctypedef void* mx_function
    ctypedef unsigned long long mx_device_address
    ctypedef struct mx_ipc_handle:
        char reserved[64]
    enum:
        MX_CUDA_SUCCESS, MX_CUDA_OUT_OF_MEMORY, MX_CUDA_DEINITIALIZED, MX_CUDA_NOT_READY
        MX_DEVICE_MULTIPROCESSORS, MX_DEVICE_UNIFIED_ADDRESSING, MX_DEVICE_CAPABILITY_MAJOR, MX_DEVICE_CAPABILITY_MINOR
        MX_POINTER_CONTEXT, MX_POINTER_MEMORY_TYPE, MX_POINTER_IS_MANAGED, MX_POINTER_DEVICE
        MX_POINTER_RANGE_START, MX_POINTER_RANGE_BYTES, MX_POINTER_IPC_CAPABLE, MX_IPC_LAZY_PEER_ACCESS
        MX_MEMORY_HOST, MX_MEMORY_DEVICE
        MX_STREAM_NON_BLOCKING, MX_EVENT_BLOCKING_SYNC, MX_EVENT_NO_TIMING, MX_HOST_PORTABLE, MX_HOST_MAPPED
        MX_JIT_ERROR_LOG, MX_JIT_ERROR_LOG_BYTES
    ctypedef struct mx_cuda_table:
        int (*init)(unsigned int) noexcept nogil
        int (*driver_version)(int*) noexcept nogil
        int (*error_name)(int, const char**) noexcept nogil
        int (*error_string)(int, const char**) noexcept nogil
        int (*device_count)(int*) noexcept nogil
        int (*device_get)(int*, int) noexcept nogil
        int (*device_name)(char*, int, int) noexcept nogil
        int (*device_total)(size_t*, int) noexcept nogil
        int (*device_attribute)(int*, int, int) noexcept nogil
        int (*device_pci)(char*, int, int) noexcept nogil
        int (*primary_retain)(mx_context*, int) noexcept nogil
        int (*primary_release)(int) noexcept nogil
        int (*primary_state)(int, unsigned int*, int*) noexcept nogil
        int (*context_push)(mx_context) noexcept nogil
        int (*context_pop)(mx_context*) noexcept nogil
        int (*context_current)(mx_context*) noexcept nogil
        int (*context_synchronize)() noexcept nogil
        int (*stream_create)(mx_stream*, unsigned int) noexcept nogil
        int (*stream_destroy)(mx_stream) noexcept nogil
        int (*stream_synchronize)(mx_stream) noexcept nogil
        int (*stream_query)(mx_stream) noexcept nogil
        int (*stream_wait_event)(mx_stream, mx_event, unsigned int) noexcept nogil
        int (*event_create)(mx_event*, unsigned int) noexcept nogil
        int (*event_destroy)(mx_event) noexcept nogil
        int (*event_record)(mx_event, mx_stream) noexcept nogil
        int (*event_query)(mx_event) noexcept nogil
        int (*event_synchronize)(mx_event) noexcept nogil
        int (*event_elapsed)(float*, mx_event, mx_event) noexcept nogil
        int (*memory_info)(size_t*, size_t*) noexcept nogil
        int (*memory_alloc)(mx_device_address*, size_t) noexcept nogil
        int (*memory_free)(mx_device_address) noexcept nogil
        int (*pointer_attribute)(void*, int, mx_device_address) noexcept nogil
        int (*ipc_handle)(mx_ipc_handle*, mx_device_address) noexcept nogil
        int (*ipc_open)(mx_device_address*, mx_ipc_handle, unsigned int) noexcept nogil
        int (*ipc_close)(mx_device_address) noexcept nogil
        int (*host_alloc)(void**, size_t, unsigned int) noexcept nogil
        int (*host_free)(void*) noexcept nogil
        int (*host_register)(void*, size_t, unsigned int) noexcept nogil
        int (*host_unregister)(void*) noexcept nogil
        int (*host_device_address)(mx_device_address*, void*, unsigned int) noexcept nogil
        int (*copy_to_device)(mx_device_address, const void*, size_t, mx_stream) noexcept nogil
        int (*copy_to_host)(void*, mx_device_address, size_t, mx_stream) noexcept nogil
        int (*copy_on_device)(mx_device_address, mx_device_address, size_t, mx_stream) noexcept nogil
        int (*module_load)(mx_module*, const void*, unsigned int, int*, void**) noexcept nogil
        int (*module_unload)(mx_module) noexcept nogil
        int (*module_function)(mx_function*, mx_module, const char*) noexcept nogil
        int (*launch)(mx_function, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int,
                      unsigned int, mx_stream, void**, void**) noexcept nogil
    int mx_cuda_open(const char* path, int stand_in, mx_cuda_table* table, char* reason, size_t reason_bytes)

cdef const mx_cuda_table* cuda_table() except NULL  # raises CudaMissing
cdef int check(int status, str call, str what=*) except -1  # raises CudaError, DeviceMemoryError
cdef int warn_failed(int status, str call, str what) except? -1  # for destructors: a warning
