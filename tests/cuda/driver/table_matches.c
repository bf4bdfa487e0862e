/* Compiles only if every function of our table has exactly the type that cuda.h declares for that symbol. */
#include <cuda.h>

#define MX_WITH_CUDA_H 1
#include "cuda/cuda_driver.h"

/* cuda.h maps the plain names to today's versions: the ones that we load by an older name are declared here. */
#undef cuEventElapsedTime
CUresult CUDAAPI cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end);

#define CHECK(member, symbol, arguments)                                                                        \
    _Static_assert(__builtin_types_compatible_p(__typeof__(&symbol), __typeof__(((mx_cuda_table *)0)->member)), \
                   #symbol " has another type in cuda.h");
MX_CUDA_FUNCTIONS(CHECK)

_Static_assert((int)MX_CUDA_OUT_OF_MEMORY == (int)CUDA_ERROR_OUT_OF_MEMORY, "");
_Static_assert((int)MX_CUDA_DEINITIALIZED == (int)CUDA_ERROR_DEINITIALIZED, "");
_Static_assert((int)MX_CUDA_NO_DEVICE == (int)CUDA_ERROR_NO_DEVICE, "");
_Static_assert((int)MX_CUDA_NOT_READY == (int)CUDA_ERROR_NOT_READY, "");
_Static_assert((int)MX_DEVICE_MULTIPROCESSORS == (int)CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, "");
_Static_assert((int)MX_DEVICE_UNIFIED_ADDRESSING == (int)CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, "");
_Static_assert((int)MX_DEVICE_CAPABILITY_MAJOR == (int)CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, "");
_Static_assert((int)MX_DEVICE_CAPABILITY_MINOR == (int)CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, "");
_Static_assert((int)MX_POINTER_CONTEXT == (int)CU_POINTER_ATTRIBUTE_CONTEXT, "");
_Static_assert((int)MX_POINTER_MEMORY_TYPE == (int)CU_POINTER_ATTRIBUTE_MEMORY_TYPE, "");
_Static_assert((int)MX_POINTER_IS_MANAGED == (int)CU_POINTER_ATTRIBUTE_IS_MANAGED, "");
_Static_assert((int)MX_POINTER_DEVICE == (int)CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, "");
_Static_assert((int)MX_POINTER_IPC_CAPABLE == (int)CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, "");
_Static_assert((int)MX_POINTER_RANGE_START == (int)CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, "");
_Static_assert((int)MX_POINTER_RANGE_BYTES == (int)CU_POINTER_ATTRIBUTE_RANGE_SIZE, "");
_Static_assert((int)MX_IPC_LAZY_PEER_ACCESS == (int)CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, "");
_Static_assert((int)MX_MEMORY_HOST == (int)CU_MEMORYTYPE_HOST, "");
_Static_assert((int)MX_MEMORY_DEVICE == (int)CU_MEMORYTYPE_DEVICE, "");
_Static_assert((int)MX_STREAM_NON_BLOCKING == (int)CU_STREAM_NON_BLOCKING, "");
_Static_assert((int)MX_EVENT_BLOCKING_SYNC == (int)CU_EVENT_BLOCKING_SYNC, "");
_Static_assert((int)MX_EVENT_NO_TIMING == (int)CU_EVENT_DISABLE_TIMING, "");
_Static_assert(MX_HOST_PORTABLE == CU_MEMHOSTALLOC_PORTABLE && MX_HOST_PORTABLE == CU_MEMHOSTREGISTER_PORTABLE, "");
_Static_assert(MX_HOST_MAPPED == CU_MEMHOSTALLOC_DEVICEMAP && MX_HOST_MAPPED == CU_MEMHOSTREGISTER_DEVICEMAP, "");
_Static_assert((int)MX_JIT_ERROR_LOG == (int)CU_JIT_ERROR_LOG_BUFFER, "");
_Static_assert((int)MX_JIT_ERROR_LOG_BYTES == (int)CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES, "");
