/* Threads that read chunks out of another process' memory. */
#ifndef MX_ATTACHED_POOL_H
#define MX_ATTACHED_POOL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "attached_read.h"
#include "native/chunk_jobs.h"

typedef struct {
    mx_chunk_pool jobs;
    pid_t pid; /* whose memory */
    int hashed;
} mx_attached_pool;

static void *mx_attached_reader(void *data) {
    mx_attached_pool *pool = data;
    mx_chunk_pool *jobs = &pool->jobs;
    mx_chunk_job *job;
    pthread_setname_np(pthread_self(), "mx-attached");
    pthread_mutex_lock(&jobs->lock);
    while (!jobs->closing) {
        if ((job = mx_chunk_next(jobs)) == NULL) {
            mx_chunk_wait(jobs);
            continue;
        }
        pthread_mutex_unlock(&jobs->lock);
        const uint64_t *local = job->stretches, *lengths = local + job->count, *remote = lengths + job->count;
        int error = mx_attached_read(pool->pid, local, remote, lengths, job->count, pool->hashed ? &job->digest : NULL);
        pthread_mutex_lock(&jobs->lock);
        mx_chunk_end(jobs, job, error);
    }
    pthread_mutex_unlock(&jobs->lock);
    return NULL;
}

/* Starts up to `threads`. Returns 0, or errno when not even one could be started. */
static inline int mx_attached_open(mx_attached_pool *pool, pid_t pid, int hashed, size_t threads) {
    pool->pid = pid;
    pool->hashed = hashed;
    return mx_chunk_start(&pool->jobs, threads, mx_attached_reader, pool);
}

/* Waits for what is being read, for so long at most (below 0: however long the kernel takes), and drops what was not
 * begun. Returns whether it has ended: then nothing is written here any more. If not, it may be called again. */
static inline int mx_attached_close(mx_attached_pool *pool, int64_t longest_nanoseconds) {
    if (!mx_chunk_owned(&pool->jobs)) {
        return 1;
    }
    mx_chunk_stop(&pool->jobs);
    if (longest_nanoseconds >= 0 && !mx_threads_join_within(&pool->jobs.threads, longest_nanoseconds)) {
        return 0;
    }
    mx_chunk_join(&pool->jobs);
    return 1;
}

#endif
