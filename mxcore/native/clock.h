/* The monotonic clock, and waiting until a time of it. */
#ifndef MX_NATIVE_CLOCK_H
#define MX_NATIVE_CLOCK_H

#include <pthread.h>
#include <stdint.h>
#include <time.h>

enum { MX_NS_PER_SECOND = 1000 * 1000 * 1000 };

static inline int64_t mx_clock_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * MX_NS_PER_SECOND + now.tv_nsec;
}

static inline int64_t mx_now_ns(void) { return mx_clock_ns(CLOCK_MONOTONIC); }

/* A condition whose waits end by the monotonic clock: setting the machine's time does not change them. */
static inline void mx_condition_init(pthread_cond_t *condition) {
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

/* Waits on a condition of `mx_condition_init` until `deadline_ns` of `mx_now_ns`; 0, or ETIMEDOUT. */
static inline int mx_condition_wait_until(pthread_cond_t *condition, pthread_mutex_t *lock, int64_t deadline_ns) {
    const struct timespec deadline = {deadline_ns / MX_NS_PER_SECOND, deadline_ns % MX_NS_PER_SECOND};
    return pthread_cond_timedwait(condition, lock, &deadline);
}

#endif
