/* libcufile's functions (GPUDirect Storage) as a table that is filled at run time from libcufile.so.0.
 *
 * Declarations by hand, from the public interface, as in cuda_driver.h; nothing is linked. The properties are as
 * cuFile 1.14 (CUDA 12.9) to 1.20 (CUDA 13) have them. tests/cuda/driver/cufile_matches.c compiles this beside
 * cufile.h.
 */
#ifndef MX_CUFILE_LIBRARY_H
#define MX_CUFILE_LIBRARY_H

#include "cuda/cuda_driver.h"

#include <fcntl.h>
#include <stdbool.h>
#include <sys/types.h>

#ifdef MX_WITH_CUFILE_H /* the test that compares has included it before */
typedef CUfileError_t mx_cufile_error;
typedef CUfileDrvProps_t mx_cufile_properties;
typedef CUfileDescr_t mx_cufile_descriptor;
typedef CUFileBoolConfigParameter_t mx_cufile_flag;
#else
typedef struct {
    int err;    /* CUfileOpError: 0, or above 5000 */
    int cu_err; /* the driver's, where err is MX_CUFILE_CUDA_DRIVER_ERROR */
} mx_cufile_error;

typedef struct {
    struct {
        unsigned int major_version, minor_version;   /* of nvidia-fs */
        size_t poll_thresh_size, max_direct_io_size; /* KiB */
        unsigned int dstatusflags, dcontrolflags;
    } nvfs;
    unsigned int fflags;
    unsigned int max_device_cache_size, per_buffer_cache_size, max_device_pinned_mem_size; /* KiB */
    unsigned int max_batch_io_size, max_batch_io_timeout_msecs;
} mx_cufile_properties;

typedef struct {
    int type; /* MX_CUFILE_DESCRIPTOR */
    union {
        int fd;
        void *handle;
    } handle;
    const void *fs_ops;
} mx_cufile_descriptor;

typedef int mx_cufile_flag;
#endif

/* As cufile.h of 1.14 and of 1.20 lay them out. */
_Static_assert(sizeof(mx_cufile_error) == 8 && sizeof(mx_cufile_properties) == 56 && sizeof(mx_cufile_descriptor) == 24,
               "");
_Static_assert(offsetof(mx_cufile_properties, nvfs.dcontrolflags) == 28 && offsetof(mx_cufile_descriptor, handle) == 8,
               "");

enum {
    MX_CUFILE_DESCRIPTOR = 1,
    MX_CUFILE_CUDA_DRIVER_ERROR = 5011,
    MX_CUFILE_ALLOW_COMPAT_MODE = 1, /* the parameter; in the control flags a bit of the same number */
    MX_CUFILE_POLLS = 1,             /* the one control flag that says nothing of compatibility */
};

/* F(member, exported name, result, arguments) */
#define MX_CUFILE_FUNCTIONS(F)                                                                                   \
    F(open, cuFileDriverOpen, mx_cufile_error, (void))                                                           \
    F(close, cuFileDriverClose_v2, mx_cufile_error, (void))                                                      \
    F(use_count, cuFileUseCount, long, (void))                                                                   \
    F(properties, cuFileDriverGetProperties, mx_cufile_error, (mx_cufile_properties * properties))               \
    F(version, cuFileGetVersion, mx_cufile_error, (int *version))                                                \
    F(set_flag, cuFileSetParameterBool, mx_cufile_error, (mx_cufile_flag flag, bool value))                      \
    F(handle_register, cuFileHandleRegister, mx_cufile_error, (void **handle, mx_cufile_descriptor *descriptor)) \
    F(handle_deregister, cuFileHandleDeregister, void, (void *handle))                                           \
    F(read, cuFileRead, ssize_t, (void *handle, void *base, size_t bytes, off_t file_offset, off_t base_offset))

typedef struct {
#define MX_CUFILE_MEMBER(member, symbol, result, arguments) result(*member) arguments;
    MX_CUFILE_FUNCTIONS(MX_CUFILE_MEMBER)
#undef MX_CUFILE_MEMBER
} mx_cufile_table;

/* As mx_cuda_open, for this table. */
static inline int mx_cufile_open(const char *path, int stand_in, mx_cufile_table *table, char *reason,
                                 size_t reason_bytes) {
    mx_cufile_table found;
    void *library = mx_library_open(path, stand_in, "libcufile", reason, reason_bytes);
    if (library == NULL) {
        return -1;
    }
#define MX_CUFILE_RESOLVE(member, symbol, result, arguments)                                               \
    *(void **)&found.member = dlsym(library, #symbol);                                                     \
    if (found.member == NULL) {                                                                            \
        snprintf(reason, reason_bytes, "%s has no function %s: cuFile is older than 1.14", path, #symbol); \
        return -1;                                                                                         \
    }
    MX_CUFILE_FUNCTIONS(MX_CUFILE_RESOLVE)
#undef MX_CUFILE_RESOLVE
    *table = found;
    return 0;
}

static inline unsigned int mx_cufile_control_flags(const mx_cufile_properties *properties) {
    return properties->nvfs.dcontrolflags;
}

/* Registers a descriptor that was opened with O_DIRECT. Files are opened with O_NONBLOCK, for pipes that lie in their
 * place; it means nothing for files, and cuFile is strict about flags. */
static inline mx_cufile_error mx_cufile_register(const mx_cufile_table *table, int fd, void **handle) {
    int flags = fcntl(fd, F_GETFL);
    if (flags >= 0) {
        fcntl(fd, F_SETFL, flags & ~O_NONBLOCK);
    }
    mx_cufile_descriptor descriptor = {.type = MX_CUFILE_DESCRIPTOR, .handle = {.fd = fd}};
    return table->handle_register(handle, &descriptor);
}

#endif
