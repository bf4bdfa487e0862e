/* Threads that are not Python's: started with signals blocked, and numbers that they claim from one counter. */
#ifndef MX_NATIVE_THREADS_H
#define MX_NATIVE_THREADS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

enum { MX_MOST_THREADS = 64 };

/* The next number of a counter that several threads take from. */
static inline size_t mx_claim(size_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

typedef struct {
    pthread_t started[MX_MOST_THREADS];
    size_t count;
} mx_threads;

/* Starts up to `wanted` threads that run `run(data)`. Returns 0, or the errno of the one that could not be started;
 * `count` says how many were.
 *
 * Signals are for the interpreter's own threads: with all blocked in ours, no call of theirs is interrupted. Faults
 * stay with the thread that made them. */
static inline int mx_threads_start(mx_threads *threads, size_t wanted, void *(*run)(void *), void *data) {
    static const int faults[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL};
    sigset_t blocked, before;
    int error = 0;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        sigdelset(&blocked, faults[i]);
    }
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    for (threads->count = 0; threads->count < wanted && error == 0; threads->count += error == 0) {
        error = pthread_create(&threads->started[threads->count], NULL, run, data);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

static inline void mx_threads_join(mx_threads *threads) {
    while (threads->count != 0) {
        pthread_join(threads->started[--threads->count], NULL);
    }
}

/* As mx_threads_join, for so long at most; whether all have ended. Those that have not are still counted. */
static inline int mx_threads_join_within(mx_threads *threads, int64_t nanoseconds) {
    struct timespec until; /* pthread_timedjoin_np knows the wall clock alone */
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += nanoseconds / 1000000000;
    until.tv_nsec += nanoseconds % 1000000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    while (threads->count != 0 && pthread_timedjoin_np(threads->started[threads->count - 1], NULL, &until) == 0) {
        threads->count--;
    }
    return threads->count == 0;
}

typedef struct {
    void (*run)(void *data, int worker);
    void *data;
    size_t next;
} mx_crew;

static inline void *mx_crew_member(void *data) {
    mx_crew *crew = (mx_crew *)data;
    crew->run(crew->data, (int)mx_claim(&crew->next));
    return NULL;
}

/* Runs `run(data, worker)` on up to `workers` threads at once, the calling one as worker 0; returns when all have
 * ended. A thread that cannot be started leaves its share to the others. */
static inline void mx_run_together(size_t workers, void (*run)(void *data, int worker), void *data) {
    mx_threads others;
    mx_crew crew = {run, data, 1};
    mx_threads_start(&others, workers > 1 ? workers - 1 : 0, mx_crew_member, &crew);
    run(data, 0);
    mx_threads_join(&others);
}

#endif
