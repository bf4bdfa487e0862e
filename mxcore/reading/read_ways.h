/* The ways to read that block: through the page cache, out of a mapping, past the page cache; and the threads. */
#ifndef MX_READ_WAYS_H
#define MX_READ_WAYS_H

#include "native/bus_guard.h"
#include "native/stretches.h"
#include "read_work.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>

static inline int mx_buffered_piece(mx_work *work, const mx_piece *piece, mx_xxh3 *state) {
    struct iovec places[MX_SEGMENTS], *next = places;
    mx_cursor at = piece->from;
    size_t count = 0;
    for (int64_t left = piece->payload; left > 0;) {
        mx_run run = mx_next_run(work->parts, &at, &left);
        places[count++] = (struct iovec){run.to, (size_t)run.bytes};
    }
    for (int64_t done = 0; done < piece->length;) {
        ssize_t got = preadv(work->files[piece->file].fd, next, (int)count, piece->offset + done);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            return mx_fail(work, piece, done, got < 0 ? errno : 0);
        }
        done += got;
        mx_add(&work->read_bytes, got);
        if (state != NULL) { /* what was read last is in the cache */
            mx_xxh3_update_vectors(state, next, (size_t)got);
        }
        mx_vectors_advance(&next, &count, (size_t)got);
    }
    return 0;
}

typedef struct {
    mx_work *work;
    const mx_piece *piece;
    mx_xxh3 *state;
} mx_copy;

static inline void mx_copy_mapped(void *data) {
    mx_copy *copy = data;
    const mx_piece *piece = copy->piece;
    mx_scatter(copy->work->parts, piece, copy->work->files[piece->file].map + piece->offset, copy->state);
}

static inline int mx_mapped_piece(mx_work *work, const mx_piece *piece, mx_xxh3 *state) {
    mx_copy copy = {work, piece, state};
    if (mx_guarded(mx_copy_mapped, &copy) != 0) {
        return mx_fail(work, piece, 0, -1);
    }
    mx_add(&work->read_bytes, piece->payload);
    int64_t page = piece->offset & ~4095LL; /* what was copied counts no longer as this process' memory */
    madvise(work->files[piece->file].map + page, (size_t)(piece->offset + piece->length - page), MADV_DONTNEED);
    return 0;
}

static inline int mx_direct_piece(mx_work *work, const mx_piece *piece, char *slot, mx_xxh3 *state) {
    mx_span span = mx_span_of(work, piece);
    int64_t end = piece->offset + piece->length;
    if (!span.in_place) {
        if (mx_direct_read(work, piece, slot, span.begin, span.end, end - span.begin, 0) < 0) {
            return -1;
        }
        mx_scatter(work->parts, piece, slot + (piece->offset - span.begin), state);
        return 0;
    }
    char *middle = mx_cursor_address(work->parts, &piece->from) + (span.begin - piece->offset);
    if (mx_direct_read(work, piece, middle, span.begin, span.end, span.end - span.begin, 0) < 0 ||
        mx_read_edge(work, piece, slot, piece->offset, span.begin) != 0 ||
        mx_read_edge(work, piece, slot, span.end, end) != 0) {
        return -1;
    }
    if (state != NULL) {
        mx_digest_piece(work->parts, piece, state);
    }
    return 0;
}

static inline void mx_read_job(mx_work *work, const mx_job *job, int way, char *slot) {
    mx_xxh3 hash;
    mx_xxh3 *state = mx_hash_begin(&hash, job);
    mx_cursor at = job->from;
    mx_limits limits = work->limits;
    if (way == MX_BUFFERED) {
        limits.gap_bytes = 0;
        if (state != NULL) {
            limits.piece_bytes = 4 * MX_DIGEST_BLOCK;
        }
    }
    for (int64_t left = job->payload; left > 0;) {
        mx_piece piece = mx_next_piece(work->parts, at, left, &limits);
        int failed = way == MX_BUFFERED ? mx_buffered_piece(work, &piece, state)
                     : way == MX_MAPPED ? mx_mapped_piece(work, &piece, state)
                                        : mx_direct_piece(work, &piece, slot, state);
        if (failed || mx_get(&work->stopped)) {
            return;
        }
        mx_done(work, &piece);
        at = piece.next;
        left -= piece.payload;
    }
    mx_hash_end(work, &hash, job);
}

/* What two ways are compared by: the time of this thread's core where both only copy from memory, so that what else
 * the machine does counts for neither; time itself where one waits for a disk. */
static inline clockid_t mx_trial_clock(const mx_work *work) {
    int copies = (1 << MX_BUFFERED) | (1 << MX_MAPPED);
    return work->other_way >= 0 && ((1 << work->way | 1 << work->other_way) & ~copies) == 0 ? CLOCK_THREAD_CPUTIME_ID
                                                                                            : CLOCK_MONOTONIC;
}

/* The way for the job at that place: both in turn at first, then the faster one. */
static inline int mx_way_at(mx_work *work, size_t place) {
    if (work->other_way < 0) {
        return work->way;
    }
    if (place < 2 * MX_PROBE_JOBS) {
        return place % 2 ? work->other_way : work->way;
    }
    int64_t ns = mx_get(&work->probe_ns[0]), other_ns = mx_get(&work->probe_ns[1]);
    int64_t bytes = mx_get(&work->probe_bytes[0]), other_bytes = mx_get(&work->probe_bytes[1]);
    return (double)other_ns * (double)bytes * 1.05 < (double)ns * (double)other_bytes ? work->other_way : work->way;
}

static inline void mx_read_ahead(mx_work *work, size_t place) {
    for (size_t ahead = place ? place + (size_t)work->read_ahead : 0; ahead <= place + (size_t)work->read_ahead;
         ahead++) {
        if (ahead < work->count) {
            const mx_job *job = work->jobs + work->order[ahead];
            mx_piece piece = mx_next_piece(work->parts, job->from, job->payload, &work->limits);
            posix_fadvise(work->files[piece.file].fd, piece.offset, piece.length, POSIX_FADV_WILLNEED);
        }
    }
}

static inline void mx_read_jobs(mx_work *work, int index) {
    char *slot = work->slots == NULL ? NULL : work->slots + (int64_t)index * work->slot_bytes;
    const mx_job *job;
    size_t place;
    clockid_t clock = mx_trial_clock(work);
    while ((job = mx_take_job(work, &place)) != NULL) {
        int way = mx_way_at(work, place);
        int64_t started = mx_clock_ns(clock);
        if (way == MX_BUFFERED && work->read_ahead) {
            mx_read_ahead(work, place);
        }
        mx_read_job(work, job, way, slot);
        mx_add(&work->probe_ns[way != work->way], mx_clock_ns(clock) - started);
        mx_add(&work->probe_bytes[way != work->way], job->payload);
        if (index == 0 && work->tick(work->tick_data) != 0) {
            __atomic_store_n(&work->stopped, 1, __ATOMIC_RELEASE);
        }
    }
}

static inline void mx_uring_jobs(mx_work *work, int index);

static inline void mx_run_worker(void *data, int index) {
    mx_work *work = (mx_work *)data;
    if (work->run != NULL) {
        work->run(work, index);
    } else if (work->way == MX_URING) {
        mx_uring_jobs(work, index);
    } else {
        mx_read_jobs(work, index);
    }
}

/* Reads all jobs with work->threads threads, this one included; returns when all have ended. */
static inline void mx_run_work(mx_work *work) { mx_run_together((size_t)work->threads, mx_run_worker, work); }

#endif
