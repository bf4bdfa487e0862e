/* Memory and copies of the stand-in. Every use of an address is looked up. */
#define _GNU_SOURCE
#include "stand_in.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define GRANULE 512 /* as on a device: a kernel may load aligned words around what it was given */

static memory *all;

/* The live memory that holds all of these bytes; NULL: none. Under the lock. */
memory *find_memory(uintptr_t address, size_t bytes) {
    for (memory *each = all; each != NULL; each = each->next) {
        if (!each->freed && address >= each->base && address + bytes <= each->base + each->bytes) {
            return each;
        }
    }
    return NULL;
}

static int complain(uintptr_t address, size_t bytes, const char *what) {
    for (memory *each = all; each != NULL; each = each->next) {
        if (address >= each->base && address < each->base + each->bytes) {
            return violation(ILLEGAL_ADDRESS,
                             each->freed ? "%s: %zu bytes at %#zx were freed"
                                         : "%s: %zu bytes at %#zx go beyond their allocation",
                             what, bytes, (size_t)address);
        }
    }
    return violation(ILLEGAL_ADDRESS, "%s: %zu bytes at %#zx are no memory of the device", what, bytes,
                     (size_t)address);
}

int in_device_memory(uintptr_t address, size_t bytes, const char *what) {
    memory *found = find_memory(address, bytes);
    return found != NULL && found->kind == DEVICE_MEMORY ? 0 : complain(address, bytes, what);
}

int readable_by_kernels(uintptr_t address, size_t bytes, const char *what) {
    return find_memory(address, bytes) != NULL ? 0 : complain(address, bytes, what);
}

static memory *remember(uintptr_t base, size_t bytes, memory_kind kind) {
    memory *made = calloc(1, sizeof *made);
    for (memory **at = &all; *at != NULL;) { /* an address that comes back is new memory */
        memory *each = *at;
        if (each->freed && base < each->base + each->bytes && each->base < base + bytes) {
            *at = each->next;
            free(each);
        } else {
            at = &each->next;
        }
    }
    made->base = base;
    made->bytes = bytes;
    made->kind = kind;
    made->fd = -1;
    made->device = current_device()->index;
    made->next = all;
    all = made;
    return made;
}

/* Takes the memory that begins there out of use; NULL: there is none. */
static memory *forget(uintptr_t base, memory_kind kind, const char *what) {
    for (memory *each = all; each != NULL; each = each->next) {
        if (!each->freed && each->base == base && each->kind == kind && !each->opened) {
            each->freed = 1;
            return each;
        }
    }
    complain(base, 1, what);
    return NULL;
}

EXPORT int cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
    device *owner = current_device();
    if (owner == NULL) {
        return INVALID_CONTEXT;
    }
    *total_bytes = owner->total_bytes;
    *free_bytes = owner->total_bytes - owner->used_bytes;
    return 0;
}

/* Device memory that another process can map, by its file; -1: there is none to be had. */
static int map_shared(void **address, size_t bytes) {
    int fd = memfd_create("stand-in", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, (off_t)bytes) == 0) {
        *address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (*address != MAP_FAILED) {
            return fd;
        }
    }
    if (fd >= 0) {
        close(fd);
    }
    return -1;
}

static int allocate(void **address, size_t bytes, memory_kind kind) {
    pthread_mutex_lock(&lock);
    device *owner = current_device();
    size_t whole = (bytes + GRANULE - 1) / GRANULE * GRANULE;
    int status = owner == NULL ? violation(INVALID_CONTEXT, "memory without a context")
                 : bytes == 0  ? MX_CUDA_INVALID_VALUE
                 : kind == DEVICE_MEMORY && owner->used_bytes + bytes > owner->total_bytes ? MX_CUDA_OUT_OF_MEMORY
                                                                                           : 0;
    int fd = -1;
    if (status == 0 && kind == DEVICE_MEMORY && shared) {
        fd = map_shared(address, whole);
        status = fd < 0 ? MX_CUDA_OUT_OF_MEMORY : 0;
    } else if (status == 0 && posix_memalign(address, kind == DEVICE_MEMORY ? GRANULE : 4096, whole) != 0) {
        status = MX_CUDA_OUT_OF_MEMORY;
    }
    if (status == 0) {
        memset(*address, 0xA5, whole); /* new memory is not zero on a device either */
        remember((uintptr_t)*address, bytes, kind)->fd = fd;
        if (kind == DEVICE_MEMORY) {
            owner->used_bytes += bytes;
        }
        count.device_allocations += kind == DEVICE_MEMORY;
        count.host_allocations += kind == HOST_MEMORY;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT int cuMemAlloc_v2(mx_device_address *address, size_t bytes) {
    void *made = NULL;
    FAULT("cuMemAlloc_v2");
    int status = allocate(&made, bytes, DEVICE_MEMORY);
    *address = (uintptr_t)made;
    return status;
}

EXPORT int cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
    FAULT("cuMemHostAlloc");
    (void)flags;
    return allocate(address, bytes, HOST_MEMORY);
}

static int release(uintptr_t address, memory_kind kind, const char *what) {
    pthread_mutex_lock(&lock);
    memory *found = forget(address, kind, what);
    if (found != NULL) {
        if (kind == DEVICE_MEMORY) {
            devices[found->device].used_bytes -= found->bytes;
        }
        count.device_allocations -= kind == DEVICE_MEMORY;
        count.host_allocations -= kind == HOST_MEMORY;
        count.registrations -= kind == REGISTERED_MEMORY;
        if (kind != REGISTERED_MEMORY) {
            memset((void *)address, 0x5A, found->bytes); /* whoever looks later, sees that it is gone */
            if (found->fd >= 0) {
                munmap((void *)address, (found->bytes + GRANULE - 1) / GRANULE * GRANULE);
                close(found->fd);
            } else {
                free((void *)address);
            }
        }
    }
    pthread_mutex_unlock(&lock);
    return found != NULL ? 0 : MX_CUDA_INVALID_VALUE;
}

EXPORT int cuMemFree_v2(mx_device_address address) {
    FAULT("cuMemFree_v2");
    return release((uintptr_t)address, DEVICE_MEMORY, "cuMemFree");
}

EXPORT int cuMemFreeHost(void *address) {
    FAULT("cuMemFreeHost");
    return release((uintptr_t)address, HOST_MEMORY, "cuMemFreeHost");
}

EXPORT int cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags) {
    FAULT("cuMemHostRegister_v2");
    (void)flags;
    pthread_mutex_lock(&lock);
    int status = current_device() == NULL ? violation(INVALID_CONTEXT, "pinning without a context")
                 : find_memory((uintptr_t)address, bytes) != NULL ? ALREADY_REGISTERED
                                                                  : 0;
    if (status == 0) {
        remember((uintptr_t)address, bytes, REGISTERED_MEMORY);
        count.registrations++;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT int cuMemHostUnregister(void *address) {
    FAULT("cuMemHostUnregister");
    return release((uintptr_t)address, REGISTERED_MEMORY, "cuMemHostUnregister");
}

EXPORT int cuMemHostGetDevicePointer_v2(mx_device_address *device_address, void *address, unsigned flags) {
    FAULT("cuMemHostGetDevicePointer_v2");
    pthread_mutex_lock(&lock);
    memory *found = find_memory((uintptr_t)address, 1);
    pthread_mutex_unlock(&lock);
    *device_address = (uintptr_t)address;
    return found == NULL || found->kind == DEVICE_MEMORY || flags != 0 ? MX_CUDA_INVALID_VALUE : 0;
}

EXPORT int cuPointerGetAttribute(void *data, int attribute, mx_device_address address) {
    pthread_mutex_lock(&lock);
    memory *found = find_memory((uintptr_t)address, 1);
    int status = found != NULL ? 0 : MX_CUDA_INVALID_VALUE;
    if (status == 0 && attribute == MX_POINTER_MEMORY_TYPE) {
        *(unsigned *)data = found->kind == DEVICE_MEMORY ? MX_MEMORY_DEVICE : MX_MEMORY_HOST;
    } else if (status == 0 && attribute == MX_POINTER_DEVICE) {
        *(int *)data = found->device;
    } else if (status == 0 && attribute == MX_POINTER_RANGE_START) {
        *(mx_device_address *)data = found->base;
    } else if (status == 0 && attribute == MX_POINTER_RANGE_BYTES) {
        *(size_t *)data = found->bytes;
    } else if (status == 0 && attribute == MX_POINTER_IPC_CAPABLE) {
        *(int *)data = found->fd >= 0;
    } else {
        status = MX_CUDA_INVALID_VALUE;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

/* ---- memory of other processes ---- */

#define HANDLE_MARK 0x6d78697063ull

typedef struct {
    uint64_t mark, bytes;
    int64_t pid, fd;
} exported; /* what an mx_ipc_handle holds */

EXPORT int cuIpcGetMemHandle(mx_ipc_handle *handle, mx_device_address address) {
    FAULT("cuIpcGetMemHandle");
    pthread_mutex_lock(&lock);
    memory *found = find_memory((uintptr_t)address, 1);
    int status = current_device() == NULL         ? violation(INVALID_CONTEXT, "exporting without a context")
                 : found == NULL || found->fd < 0 ? MX_CUDA_INVALID_VALUE
                                                  : 0;
    if (status == 0) {
        exported what = {HANDLE_MARK, found->bytes, getpid(), found->fd};
        memset(handle, 0, sizeof *handle);
        memcpy(handle, &what, sizeof what);
    }
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT int cuIpcOpenMemHandle_v2(mx_device_address *address, mx_ipc_handle handle, unsigned flags) {
    FAULT("cuIpcOpenMemHandle_v2");
    exported what;
    char path[64];
    memcpy(&what, &handle, sizeof what);
    if (what.mark != HANDLE_MARK || flags != MX_IPC_LAZY_PEER_ACCESS) {
        return MX_CUDA_INVALID_VALUE;
    }
    if (what.pid == getpid()) {
        return INVALID_CONTEXT; /* as the driver: a process does not open its own */
    }
    snprintf(path, sizeof path, "/proc/%lld/fd/%lld", (long long)what.pid, (long long)what.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    void *mapped = fd < 0 ? MAP_FAILED : mmap(NULL, what.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd >= 0) {
        close(fd);
    }
    if (mapped == MAP_FAILED) {
        return NOT_MAPPED;
    }
    pthread_mutex_lock(&lock);
    remember((uintptr_t)mapped, what.bytes, DEVICE_MEMORY)->opened = 1;
    count.opened++;
    pthread_mutex_unlock(&lock);
    *address = (uintptr_t)mapped;
    return 0;
}

EXPORT int cuIpcCloseMemHandle(mx_device_address address) {
    FAULT("cuIpcCloseMemHandle");
    pthread_mutex_lock(&lock);
    memory *found = find_memory((uintptr_t)address, 1);
    int status = found == NULL || !found->opened ? complain((uintptr_t)address, 1, "cuIpcCloseMemHandle") : 0;
    if (status == 0) {
        found->freed = 1;
        count.opened--;
        munmap((void *)found->base, found->bytes);
    }
    pthread_mutex_unlock(&lock);
    return status;
}

/* ---- copies ---- */

static void run_copy(work *item) {
    stream *own = item->stream;
    if (own->error != 0) {
        return; /* nothing works after an error */
    }
    own->error = injected_later("copy");
    if (own->error == 0 && find_memory((uintptr_t)item->to, item->bytes) == NULL) {
        own->error = complain((uintptr_t)item->to, item->bytes, "a copy under way, destination");
    }
    if (own->error == 0 && find_memory((uintptr_t)item->from, item->bytes) == NULL) {
        own->error = complain((uintptr_t)item->from, item->bytes, "a copy under way, source");
    }
    if (own->error != 0) {
        return;
    }
    int flips = flips_now();
    pthread_mutex_unlock(&lock);
    memmove(item->to, item->from, item->bytes);
    if (flips) {
        item->to[item->bytes / 2] ^= 4;
    }
    pthread_mutex_lock(&lock);
}

/* Under the lock: a copy from or to pageable memory, complete before the call returns. */
static int copy_now(char *to, const char *from, size_t bytes, void *handle, int to_device) {
    stream *target = handle;
    count.unpinned_copies++;
    if (current_device() == NULL || (target != NULL && target->owner != current_device())) {
        return violation(INVALID_CONTEXT, "a copy in the wrong context");
    }
    while (target != NULL && (target->first != NULL || target->busy)) {
        pthread_cond_wait(&progress, &lock);
    }
    int failed = target != NULL ? target->error : 0;
    if (failed == 0) {
        failed = in_device_memory((uintptr_t)(to_device ? to : from), bytes, "a copy");
    }
    if (failed == 0) {
        memmove(to, from, bytes);
        to[bytes / 2] ^= flips_now() ? 4 : 0;
    }
    return failed;
}

static int copy(char *to, const char *from, size_t bytes, void *handle, int to_device, int from_device) {
    pthread_mutex_lock(&lock);
    count.copies++;
    int status = 0;
    if (to_device) {
        status = in_device_memory((uintptr_t)to, bytes, "a copy's destination");
    }
    if (status == 0 && from_device) {
        status = in_device_memory((uintptr_t)from, bytes, "a copy's source");
    }
    if (status != 0) {
        status = MX_CUDA_INVALID_VALUE;
    } else if ((!to_device && find_memory((uintptr_t)to, bytes) == NULL) ||
               (!from_device && find_memory((uintptr_t)from, bytes) == NULL)) {
        status = copy_now(to, from, bytes, handle, to_device);
    } else {
        work *item = calloc(1, sizeof *item);
        item->run = run_copy;
        item->to = to;
        item->from = from;
        item->bytes = bytes;
        status = enqueue(handle, item);
    }
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT int cuMemcpyHtoDAsync_v2(mx_device_address to, const void *from, size_t bytes, void *handle) {
    FAULT("cuMemcpyHtoDAsync_v2");
    return copy((char *)(uintptr_t)to, from, bytes, handle, 1, 0);
}

EXPORT int cuMemcpyDtoHAsync_v2(void *to, mx_device_address from, size_t bytes, void *handle) {
    FAULT("cuMemcpyDtoHAsync_v2");
    return copy(to, (const char *)(uintptr_t)from, bytes, handle, 0, 1);
}

EXPORT int cuMemcpyDtoDAsync_v2(mx_device_address to, mx_device_address from, size_t bytes, void *handle) {
    FAULT("cuMemcpyDtoDAsync_v2");
    return copy((char *)(uintptr_t)to, (const char *)(uintptr_t)from, bytes, handle, 1, 1);
}
