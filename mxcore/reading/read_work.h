/* What the threads of one read share, and what every way to read needs of it. */
#ifndef MX_READ_WORK_H
#define MX_READ_WORK_H

#include "native/clock.h"
#include "native/threads.h"
#include "read_scatter.h"

#include <errno.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { MX_BUFFERED, MX_MAPPED, MX_DIRECT, MX_URING };

#define MX_PROBE_JOBS 4 /* so many jobs go each way before one is chosen */
#define MX_IN_PLACE_LEAST 65536

typedef struct mx_work {
    const mx_part *parts;
    mx_file *files;
    const mx_job *jobs;
    const int64_t *order; /* which jobs, in which order */
    size_t count;
    mx_limits limits;
    int way, other_way; /* other_way: -1, or what is tried beside `way` at first */
    int read_ahead;     /* jobs */
    uint64_t *digests;
    char *slots; /* for each lane piece_bytes + 2 pages */
    int64_t slot_bytes;
    int lanes; /* reads in flight, over all threads */
    int threads;
    int (*tick)(void *); /* called by the caller's thread now and then; not 0 stops */
    void *tick_data;
    void (*run)(struct mx_work *, int); /* what a thread does instead of reading into memory; NULL: that */
    void *run_data;
    /* shared */
    size_t next;
    int stopped;
    int64_t done_bytes, read_bytes;
    int64_t probe_ns[2], probe_bytes[2];
    size_t fell_back;   /* reads that O_DIRECT refused */
    int register_error; /* why io_uring could not pin the slots; 0: it could */
    int failed_setup;   /* io_uring_setup's errno */
    /* written by who sets `stopped` first */
    int error; /* errno; 0: the file ended; -1: memory behind a mapping went */
    int64_t failed_file, failed_offset, failed_bytes, failed_got;
} mx_work;

#define mx_add(where, value) __atomic_fetch_add((where), (value), __ATOMIC_RELAXED)
#define mx_get(where) __atomic_load_n((where), __ATOMIC_RELAXED)

static inline int mx_fail(mx_work *work, const mx_piece *piece, int64_t got, int error) {
    if (__atomic_exchange_n(&work->stopped, 1, __ATOMIC_ACQ_REL) == 0) {
        work->error = error;
        work->failed_file = piece->file;
        work->failed_offset = piece->offset;
        work->failed_bytes = piece->length;
        work->failed_got = got;
    }
    return -1;
}

static inline void mx_done(mx_work *work, const mx_piece *piece) { mx_add(&work->done_bytes, piece->payload); }

static inline const mx_job *mx_take_job(mx_work *work, size_t *place) {
    if (mx_get(&work->stopped)) {
        return NULL;
    }
    *place = mx_claim(&work->next);
    return *place < work->count ? work->jobs + work->order[*place] : NULL;
}

/* Begins the digest that a job has; NULL: it has none. */
static inline mx_xxh3 *mx_hash_begin(mx_xxh3 *hash, const mx_job *job) {
    if (job->digest < 0) {
        return NULL;
    }
    mx_xxh3_begin(hash);
    return hash;
}

static inline void mx_hash_end(mx_work *work, const mx_xxh3 *hash, const mx_job *job) {
    if (job->digest >= 0) {
        work->digests[job->digest] = mx_xxh3_end(hash);
    }
}

/* How a piece is read past the page cache: `middle` bytes straight into memory, the rest by way of a slot. */
typedef struct {
    int in_place;
    int64_t begin, end; /* aligned; in place: of the middle, else around the piece */
} mx_span;

static inline mx_span mx_span_of(const mx_work *work, const mx_piece *piece) {
    int64_t mask = work->files[piece->file].align_bytes - 1;
    int64_t end = piece->offset + piece->length;
    uintptr_t address = (uintptr_t)mx_cursor_address(work->parts, &piece->from);
    mx_span inner = {1, (piece->offset + mask) & ~mask, end & ~mask};
    if (piece->segments == 1 && (((int64_t)address - piece->offset) & mask) == 0 &&
        inner.end - inner.begin >= MX_IN_PLACE_LEAST) {
        return inner;
    }
    return (mx_span){0, piece->offset & ~mask, (end + mask) & ~mask};
}

/* Reads [begin, end) past the page cache, at least `need` bytes of it, from where `got` says. The bytes there, or -1.
 */
static inline int64_t mx_direct_read(mx_work *work, const mx_piece *piece, char *to, int64_t begin, int64_t end,
                                     int64_t need, int64_t got) {
    const mx_file *file = work->files + piece->file;
    int fd = file->direct_fd >= 0 ? file->direct_fd : file->fd;
    while (got < need) {
        ssize_t now = pread(fd, to + got, (size_t)(end - begin - got), begin + got);
        if (now < 0 && errno == EINTR) {
            continue;
        }
        if (now < 0 && errno == EINVAL && fd != file->fd) {
            mx_add(&work->fell_back, 1);
            fd = file->fd;
            continue;
        }
        if (now <= 0) {
            int64_t at = begin + got - piece->offset;
            return mx_fail(work, piece, at > 0 ? at : 0, now < 0 ? errno : 0);
        }
        got += now;
        mx_add(&work->read_bytes, now);
    }
    return got;
}

/* The bytes of a piece before or behind the middle that is read in place. */
static inline int mx_read_edge(mx_work *work, const mx_piece *piece, char *slot, int64_t from, int64_t to) {
    int64_t mask = work->files[piece->file].align_bytes - 1;
    int64_t begin = from & ~mask;
    if (from >= to) {
        return 0;
    }
    if (mx_direct_read(work, piece, slot, begin, (to + mask) & ~mask, to - begin, 0) < 0) {
        return -1;
    }
    memcpy(mx_cursor_address(work->parts, &piece->from) + (from - piece->offset), slot + (from - begin),
           (size_t)(to - from));
    return 0;
}

#endif
