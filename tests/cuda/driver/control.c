/* What tests ask the stand-in for: counts, faults, a halt of all streams; and the rules' one place of complaint. */
#include "stand_in.h"

#include <stdarg.h>
#include <stdlib.h>
#include <time.h>

EXPORT const int mx_cuda_stand_in_is_no_gpu = 1;

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t progress = PTHREAD_COND_INITIALIZER;
counts count;
int held;
int shared;
int visible_devices = DEVICES;

typedef struct {
    char name[64];
    int64_t after;
    int status;
} fault;

#define FAULTS 16
static fault faults[FAULTS], later[FAULTS];
static int64_t flip_after = -1;
static char last[512];

int violation(int status, const char *form, ...) {
    va_list arguments;
    va_start(arguments, form);
    vsnprintf(last, sizeof last, form, arguments);
    va_end(arguments);
    count.violations++;
    return status;
}

static int due(fault *list, const char *name) {
    for (int i = 0; i < FAULTS; i++) {
        if (list[i].status != 0 && strcmp(list[i].name, name) == 0 && list[i].after-- == 0) {
            int status = list[i].status;
            list[i].status = 0;
            return status;
        }
    }
    return 0;
}

int injected(const char *function) {
    pthread_mutex_lock(&lock);
    int status = due(faults, function);
    pthread_mutex_unlock(&lock);
    return status;
}

int injected_later(const char *what) { return due(later, what); } /* under the lock */

int flips_now(void) { return flip_after >= 0 && flip_after-- == 0; } /* under the lock */

double now_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void add(fault *list, const char *name, int64_t after, int status) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < FAULTS; i++) {
        if (list[i].status == 0) {
            snprintf(list[i].name, sizeof list[i].name, "%s", name);
            list[i].after = after;
            list[i].status = status;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
}

/* The call of `function` (as exported) after `after` good ones returns `status`. */
EXPORT void mx_stand_in_fail(const char *function, int64_t after, int status) { add(faults, function, after, status); }

/* A "copy" or "launch" fails when its stream comes to it: whoever synchronises hears of it. More names: cufile.c. */
EXPORT void mx_stand_in_fail_later(const char *what, int64_t after, int status) { add(later, what, after, status); }

/* One bit of what a copy to the device wrote is wrong. */
EXPORT void mx_stand_in_flip(int64_t after) {
    pthread_mutex_lock(&lock);
    flip_after = after;
    pthread_mutex_unlock(&lock);
}

/* While held, no stream does anything, and no read of cuFile's begins: as slow as it gets. */
EXPORT void mx_stand_in_hold(int hold) {
    pthread_mutex_lock(&lock);
    held = hold;
    for (stream *each = streams; each != NULL; each = each->all) {
        pthread_cond_broadcast(&each->changed);
    }
    pthread_cond_broadcast(&progress);
    pthread_mutex_unlock(&lock);
}

EXPORT void mx_stand_in_memory(size_t bytes) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < DEVICES; i++) {
        devices[i].total_bytes = bytes;
    }
    pthread_mutex_unlock(&lock);
}

/* Whether device memory that is made from now on is cudaMalloc's, or cuMemCreate's, which cuIpc* do not export. */
EXPORT void mx_stand_in_share(int share) {
    pthread_mutex_lock(&lock);
    shared = share;
    pthread_mutex_unlock(&lock);
}

EXPORT void mx_stand_in_devices(int number) { visible_devices = number < DEVICES ? number : DEVICES; }

EXPORT void mx_stand_in_counts(counts *out) {
    pthread_mutex_lock(&lock);
    *out = count;
    pthread_mutex_unlock(&lock);
}

EXPORT void mx_stand_in_violation(char *text, size_t bytes) {
    pthread_mutex_lock(&lock);
    snprintf(text, bytes, "%s", last);
    pthread_mutex_unlock(&lock);
}

/* No faults, no errors, nothing held, no complaints; what lives stays. */
EXPORT void mx_stand_in_reset(void) {
    mx_stand_in_hold(0);
    mx_stand_in_share(0);
    mx_stand_in_memory((size_t)1 << 32);
    pthread_mutex_lock(&lock);
    memset(faults, 0, sizeof faults);
    memset(later, 0, sizeof later);
    flip_after = -1;
    last[0] = 0;
    visible_devices = DEVICES;
    count.violations = count.copies = count.unpinned_copies = count.launches = count.cufile_reads = 0;
    for (stream *each = streams; each != NULL; each = each->all) {
        each->error = 0;
    }
    pthread_mutex_unlock(&lock);
}
