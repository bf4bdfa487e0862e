/* Threads that take chunks from TCP connections to one holder, a connection each. */
#ifndef MX_SOCKET_POOL_H
#define MX_SOCKET_POOL_H

#include "native/chunk_jobs.h"
#include "native/xxh3.h"
#include "socket_chunks.h"

enum { MX_SOCKET_REQUESTS = 2 }; /* of one connection at a time: the holder sends on while the next one is asked for */

typedef struct {
    mx_chunk_pool jobs;
    int hashed;
    uint64_t received; /* bytes; atomic */
    size_t next;       /* connection that no thread has yet; atomic */
    mx_socket_link links[MX_MOST_THREADS];
} mx_socket_pool;

/* One thread's: its connection, and the chunks that it requested, in order. */
typedef struct {
    mx_socket_pool *pool;
    mx_socket_end end;
    mx_chunk_queue requested;
    int error; /* that ended the connection */
} mx_socket_reader;

static inline size_t mx_socket_job_bytes(const mx_chunk_job *job) {
    size_t bytes = 0;
    for (size_t i = 0; i < job->count; i++) {
        bytes += (size_t)job->stretches[job->count + i];
    }
    return bytes;
}

/* Requests what there is room for; with the lock. The second one only where no other thread could begin it at once. */
static inline void mx_socket_request_more(mx_socket_reader *reader) {
    mx_chunk_pool *jobs = &reader->pool->jobs;
    mx_chunk_job *job;
    while (!jobs->closing && reader->error == 0 && reader->requested.count < MX_SOCKET_REQUESTS &&
           (reader->requested.count == 0 || jobs->idle == 0) && (job = mx_chunk_next(jobs)) != NULL) {
        mx_chunk_push(&reader->requested, job);
        pthread_mutex_unlock(&jobs->lock);
        reader->error = mx_socket_request(&reader->end, (uint32_t)job->key, mx_socket_job_bytes(job));
        pthread_mutex_lock(&jobs->lock);
    }
}

/* Takes the bytes of a requested chunk, each piece hashed while the cache has it. Returns 0 or errno. */
static inline int mx_socket_receive(mx_socket_reader *reader, mx_chunk_job *job) {
    struct iovec vectors[MX_SOCKET_VECTORS];
    mx_chunk_pool *jobs = &reader->pool->jobs;
    mx_stretches walk = {job->stretches, job->stretches + job->count, job->count, 0, 0};
    size_t count, bytes;
    mx_xxh3 state;
    int error = mx_socket_take_head(&reader->end, (uint32_t)job->key);
    mx_xxh3_begin(&state);
    while (error == 0 && (count = mx_socket_piece(&walk, vectors, MX_SOCKET_PIECE_BYTES, &bytes)) != 0) {
        ssize_t got = mx_socket_take(&reader->end, vectors, count);
        if (got < 0) {
            return (int)-got;
        }
        __atomic_fetch_add(&reader->pool->received, (uint64_t)got, __ATOMIC_RELAXED);
        mx_stretches_advance(&walk, (size_t)got);
        if (reader->pool->hashed) {
            mx_xxh3_update_vectors(&state, vectors, (size_t)got);
        }
        if (reader->requested.count < MX_SOCKET_REQUESTS && __atomic_load_n(&jobs->asked_count, __ATOMIC_RELAXED)) {
            pthread_mutex_lock(&jobs->lock);
            mx_socket_request_more(reader);
            pthread_mutex_unlock(&jobs->lock);
        }
    }
    job->digest = mx_xxh3_end(&state);
    return error;
}

static void *mx_socket_read(void *data) {
    mx_socket_reader reader = {.pool = data};
    mx_chunk_pool *jobs = &reader.pool->jobs;
    mx_socket_link link = reader.pool->links[mx_claim(&reader.pool->next)];
    void *begun = link.tls != NULL ? mx_tls.begin() : NULL;
    pthread_setname_np(pthread_self(), "mx-chunks");
    reader.error = mx_socket_open_end(&reader.end, link, &jobs->closing);
    pthread_mutex_lock(&jobs->lock);
    while (!jobs->closing) {
        mx_socket_request_more(&reader);
        if (reader.error != 0 && reader.requested.count == 0) {
            if ((reader.requested.first = reader.requested.last = mx_chunk_next(jobs)) != NULL) {
                reader.requested.count = 1; /* it fails with this connection: its user is to know */
            }
        }
        if (reader.requested.count == 0) {
            mx_chunk_wait(jobs);
            continue;
        }
        pthread_mutex_unlock(&jobs->lock);
        int error = reader.error;
        if (error == 0 && (error = mx_socket_receive(&reader, reader.requested.first)) != 0) {
            reader.error = error; /* requesting the next one meanwhile may have failed as well: this one is there */
        }
        pthread_mutex_lock(&jobs->lock);
        mx_chunk_end(jobs, mx_chunk_pop(&reader.requested), error);
    }
    while (reader.requested.count != 0) { /* closed meanwhile: nobody takes them */
        mx_chunk_end(jobs, mx_chunk_pop(&reader.requested), ECANCELED);
    }
    pthread_mutex_unlock(&jobs->lock);
    if (link.tls != NULL) {
        mx_tls.end(begun);
    }
    return NULL;
}

/* Starts a thread for each of `count` connections (1 to 64), which stay the caller's to close, after the pool.
 * Returns 0, or errno when not even one could be started; connections beyond those that were are not used. */
static inline int mx_socket_pool_open(mx_socket_pool *pool, const mx_socket_link *links, size_t count, int hashed) {
    pool->hashed = hashed;
    pool->received = pool->next = 0;
    for (size_t i = 0; i < count; i++) {
        pool->links[i] = links[i];
    }
    return mx_chunk_start(&pool->jobs, count, mx_socket_read, pool);
}

/* Shuts the connections down and waits for the threads: afterwards nothing is written here any more. */
static inline void mx_socket_pool_close(mx_socket_pool *pool) {
    size_t count = pool->jobs.threads.count;
    if (!mx_chunk_owned(&pool->jobs)) {
        return;
    }
    mx_chunk_stop(&pool->jobs);
    for (size_t i = 0; i < count; i++) {
        shutdown(pool->links[i].fd, SHUT_RDWR);
    }
    mx_chunk_join(&pool->jobs);
}

#endif
