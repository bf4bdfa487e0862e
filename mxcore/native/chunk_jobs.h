/* Chunks that threads fetch, and how each ended. They are no threads of Python's: between two chunks none of them waits
 * for the interpreter's lock. What fetches is its user's: attached_pool.h, socket_pool.h.
 */
#ifndef MX_CHUNK_JOBS_H
#define MX_CHUNK_JOBS_H

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "native/clock.h"
#include "native/threads.h"

/* A chunk: what of it is asked for, then how it ended. One allocation. */
typedef struct mx_chunk_job {
    struct mx_chunk_job *next;
    uint64_t key; /* the caller's */
    uint64_t digest;
    int error; /* errno, or 0 */
    size_t count;
    uint64_t stretches[]; /* `count` addresses here, as many lengths, and what else its user keeps of each */
} mx_chunk_job;

typedef struct {
    mx_chunk_job *first, *last;
    size_t count;
} mx_chunk_queue;

typedef struct {
    pid_t owner; /* the process that has the threads: not one that is forked from it */
    bool closing, woken;
    size_t waiting;     /* chunks that are asked for and not taken yet */
    size_t idle;        /* threads that wait for work */
    size_t asked_count; /* of `asked_for`, to be looked at without the lock */
    pthread_mutex_t lock;
    pthread_cond_t asked, ended; /* `ended` by the monotonic clock */
    mx_chunk_queue asked_for, done;
    mx_threads threads;
} mx_chunk_pool;

static inline void mx_chunk_push(mx_chunk_queue *queue, mx_chunk_job *job) {
    job->next = NULL;
    if (queue->first == NULL) {
        queue->first = job;
    } else {
        queue->last->next = job;
    }
    queue->last = job;
    queue->count++;
}

static inline mx_chunk_job *mx_chunk_pop(mx_chunk_queue *queue) {
    mx_chunk_job *job = queue->first;
    if (job != NULL) {
        queue->first = job->next;
        queue->count--;
    }
    return job;
}

/* The next chunk that is asked for, or NULL; with the lock. */
static inline mx_chunk_job *mx_chunk_next(mx_chunk_pool *pool) {
    mx_chunk_job *job = mx_chunk_pop(&pool->asked_for);
    __atomic_store_n(&pool->asked_count, pool->asked_for.count, __ATOMIC_RELAXED);
    return job;
}

/* Waits for work; with the lock. */
static inline void mx_chunk_wait(mx_chunk_pool *pool) {
    pool->idle++;
    pthread_cond_wait(&pool->asked, &pool->lock);
    pool->idle--;
}

/* Tells how a chunk ended; with the lock. */
static inline void mx_chunk_end(mx_chunk_pool *pool, mx_chunk_job *job, int error) {
    job->error = error;
    mx_chunk_push(&pool->done, job);
    pthread_cond_signal(&pool->ended);
}

/* Starts up to `threads` that run `run(data)`. Returns 0, or errno when not even one could be started. */
static inline int mx_chunk_start(mx_chunk_pool *pool, size_t threads, void *(*run)(void *), void *data) {
    memset(pool, 0, sizeof *pool);
    pool->owner = getpid();
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->asked, NULL);
    mx_condition_init(&pool->ended);
    int error = mx_threads_start(&pool->threads, threads, run, data);
    return pool->threads.count != 0 ? 0 : error;
}

static inline void mx_chunk_ask(mx_chunk_pool *pool, mx_chunk_job *job) {
    pthread_mutex_lock(&pool->lock);
    mx_chunk_push(&pool->asked_for, job);
    __atomic_store_n(&pool->asked_count, pool->asked_for.count, __ATOMIC_RELAXED);
    pool->waiting++;
    pthread_cond_signal(&pool->asked);
    pthread_mutex_unlock(&pool->lock);
}

/* Makes whoever waits in `mx_chunk_take` return. */
static inline void mx_chunk_wake(mx_chunk_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->woken = true;
    pthread_cond_broadcast(&pool->ended);
    pthread_mutex_unlock(&pool->lock);
}

/* Waits until a chunk has ended, for so long at most (below 0: for ever); NULL when none is asked for, when woken, and
 * once it is stopped. */
static inline mx_chunk_job *mx_chunk_take(mx_chunk_pool *pool, int64_t longest_nanoseconds) {
    mx_chunk_job *job = NULL;
    int64_t deadline_ns = mx_now_ns() + longest_nanoseconds;
    pthread_mutex_lock(&pool->lock);
    while (!pool->closing && (job = mx_chunk_pop(&pool->done)) == NULL && longest_nanoseconds != 0 &&
           pool->waiting != 0 && !pool->woken) {
        if (longest_nanoseconds < 0) {
            pthread_cond_wait(&pool->ended, &pool->lock);
        } else if (mx_condition_wait_until(&pool->ended, &pool->lock, deadline_ns) != 0) {
            longest_nanoseconds = 0;
        }
    }
    if (longest_nanoseconds != 0) {
        pool->woken = false;
    }
    pool->waiting -= job != NULL;
    pthread_mutex_unlock(&pool->lock);
    return job;
}

/* First half of the end: nothing more is begun. */
static inline void mx_chunk_stop(mx_chunk_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    __atomic_store_n(&pool->closing, true, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&pool->asked);
    pthread_cond_broadcast(&pool->ended);
    pthread_mutex_unlock(&pool->lock);
}

/* Second half: waits for the threads; afterwards they write nowhere any more. What was not begun is dropped. */
static inline void mx_chunk_join(mx_chunk_pool *pool) {
    mx_chunk_job *job;
    mx_threads_join(&pool->threads);
    while ((job = mx_chunk_pop(&pool->asked_for)) != NULL || (job = mx_chunk_pop(&pool->done)) != NULL) {
        free(job);
    }
    pool->waiting = 0;
}

/* Whether this process has the threads: a fork has neither them nor a lock in a known state, and leaks a copy. */
static inline bool mx_chunk_owned(const mx_chunk_pool *pool) { return pool->owner == getpid(); }

#endif
