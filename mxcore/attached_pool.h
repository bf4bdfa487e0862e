/* Threads that read chunks out of another process' memory. They are no threads of Python's: between two chunks none of
 * them waits for the interpreter's lock.
 */
#ifndef MX_ATTACHED_POOL_H
#define MX_ATTACHED_POOL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "attached_read.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MX_ATTACHED_MOST_THREADS = 64 };

/* A chunk: what of it is asked for, then how it ended. One allocation. */
typedef struct mx_attached_job {
    struct mx_attached_job *next;
    uint64_t key; /* the caller's */
    uint64_t digest;
    int error; /* errno, or 0 */
    size_t count;
    uint64_t stretches[]; /* `count` addresses here, as many there, as many lengths */
} mx_attached_job;

typedef struct {
    mx_attached_job *first, *last;
} mx_attached_queue;

typedef struct {
    pid_t pid, owner; /* whose memory, and the process that has the threads: not one that is forked from it */
    int hashed;
    int closing;
    size_t waiting; /* chunks that are asked for and not taken yet */
    pthread_mutex_t lock;
    pthread_cond_t asked, ended;
    mx_attached_queue asked_for, done;
    pthread_t threads[MX_ATTACHED_MOST_THREADS];
    size_t count;
} mx_attached_pool;

static inline void mx_attached_push(mx_attached_queue *queue, mx_attached_job *job) {
    job->next = NULL;
    if (queue->first == NULL) {
        queue->first = job;
    } else {
        queue->last->next = job;
    }
    queue->last = job;
}

static inline mx_attached_job *mx_attached_pop(mx_attached_queue *queue) {
    mx_attached_job *job = queue->first;
    if (job != NULL) {
        queue->first = job->next;
    }
    return job;
}

static void *mx_attached_reader(void *data) {
    mx_attached_pool *pool = data;
    mx_attached_job *job;
    pthread_setname_np(pthread_self(), "mx-attached");
    pthread_mutex_lock(&pool->lock);
    while (!pool->closing) {
        if ((job = mx_attached_pop(&pool->asked_for)) == NULL) {
            pthread_cond_wait(&pool->asked, &pool->lock);
            continue;
        }
        pthread_mutex_unlock(&pool->lock);
        const uint64_t *local = job->stretches, *remote = local + job->count, *lengths = remote + job->count;
        job->error = mx_attached_read(
            pool->pid, local, remote, lengths, job->count, pool->hashed ? &job->digest : NULL);
        pthread_mutex_lock(&pool->lock);
        mx_attached_push(&pool->done, job);
        pthread_cond_signal(&pool->ended);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* Starts up to `threads`. Returns 0, or errno when not even one could be started. */
static inline int mx_attached_open(mx_attached_pool *pool, pid_t pid, int hashed, size_t threads) {
    int error = 0;
    sigset_t blocked, before;
    memset(pool, 0, sizeof *pool);
    pool->pid = pid;
    pool->owner = getpid();
    pool->hashed = hashed;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->asked, NULL);
    pthread_cond_init(&pool->ended, NULL);
    sigfillset(&blocked); /* signals are for the interpreter's own threads; faults are for who made them */
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    while (pool->count < threads && error == 0) {
        error = pthread_create(&pool->threads[pool->count], NULL, mx_attached_reader, pool);
        pool->count += error == 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return pool->count != 0 ? 0 : error;
}

static inline void mx_attached_ask(mx_attached_pool *pool, mx_attached_job *job) {
    pthread_mutex_lock(&pool->lock);
    mx_attached_push(&pool->asked_for, job);
    pool->waiting++;
    pthread_cond_signal(&pool->asked);
    pthread_mutex_unlock(&pool->lock);
}

/* Waits until a chunk has ended; NULL when none is asked for. `wait` 0: NULL too when none has ended yet. */
static inline mx_attached_job *mx_attached_take(mx_attached_pool *pool, int wait) {
    mx_attached_job *job;
    pthread_mutex_lock(&pool->lock);
    while ((job = mx_attached_pop(&pool->done)) == NULL && wait && pool->waiting != 0 && !pool->closing) {
        pthread_cond_wait(&pool->ended, &pool->lock);
    }
    pool->waiting -= job != NULL;
    pthread_mutex_unlock(&pool->lock);
    return job;
}

/* Waits for what is being read; afterwards nothing is written here any more. What was not begun is dropped. */
static inline void mx_attached_close(mx_attached_pool *pool) {
    mx_attached_job *job;
    if (pool->owner != getpid()) {
        return; /* a fork has neither the threads nor a lock in a known state: what it leaks is a copy */
    }
    pthread_mutex_lock(&pool->lock);
    pool->closing = 1;
    pthread_cond_broadcast(&pool->asked);
    pthread_cond_broadcast(&pool->ended);
    pthread_mutex_unlock(&pool->lock);
    while (pool->count != 0) {
        pthread_join(pool->threads[--pool->count], NULL);
    }
    while ((job = mx_attached_pop(&pool->asked_for)) != NULL || (job = mx_attached_pop(&pool->done)) != NULL) {
        free(job);
    }
    pool->waiting = 0;
}

#endif
