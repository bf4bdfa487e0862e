/* Devices, contexts, streams and events of the stand-in. */
#include "stand_in.h"

#include <stdlib.h>

static int initialized;
device devices[DEVICES] = {{.index = 0, .total_bytes = (size_t)1 << 32}, {.index = 1, .total_bytes = (size_t)1 << 32}};
stream *streams;

#define STACK 16
static __thread device *stack[STACK];
static __thread int depth;

device *current_device(void) {
    if (depth == 0) {
        return NULL;
    }
    return stack[depth - 1]->retained > 0 ? stack[depth - 1] : NULL;
}

EXPORT int cuInit(unsigned flags) {
    FAULT("cuInit");
    initialized = 1;
    return flags == 0 ? 0 : MX_CUDA_INVALID_VALUE;
}

EXPORT int cuDriverGetVersion(int *version) {
    *version = 12080;
    return 0;
}

static const struct {
    int status;
    const char *name, *text;
} names[] = {
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {205, "CUDA_ERROR_MAP_FAILED", "mapping of buffer object failed"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
};

static int find_name(int status) {
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (names[i].status == status) {
            return (int)i;
        }
    }
    return -1;
}

EXPORT int cuGetErrorName(int status, const char **name) {
    int at = find_name(status);
    *name = at < 0 ? NULL : names[at].name;
    return at < 0 ? MX_CUDA_INVALID_VALUE : 0;
}

EXPORT int cuGetErrorString(int status, const char **text) {
    int at = find_name(status);
    *text = at < 0 ? NULL : names[at].text;
    return at < 0 ? MX_CUDA_INVALID_VALUE : 0;
}

EXPORT int cuDeviceGetCount(int *number) {
    FAULT("cuDeviceGetCount");
    *number = visible_devices;
    return initialized ? 0 : NOT_INITIALIZED;
}

EXPORT int cuDeviceGet(int *handle, int ordinal) {
    *handle = ordinal;
    return !initialized ? NOT_INITIALIZED : ordinal < 0 || ordinal >= visible_devices ? INVALID_DEVICE : 0;
}

EXPORT int cuDeviceGetName(char *name, int length, int handle) {
    snprintf(name, (size_t)length, "stand-in %d (no GPU)", handle);
    return 0;
}

EXPORT int cuDeviceTotalMem_v2(size_t *bytes, int handle) {
    *bytes = devices[handle].total_bytes;
    return 0;
}

EXPORT int cuDeviceGetAttribute(int *value, int attribute, int handle) {
    (void)handle;
    switch (attribute) {
    case MX_DEVICE_MULTIPROCESSORS: *value = 4; return 0;
    case MX_DEVICE_UNIFIED_ADDRESSING: *value = 1; return 0;
    case MX_DEVICE_CAPABILITY_MAJOR: *value = 9; return 0;
    case MX_DEVICE_CAPABILITY_MINOR: *value = 0; return 0;
    default: return MX_CUDA_INVALID_VALUE;
    }
}

EXPORT int cuDeviceGetPCIBusId(char *id, int length, int handle) {
    snprintf(id, (size_t)length, "FFFF:%02X:00.0", handle); /* on no machine */
    return 0;
}

EXPORT int cuDevicePrimaryCtxRetain(void **context, int handle) {
    FAULT("cuDevicePrimaryCtxRetain");
    pthread_mutex_lock(&lock);
    devices[handle].retained++;
    count.contexts++;
    pthread_mutex_unlock(&lock);
    *context = &devices[handle];
    return 0;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int handle) {
    FAULT("cuDevicePrimaryCtxRelease_v2");
    pthread_mutex_lock(&lock);
    int status = devices[handle].retained > 0 ? 0 : violation(INVALID_CONTEXT, "a context was released too often");
    if (status == 0) {
        devices[handle].retained--;
        count.contexts--;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT int cuDevicePrimaryCtxGetState(int handle, unsigned *flags, int *active) {
    *flags = 0;
    *active = devices[handle].retained > 0;
    return 0;
}

EXPORT int cuCtxPushCurrent_v2(void *context) {
    device *pushed = context;
    FAULT("cuCtxPushCurrent_v2");
    if (pushed == NULL || pushed->retained == 0 || depth == STACK) {
        pthread_mutex_lock(&lock);
        violation(0, "a context was pushed that nobody holds");
        pthread_mutex_unlock(&lock);
        return INVALID_CONTEXT;
    }
    stack[depth++] = pushed;
    return 0;
}

EXPORT int cuCtxPopCurrent_v2(void **context) {
    if (depth == 0) {
        return INVALID_CONTEXT;
    }
    *context = stack[--depth];
    return 0;
}

EXPORT int cuCtxGetCurrent(void **context) {
    *context = depth > 0 ? stack[depth - 1] : NULL;
    return 0;
}

/* ---- streams: a thread each ---- */

static void *run_stream(void *data) {
    stream *own = data;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (own->first == NULL || held) {
            if (own->first == NULL && own->closing) {
                pthread_mutex_unlock(&lock);
                return NULL;
            }
            pthread_cond_wait(&own->changed, &lock);
        }
        work *item = own->first;
        own->busy = 1;
        item->run(item); /* takes the lock off for the bytes */
        own->first = item->next;
        if (own->first == NULL) {
            own->last = &own->first;
        }
        own->busy = 0;
        free(item);
        pthread_cond_broadcast(&progress);
    }
}

stream *make_stream(device *owner) {
    stream *made = calloc(1, sizeof *made);
    made->owner = owner;
    made->last = &made->first;
    pthread_cond_init(&made->changed, NULL);
    if (pthread_create(&made->thread, NULL, run_stream, made) != 0) {
        free(made);
        return NULL;
    }
    made->all = streams;
    streams = made;
    return made;
}

void end_stream(stream *ending) {
    pthread_mutex_lock(&lock);
    ending->closing = 1;
    pthread_cond_broadcast(&ending->changed);
    pthread_mutex_unlock(&lock);
    pthread_join(ending->thread, NULL);
    pthread_mutex_lock(&lock);
    for (stream **at = &streams; *at != NULL; at = &(*at)->all) {
        if (*at == ending) {
            *at = ending->all;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    pthread_cond_destroy(&ending->changed);
    free(ending);
}

/* The stream of a handle; the device's default one for none. Under the lock; NULL: no such stream. */
static stream *stream_of(void *handle) {
    if (handle == NULL) {
        device *owner = current_device();
        if (owner != NULL && owner->default_stream == NULL) {
            owner->default_stream = make_stream(owner);
        }
        return owner == NULL ? NULL : owner->default_stream;
    }
    for (stream *each = streams; each != NULL; each = each->all) {
        if (each == handle) {
            return each;
        }
    }
    return NULL;
}

/* Takes the work over, and frees it where it cannot. Under the lock. */
int enqueue(void *handle, work *item) {
    stream *to = stream_of(handle);
    int status = 0;
    if (current_device() == NULL) {
        status = violation(INVALID_CONTEXT, "work without a current context");
    } else if (to == NULL) {
        status = violation(INVALID_HANDLE, "work for a stream that is not (any more)");
    } else if (to->owner != current_device()) {
        status = violation(INVALID_HANDLE, "work for a stream of device %d in the context of device %d",
                           to->owner->index, current_device()->index);
    } else {
        status = to->error;
    }
    if (status != 0) {
        free(item);
        return status;
    }
    item->stream = to;
    *to->last = item;
    to->last = &item->next;
    pthread_cond_broadcast(&to->changed);
    return 0;
}

EXPORT int cuStreamCreate(void **handle, unsigned flags) {
    FAULT("cuStreamCreate");
    pthread_mutex_lock(&lock);
    device *owner = current_device();
    stream *made = owner == NULL || flags > 1 ? NULL : make_stream(owner);
    count.streams += made != NULL;
    *handle = made;
    int status = made != NULL ? 0 : violation(INVALID_CONTEXT, "a stream without a context");
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT int cuStreamDestroy_v2(void *handle) {
    FAULT("cuStreamDestroy_v2");
    pthread_mutex_lock(&lock);
    stream *found = handle == NULL ? NULL : stream_of(handle);
    count.streams -= found != NULL;
    if (found == NULL) {
        violation(0, "a stream was destroyed twice");
    }
    pthread_mutex_unlock(&lock);
    if (found == NULL) {
        return INVALID_HANDLE;
    }
    end_stream(found);
    return 0;
}

static int wait_for(stream *each) {
    while (each->first != NULL || each->busy) {
        pthread_cond_wait(&progress, &lock);
    }
    return each->error;
}

EXPORT int cuStreamSynchronize(void *handle) {
    FAULT("cuStreamSynchronize");
    pthread_mutex_lock(&lock);
    stream *found = stream_of(handle);
    int status = found == NULL ? violation(INVALID_HANDLE, "waiting for a stream that is not") : wait_for(found);
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT int cuStreamQuery(void *handle) {
    FAULT("cuStreamQuery");
    pthread_mutex_lock(&lock);
    stream *found = stream_of(handle);
    int status = found == NULL                         ? INVALID_HANDLE
                 : found->first != NULL || found->busy ? MX_CUDA_NOT_READY
                                                       : found->error;
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT int cuCtxSynchronize(void) {
    FAULT("cuCtxSynchronize");
    pthread_mutex_lock(&lock);
    device *owner = current_device();
    int status = owner == NULL ? violation(INVALID_CONTEXT, "waiting without a context") : 0;
    for (int again = owner != NULL; again;) { /* the list may change meanwhile: from the front until all are idle */
        again = 0;
        for (stream *each = streams; each != NULL && !again; each = each->all) {
            if (each->owner == owner && (each->first != NULL || each->busy)) {
                pthread_cond_wait(&progress, &lock);
                again = 1;
            }
        }
    }
    for (stream *each = streams; each != NULL && status == 0; each = each->all) {
        status = each->owner == owner ? each->error : 0;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

/* ---- events ---- */

EXPORT int cuEventCreate(void **handle, unsigned flags) {
    FAULT("cuEventCreate");
    (void)flags;
    pthread_mutex_lock(&lock);
    event *made = current_device() == NULL ? NULL : calloc(1, sizeof *made);
    if (made != NULL) {
        made->owner = current_device();
        made->live = 1;
        count.events++;
    }
    *handle = made;
    int status = made != NULL ? 0 : violation(INVALID_CONTEXT, "an event without a context");
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT int cuEventDestroy_v2(void *handle) {
    FAULT("cuEventDestroy_v2");
    event *ending = handle;
    pthread_mutex_lock(&lock);
    while (ending->recorded != ending->reached) { /* CUDA frees it later; here the stream still has its address */
        pthread_cond_wait(&progress, &lock);
    }
    count.events--;
    pthread_mutex_unlock(&lock);
    free(ending);
    return 0;
}

static void reach(work *item) {
    item->event->reached = item->ticket;
    item->event->seconds = now_seconds();
    item->event->error = item->stream->error;
}

EXPORT int cuEventRecord(void *handle, void *place) {
    FAULT("cuEventRecord");
    event *recorded = handle;
    work *item = calloc(1, sizeof *item);
    pthread_mutex_lock(&lock);
    item->run = reach;
    item->event = recorded;
    item->ticket = recorded->recorded + 1;
    int status = enqueue(place, item);
    if (status == 0) {
        recorded->recorded++;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT int cuEventQuery(void *handle) {
    FAULT("cuEventQuery");
    event *asked = handle;
    pthread_mutex_lock(&lock);
    int status = asked->recorded != asked->reached ? MX_CUDA_NOT_READY : asked->error;
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT int cuEventSynchronize(void *handle) {
    FAULT("cuEventSynchronize");
    event *awaited = handle;
    pthread_mutex_lock(&lock);
    while (awaited->recorded != awaited->reached) {
        pthread_cond_wait(&progress, &lock);
    }
    int status = awaited->error;
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT int cuEventElapsedTime(float *milliseconds, void *start, void *end) {
    event *from = start, *to = end;
    *milliseconds = (float)((to->seconds - from->seconds) * 1e3);
    return from->recorded == 0 || to->recorded == 0 ? INVALID_HANDLE : 0;
}

static void wait_event(work *item) {
    while (item->event->reached < item->ticket) {
        pthread_cond_wait(&progress, &lock);
    }
}

EXPORT int cuStreamWaitEvent(void *handle, void *awaited, unsigned flags) {
    FAULT("cuStreamWaitEvent");
    (void)flags;
    work *item = calloc(1, sizeof *item);
    pthread_mutex_lock(&lock);
    item->run = wait_event;
    item->event = awaited;
    item->ticket = item->event->recorded;
    int status = enqueue(handle, item);
    pthread_mutex_unlock(&lock);
    return status;
}
