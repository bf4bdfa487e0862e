/* The CUDA driver API as a table of functions that is filled at run time from libcuda.so.1.
 *
 * Declarations by hand, from the public interface; nothing is linked and no header of CUDA is needed, so that one build
 * works with and without a GPU. Functions whose type changed over the years go by the version that CUDA 11 to 13 export
 * (_v2). tests/cuda/test_driver_table.py compiles this beside cuda.h where there is one.
 */
#ifndef MX_CUDA_DRIVER_H
#define MX_CUDA_DRIVER_H

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#ifdef MX_WITH_CUDA_H /* the test that compares has included it before */
typedef CUcontext mx_context;
typedef CUstream mx_stream;
typedef CUevent mx_event;
typedef CUmodule mx_module;
typedef CUfunction mx_function;
typedef CUpointer_attribute mx_pointer_attribute;
typedef CUdevice_attribute mx_device_attribute;
typedef CUjit_option mx_jit_option;
typedef CUresult mx_result;
typedef CUdeviceptr mx_device_address;
typedef CUipcMemHandle mx_ipc_handle;
#else
typedef void *mx_context;
typedef void *mx_stream;
typedef void *mx_event;
typedef void *mx_module;
typedef void *mx_function;
typedef int mx_pointer_attribute;
typedef int mx_device_attribute;
typedef int mx_jit_option;
typedef int mx_result;
typedef unsigned long long mx_device_address;
typedef struct {
    char reserved[64];
} mx_ipc_handle;
#endif

enum {
    MX_CUDA_SUCCESS = 0,
    MX_CUDA_INVALID_VALUE = 1,
    MX_CUDA_OUT_OF_MEMORY = 2,
    MX_CUDA_DEINITIALIZED = 4,
    MX_CUDA_NO_DEVICE = 100,
    MX_CUDA_NOT_READY = 600,
};

enum {
    MX_DEVICE_MULTIPROCESSORS = 16,
    MX_DEVICE_UNIFIED_ADDRESSING = 41,
    MX_DEVICE_CAPABILITY_MAJOR = 75,
    MX_DEVICE_CAPABILITY_MINOR = 76,
    MX_POINTER_CONTEXT = 1,
    MX_POINTER_MEMORY_TYPE = 2,
    MX_POINTER_IS_MANAGED = 8,
    MX_POINTER_DEVICE = 9,
    MX_POINTER_IPC_CAPABLE = 10, /* by cuIpcGetMemHandle: not what cuMemCreate made */
    MX_POINTER_RANGE_START = 11, /* of the allocation; cuMemGetAddressRange wants a current context for the same */
    MX_POINTER_RANGE_BYTES = 12,
    MX_MEMORY_HOST = 1,
    MX_MEMORY_DEVICE = 2,
    MX_STREAM_NON_BLOCKING = 1,
    MX_EVENT_BLOCKING_SYNC = 1,
    MX_EVENT_NO_TIMING = 2,
    MX_IPC_LAZY_PEER_ACCESS = 1,
    MX_HOST_PORTABLE = 1, /* pinned for every context */
    MX_HOST_MAPPED = 2,   /* kernels may read it */
    MX_JIT_ERROR_LOG = 5,
    MX_JIT_ERROR_LOG_BYTES = 6,
};

/* F(member, exported name, arguments) */
#define MX_CUDA_FUNCTIONS(F)                                                                                           \
    F(init, cuInit, (unsigned int flags))                                                                              \
    F(driver_version, cuDriverGetVersion, (int *version))                                                              \
    F(error_name, cuGetErrorName, (mx_result error, const char **name))                                                \
    F(error_string, cuGetErrorString, (mx_result error, const char **text))                                            \
    F(device_count, cuDeviceGetCount, (int *count))                                                                    \
    F(device_get, cuDeviceGet, (int *device, int ordinal))                                                             \
    F(device_name, cuDeviceGetName, (char *name, int length, int device))                                              \
    F(device_total, cuDeviceTotalMem_v2, (size_t *bytes, int device))                                                  \
    F(device_attribute, cuDeviceGetAttribute, (int *value, mx_device_attribute attribute, int device))                 \
    F(device_pci, cuDeviceGetPCIBusId, (char *id, int length, int device))                                             \
    F(primary_retain, cuDevicePrimaryCtxRetain, (mx_context * context, int device))                                    \
    F(primary_release, cuDevicePrimaryCtxRelease_v2, (int device))                                                     \
    F(primary_state, cuDevicePrimaryCtxGetState, (int device, unsigned int *flags, int *active))                       \
    F(context_push, cuCtxPushCurrent_v2, (mx_context context))                                                         \
    F(context_pop, cuCtxPopCurrent_v2, (mx_context * context))                                                         \
    F(context_current, cuCtxGetCurrent, (mx_context * context))                                                        \
    F(context_synchronize, cuCtxSynchronize, (void))                                                                   \
    F(stream_create, cuStreamCreate, (mx_stream * stream, unsigned int flags))                                         \
    F(stream_destroy, cuStreamDestroy_v2, (mx_stream stream))                                                          \
    F(stream_synchronize, cuStreamSynchronize, (mx_stream stream))                                                     \
    F(stream_query, cuStreamQuery, (mx_stream stream))                                                                 \
    F(stream_wait_event, cuStreamWaitEvent, (mx_stream stream, mx_event event, unsigned int flags))                    \
    F(event_create, cuEventCreate, (mx_event * event, unsigned int flags))                                             \
    F(event_destroy, cuEventDestroy_v2, (mx_event event))                                                              \
    F(event_record, cuEventRecord, (mx_event event, mx_stream stream))                                                 \
    F(event_query, cuEventQuery, (mx_event event))                                                                     \
    F(event_synchronize, cuEventSynchronize, (mx_event event))                                                         \
    F(event_elapsed, cuEventElapsedTime, (float *milliseconds, mx_event start, mx_event end))                          \
    F(memory_info, cuMemGetInfo_v2, (size_t *free_bytes, size_t *total_bytes))                                         \
    F(memory_alloc, cuMemAlloc_v2, (mx_device_address * address, size_t bytes))                                        \
    F(memory_free, cuMemFree_v2, (mx_device_address address))                                                          \
    F(pointer_attribute, cuPointerGetAttribute,                                                                        \
      (void *data, mx_pointer_attribute attribute, mx_device_address address))                                         \
    F(ipc_handle, cuIpcGetMemHandle, (mx_ipc_handle * handle, mx_device_address address))                              \
    F(ipc_open, cuIpcOpenMemHandle_v2, (mx_device_address * address, mx_ipc_handle handle, unsigned int flags))        \
    F(ipc_close, cuIpcCloseMemHandle, (mx_device_address address))                                                     \
    F(host_alloc, cuMemHostAlloc, (void **address, size_t bytes, unsigned int flags))                                  \
    F(host_free, cuMemFreeHost, (void *address))                                                                       \
    F(host_register, cuMemHostRegister_v2, (void *address, size_t bytes, unsigned int flags))                          \
    F(host_unregister, cuMemHostUnregister, (void *address))                                                           \
    F(host_device_address, cuMemHostGetDevicePointer_v2, (mx_device_address * device, void *host, unsigned int flags)) \
    F(copy_to_device, cuMemcpyHtoDAsync_v2, (mx_device_address to, const void *from, size_t bytes, mx_stream stream))  \
    F(copy_to_host, cuMemcpyDtoHAsync_v2, (void *to, mx_device_address from, size_t bytes, mx_stream stream))          \
    F(copy_on_device, cuMemcpyDtoDAsync_v2,                                                                            \
      (mx_device_address to, mx_device_address from, size_t bytes, mx_stream stream))                                  \
    F(module_load, cuModuleLoadDataEx,                                                                                 \
      (mx_module * module, const void *image, unsigned int options, mx_jit_option *names, void **values))              \
    F(module_unload, cuModuleUnload, (mx_module module))                                                               \
    F(module_function, cuModuleGetFunction, (mx_function * function, mx_module module, const char *name))              \
    F(launch, cuLaunchKernel,                                                                                          \
      (mx_function function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z, unsigned int block_x,      \
       unsigned int block_y, unsigned int block_z, unsigned int shared_bytes, mx_stream stream, void **arguments,      \
       void **extra))

typedef struct {
#define MX_CUDA_MEMBER(member, symbol, arguments) mx_result(*member) arguments;
    MX_CUDA_FUNCTIONS(MX_CUDA_MEMBER)
#undef MX_CUDA_MEMBER
} mx_cuda_table;

/* Only the tests' stand-in exports this (tests/cuda/driver). */
#define MX_STAND_IN_MARK "mx_cuda_stand_in_is_no_gpu"

/* Opens the library at `path`; with `stand_in` only the tests' stand-in, without it never that. `what` names it in the
 * reason why not, with which NULL is returned. It stays loaded: a driver does not survive dlclose. */
static inline void *mx_library_open(const char *path, int stand_in, const char *what, char *reason,
                                    size_t reason_bytes) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        const char *error = dlerror();
        snprintf(reason, reason_bytes, "%s", error != NULL ? error : "dlopen failed");
        return NULL;
    }
    if ((dlsym(library, MX_STAND_IN_MARK) != NULL) != (stand_in != 0)) {
        if (stand_in) {
            snprintf(reason, reason_bytes, "%s is no stand-in", path);
        } else {
            snprintf(reason, reason_bytes, "%s is the tests' stand-in, not %s", path, what);
        }
        dlclose(library);
        return NULL;
    }
    return library;
}

/* Fills `table` by mx_library_open. Returns 0, or -1 with the reason in `reason`. */
static inline int mx_cuda_open(const char *path, int stand_in, mx_cuda_table *table, char *reason,
                               size_t reason_bytes) {
    mx_cuda_table found;
    void *library = mx_library_open(path, stand_in, "a driver", reason, reason_bytes);
    if (library == NULL) {
        return -1;
    }
#define MX_CUDA_RESOLVE(member, symbol, arguments)                                                     \
    *(void **)&found.member = dlsym(library, #symbol);                                                 \
    if (found.member == NULL) {                                                                        \
        snprintf(reason, reason_bytes, "%s has no function %s: the driver is too old", path, #symbol); \
        return -1;                                                                                     \
    }
    MX_CUDA_FUNCTIONS(MX_CUDA_RESOLVE)
#undef MX_CUDA_RESOLVE
    *table = found;
    return 0;
}

#endif
