/* libcufile of the stand-in: reads of real files into the stand-in's device memory, whole blocks past the page cache.
 *
 * It keeps the rules that ours promises to keep: registered handles of descriptors with O_DIRECT, whole blocks within
 * the file, device memory of the current context that no stream still writes to, a driver that is closed after its
 * handles. Faults (mx_stand_in_fail_later): cufile-short (bytes that come), cufile-wrong (one bit), cufile-beyond (a
 * byte behind the end), cufile-host (the properties say compatibility mode).
 */
#define _GNU_SOURCE
#include "stand_in.h"

#include "reading/cufile_library.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define BLOCK 4096

enum {
    FILE_NOT_INITIALIZED = 5001,
    FILE_CLOSING = 5006,
    FILE_POINTER_INVALID = 5012,
    FILE_INVALID_TYPE = 5018,
    FILE_INVALID_FLAG = 5019,
    FILE_INVALID_VALUE = 5022,
    FILE_ALREADY_OPEN = 5026,
    FILE_NOT_REGISTERED = 5027,
    FILE_ALREADY_REGISTERED = 5028,
};

typedef struct handle {
    struct handle *next;
    int fd;
    off_t bytes; /* when it was registered */
} handle;

static handle *handles; /* under the lock, as all below */
static int opened, compatible = 1, staged = 1, reading;

static mx_cufile_error status(int err) { return (mx_cufile_error){err, 0}; }

#define FILE_FAULT(function)             \
    do {                                 \
        int fault_ = injected(function); \
        if (fault_ != 0)                 \
            return status(fault_);       \
    } while (0)

EXPORT mx_cufile_error cuFileGetVersion(int *version) {
    *version = 1140;
    return status(0);
}

EXPORT long cuFileUseCount(void) { return injected("cuFileUseCount") != 0 ? 1 : opened; }

EXPORT mx_cufile_error cuFileSetParameterBool(mx_cufile_flag flag, bool value) {
    FILE_FAULT("cuFileSetParameterBool");
    if (opened) {
        return status(FILE_ALREADY_OPEN);
    }
    staged = flag == MX_CUFILE_ALLOW_COMPAT_MODE ? value : staged;
    return status(0);
}

EXPORT mx_cufile_error cuFileDriverOpen(void) {
    FILE_FAULT("cuFileDriverOpen");
    pthread_mutex_lock(&lock);
    int err = opened ? FILE_ALREADY_OPEN : 0;
    compatible = staged;
    staged = opened = 1;
    count.cufile_drivers += err == 0;
    pthread_mutex_unlock(&lock);
    return status(err);
}

EXPORT mx_cufile_error cuFileDriverClose_v2(void) {
    FILE_FAULT("cuFileDriverClose_v2");
    pthread_mutex_lock(&lock);
    int err = !opened ? FILE_NOT_INITIALIZED : reading ? FILE_CLOSING : 0;
    if (err == 0) {
        if (handles != NULL) {
            violation(0, "cuFile's driver was closed with files registered");
        }
        opened = 0;
        count.cufile_drivers--;
    }
    pthread_mutex_unlock(&lock);
    return status(err);
}

EXPORT mx_cufile_error cuFileDriverGetProperties(mx_cufile_properties *properties) {
    FILE_FAULT("cuFileDriverGetProperties");
    pthread_mutex_lock(&lock);
    int host = compatible || injected_later("cufile-host") != 0;
    memset(properties, 0, sizeof *properties);
    properties->nvfs.major_version = 2;
    properties->nvfs.max_direct_io_size = 16384;
    properties->nvfs.dcontrolflags = host ? 1u << MX_CUFILE_ALLOW_COMPAT_MODE : 0;
    pthread_mutex_unlock(&lock);
    return status(0);
}

static handle *find(void *wanted) {
    for (handle *each = handles; each != NULL; each = each->next) {
        if (each == wanted) {
            return each;
        }
    }
    return NULL;
}

static int cannot_register(int fd, off_t *bytes) {
    struct stat found;
    int flags = fcntl(fd, F_GETFL);
    if (!opened) {
        violation(0, "a file was registered without a driver");
        return FILE_NOT_INITIALIZED;
    }
    for (handle *each = handles; each != NULL; each = each->next) {
        if (each->fd == fd) {
            return FILE_ALREADY_REGISTERED;
        }
    }
    if (flags < 0 || !(flags & O_DIRECT) || (flags & O_NONBLOCK)) {
        return FILE_INVALID_FLAG;
    }
    if (fstat(fd, &found) != 0 || !S_ISREG(found.st_mode)) {
        return FILE_INVALID_TYPE;
    }
    *bytes = found.st_size;
    return 0;
}

EXPORT mx_cufile_error cuFileHandleRegister(void **made, mx_cufile_descriptor *descriptor) {
    FILE_FAULT("cuFileHandleRegister");
    pthread_mutex_lock(&lock);
    off_t bytes = 0;
    int err =
        descriptor->type != MX_CUFILE_DESCRIPTOR ? FILE_INVALID_VALUE : cannot_register(descriptor->handle.fd, &bytes);
    if (err == 0) {
        handle *added = calloc(1, sizeof *added);
        *added = (handle){handles, descriptor->handle.fd, bytes};
        *made = handles = added;
        count.cufile_handles++;
    }
    pthread_mutex_unlock(&lock);
    return status(err);
}

EXPORT void cuFileHandleDeregister(void *ending) {
    pthread_mutex_lock(&lock);
    handle *found = find(ending);
    if (found == NULL) {
        violation(0, "a file was deregistered twice");
    } else if (fcntl(found->fd, F_GETFL) < 0) {
        violation(0, "a file was closed before it was deregistered");
    }
    for (handle **at = &handles; *at != NULL; at = &(*at)->next) {
        if (*at == found) {
            *at = found->next;
            free(found);
            count.cufile_handles--;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
}

/* Work of any stream that is going to write there. */
static int awaited(const char *to, size_t bytes) {
    for (stream *each = streams; each != NULL; each = each->all) {
        for (work *item = each->first; item != NULL; item = item->next) {
            if (item->bytes > 0 && item->to < to + bytes && to < item->to + item->bytes) {
                return 1;
            }
        }
    }
    return 0;
}

/* 0, or what the call is refused with. */
static int cannot_read(handle *found, char *to, size_t bytes, off_t begin) {
    if (found == NULL) {
        violation(0, "a read of a file that is not registered");
        return FILE_NOT_REGISTERED;
    }
    if (bytes == 0 || bytes % BLOCK != 0 || begin % BLOCK != 0) {
        return violation(FILE_INVALID_VALUE, "cuFile: %zu bytes at %lld are no whole blocks", bytes, (long long)begin);
    }
    if (fcntl(found->fd, F_GETFL) < 0) {
        return violation(FILE_NOT_REGISTERED, "cuFile: the file was closed");
    }
    if (begin + (off_t)bytes > found->bytes) {
        return violation(FILE_INVALID_VALUE, "cuFile: %zu bytes at %lld of %lld", bytes, (long long)begin,
                         (long long)found->bytes);
    }
    if (current_device() == NULL) {
        return violation(FILE_POINTER_INVALID, "cuFileRead without a context");
    }
    memory *place = find_memory((uintptr_t)to, bytes);
    if (in_device_memory((uintptr_t)to, bytes, "cuFileRead") != 0) {
        return FILE_POINTER_INVALID;
    }
    if (&devices[place->device] != current_device()) {
        return violation(FILE_POINTER_INVALID, "cuFileRead into memory that is not the current device's");
    }
    return awaited(to, bytes) ? violation(FILE_INVALID_VALUE, "cuFileRead into memory that a stream still writes") : 0;
}

static ssize_t read_blocks(int fd, char *to, size_t bytes, off_t begin) {
    void *block = NULL;
    size_t done = 0;
    if (posix_memalign(&block, BLOCK, bytes) != 0) {
        errno = ENOMEM;
        return -1;
    }
    while (done < bytes) {
        ssize_t got = pread(fd, (char *)block + done, bytes - done, begin + (off_t)done);
        if (got <= 0) {
            break;
        }
        done += (size_t)got;
    }
    memcpy(to, block, done);
    free(block);
    return (ssize_t)done;
}

EXPORT ssize_t cuFileRead(void *handle_, void *base, size_t bytes, off_t begin, off_t base_offset) {
    char *to = (char *)base + base_offset;
    int fault = injected("cuFileRead");
    if (fault != 0 && fault < FILE_NOT_INITIALIZED) {
        errno = fault;
        return -1;
    }
    pthread_mutex_lock(&lock);
    while (held) { /* as slow as it gets */
        pthread_cond_wait(&progress, &lock);
    }
    handle *found = find(handle_);
    int err = fault != 0 ? fault : cannot_read(found, to, bytes, begin);
    int fd = err == 0 ? found->fd : -1;
    reading++;
    count.cufile_reads += err == 0;
    pthread_mutex_unlock(&lock);
    ssize_t got = err != 0 ? -err : read_blocks(fd, to, bytes, begin);
    pthread_mutex_lock(&lock);
    int length = injected_later("cufile-short");
    got = got > 0 && length != 0 ? length : got;
    if (got > 0 && injected_later("cufile-wrong") != 0) {
        to[got / 2] ^= 4;
    }
    if (got > 0 && injected_later("cufile-beyond") != 0) {
        to[got] ^= 4;
    }
    reading--;
    pthread_mutex_unlock(&lock);
    return got;
}
