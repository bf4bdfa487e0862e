/* A CUDA driver without a GPU, for tests: host memory as device memory, streams that are threads.
 *
 * It keeps every rule that the tests want to see kept, and says so when one is broken (violations): memory that is used
 * after it was freed or beyond its end, a call without or with the wrong context, an asynchronous copy from memory that
 * is not pinned. Faults come on demand. Control functions (mx_stand_in_*) are in control.c.
 */
#ifndef STAND_IN_H
#define STAND_IN_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "cuda/cuda_driver.h"

#define EXPORT __attribute__((visibility("default")))
#define DEVICES 2

enum {
    NOT_INITIALIZED = 3,
    NOT_MAPPED = 205,
    INVALID_DEVICE = 101,
    INVALID_PTX = 218,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    LAUNCH_FAILED = 719,
};

typedef enum { DEVICE_MEMORY, HOST_MEMORY, REGISTERED_MEMORY } memory_kind;

typedef struct memory {
    struct memory *next;
    uintptr_t base;
    size_t bytes;
    memory_kind kind;
    int device;
    int freed;  /* kept, so that a late use is seen as such */
    int fd;     /* of memory that other processes can reach; -1: of this process alone */
    int opened; /* another process' */
} memory;

typedef struct device {
    int index;
    int retained;
    size_t used_bytes, total_bytes;
    struct stream *default_stream;
} device;

typedef struct work {
    struct work *next;
    void (*run)(struct work *);
    struct stream *stream;
    struct event *event;
    uint64_t ticket;
    int status;
    char *to;
    const char *from;
    size_t bytes;
    const char *kernel;
    unsigned grid, block;
    uint64_t arguments[3];
} work;

typedef struct stream {
    device *owner;
    pthread_t thread;
    pthread_cond_t changed;
    work *first, **last;
    int busy, closing, error; /* the error stays until mx_stand_in_reset */
    struct stream *all;
} stream;

typedef struct event {
    device *owner;
    uint64_t recorded, reached; /* tickets */
    double seconds;
    int error;
    int live;
} event;

typedef struct {
    int64_t contexts, streams, events, device_allocations, host_allocations, registrations, modules, opened;
    int64_t cufile_drivers, cufile_handles;
    int64_t violations, copies, unpinned_copies, launches, cufile_reads;
} counts;

extern pthread_mutex_t lock;
extern pthread_cond_t progress;
extern counts count;
extern device devices[DEVICES];
extern int held;   /* streams wait */
extern int shared; /* device memory that is made now can be exported */
extern int visible_devices;
extern stream *streams;

device *current_device(void); /* NULL: this thread has no context */
int violation(int status, const char *form, ...) __attribute__((format(printf, 2, 3)));
int injected(const char *function); /* 0, or the status that a test wants */
int injected_later(const char *what);
int flips_now(void);
memory *find_memory(uintptr_t address, size_t bytes);
int in_device_memory(uintptr_t address, size_t bytes, const char *what);
int readable_by_kernels(uintptr_t address, size_t bytes, const char *what);
int enqueue(void *handle, work *item);
stream *make_stream(device *owner);
void end_stream(stream *ending);
void run_kernel(work *item);
double now_seconds(void);

#define FAULT(function)                  \
    do {                                 \
        int fault_ = injected(function); \
        if (fault_ != 0)                 \
            return fault_;               \
    } while (0)

#endif
