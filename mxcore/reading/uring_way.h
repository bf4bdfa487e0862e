/* Reading past the page cache with io_uring, by its system calls: several reads in flight for each thread.
 *
 * Interface: io_uring(7), io_uring_setup(2), io_uring_enter(2), io_uring_register(2). A lane is a job of which one read
 * is in flight; while a thread copies one lane's piece, the others' reads go on.
 */
#ifndef MX_URING_WAY_H
#define MX_URING_WAY_H

#include "read_ways.h"

#include <linux/io_uring.h>
#include <sys/syscall.h>

#define MX_MAX_LANES 64

typedef struct {
    int fd;
    unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *entries;
    struct io_uring_cqe *done;
    void *sq_map, *cq_map;
    size_t sq_bytes, cq_bytes, entries_bytes;
    unsigned waiting; /* prepared, not submitted */
    int pinned;       /* the slots are registered as buffer 0 */
} mx_uring;

typedef struct {
    const mx_job *job;
    mx_piece piece;
    mx_span span;
    int64_t left, got, need;
    char *slot, *to;
    mx_xxh3 hash;
    mx_xxh3 *state;
} mx_lane;

static inline void mx_uring_close(mx_uring *ring) {
    if (ring->entries != NULL) {
        munmap(ring->entries, ring->entries_bytes);
    }
    if (ring->cq_map != NULL) {
        munmap(ring->cq_map, ring->cq_bytes);
    }
    if (ring->sq_map != NULL) {
        munmap(ring->sq_map, ring->sq_bytes);
    }
    close(ring->fd);
}

static inline void *mx_uring_map(mx_uring *ring, size_t bytes, off_t what) {
    void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, what);
    return map == MAP_FAILED ? NULL : map;
}

/* 0, or errno. */
static inline int mx_uring_open(mx_uring *ring, unsigned entries) {
    struct io_uring_params with = {0};
    memset(ring, 0, sizeof *ring);
    ring->fd = (int)syscall(SYS_io_uring_setup, entries, &with);
    if (ring->fd < 0) {
        return errno;
    }
    ring->sq_bytes = with.sq_off.array + with.sq_entries * sizeof(unsigned);
    ring->cq_bytes = with.cq_off.cqes + with.cq_entries * sizeof(struct io_uring_cqe);
    ring->entries_bytes = with.sq_entries * sizeof(struct io_uring_sqe);
    ring->sq_map = mx_uring_map(ring, ring->sq_bytes, IORING_OFF_SQ_RING);
    ring->cq_map = mx_uring_map(ring, ring->cq_bytes, IORING_OFF_CQ_RING);
    ring->entries = mx_uring_map(ring, ring->entries_bytes, IORING_OFF_SQES);
    if (ring->sq_map == NULL || ring->cq_map == NULL || ring->entries == NULL) {
        mx_uring_close(ring);
        return ENOMEM;
    }
    char *sq = ring->sq_map, *cq = ring->cq_map;
    ring->sq_tail = (unsigned *)(sq + with.sq_off.tail);
    ring->sq_mask = (unsigned *)(sq + with.sq_off.ring_mask);
    ring->sq_array = (unsigned *)(sq + with.sq_off.array);
    ring->cq_head = (unsigned *)(cq + with.cq_off.head);
    ring->cq_tail = (unsigned *)(cq + with.cq_off.tail);
    ring->cq_mask = (unsigned *)(cq + with.cq_off.ring_mask);
    ring->done = (struct io_uring_cqe *)(cq + with.cq_off.cqes);
    return 0;
}

/* Pins the slots once instead of at each read; 0, or errno (ENOMEM: RLIMIT_MEMLOCK is too small). */
static inline int mx_uring_pin(mx_uring *ring, char *slots, size_t bytes) {
    struct iovec all = {slots, bytes};
    if (syscall(SYS_io_uring_register, ring->fd, IORING_REGISTER_BUFFERS, &all, 1) != 0) {
        return errno;
    }
    ring->pinned = 1;
    return 0;
}

static inline void mx_uring_prepare(mx_uring *ring, mx_work *work, mx_lane *lane, unsigned index) {
    const mx_file *file = work->files + lane->piece.file;
    unsigned tail = *ring->sq_tail, place = tail & *ring->sq_mask;
    struct io_uring_sqe *entry = ring->entries + place;
    memset(entry, 0, sizeof *entry);
    entry->opcode = ring->pinned && !lane->span.in_place ? IORING_OP_READ_FIXED : IORING_OP_READ;
    entry->fd = file->direct_fd >= 0 ? file->direct_fd : file->fd;
    entry->off = (uint64_t)(lane->span.begin + lane->got);
    entry->addr = (uint64_t)(uintptr_t)(lane->to + lane->got);
    entry->len = (unsigned)(lane->span.end - lane->span.begin - lane->got);
    entry->user_data = index;
    ring->sq_array[place] = place;
    __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
    ring->waiting++;
}

static inline void mx_lane_next_piece(mx_work *work, mx_lane *lane, mx_cursor from) {
    lane->piece = mx_next_piece(work->parts, from, lane->left, &work->limits);
    lane->span = mx_span_of(work, &lane->piece);
    lane->got = 0;
    if (lane->span.in_place) {
        lane->to = mx_cursor_address(work->parts, &from) + (lane->span.begin - lane->piece.offset);
        lane->need = lane->span.end - lane->span.begin;
    } else {
        lane->to = lane->slot;
        lane->need = lane->piece.offset + lane->piece.length - lane->span.begin;
    }
}

static inline int mx_lane_begin(mx_work *work, mx_lane *lane) {
    size_t place;
    lane->job = mx_take_job(work, &place);
    if (lane->job == NULL) {
        return 0;
    }
    lane->state = mx_hash_begin(&lane->hash, lane->job);
    lane->left = lane->job->payload;
    mx_lane_next_piece(work, lane, lane->job->from);
    return 1;
}

/* Takes the result of a lane's read; whether the lane wants another one. */
static inline int mx_lane_finish(mx_work *work, mx_lane *lane, int result) {
    mx_piece *piece = &lane->piece;
    int64_t end = piece->offset + piece->length;
    if (result == -EINVAL) { /* without O_DIRECT then, here and now */
        lane->got = mx_direct_read(work, piece, lane->to, lane->span.begin, lane->span.end, lane->need, lane->got);
    } else if (result == -EINTR || result == -EAGAIN) {
        return 1;
    } else if (result <= 0) {
        int64_t at = lane->span.begin + lane->got - piece->offset;
        lane->got = mx_fail(work, piece, at > 0 ? at : 0, -result);
    } else {
        lane->got += result;
        mx_add(&work->read_bytes, result);
    }
    if (lane->got < 0 || mx_get(&work->stopped)) {
        return 0;
    }
    if (lane->got < lane->need) {
        return 1;
    }
    if (!lane->span.in_place) {
        mx_scatter(work->parts, piece, lane->slot + (piece->offset - lane->span.begin), lane->state);
    } else if (mx_read_edge(work, piece, lane->slot, piece->offset, lane->span.begin) != 0 ||
               mx_read_edge(work, piece, lane->slot, lane->span.end, end) != 0) {
        return 0;
    } else if (lane->state != NULL) {
        mx_digest_piece(work->parts, piece, lane->state);
    }
    mx_done(work, piece);
    lane->left -= piece->payload;
    if (lane->left > 0) {
        mx_lane_next_piece(work, lane, piece->next);
        return 1;
    }
    mx_hash_end(work, &lane->hash, lane->job);
    mx_add(&work->probe_bytes[0], lane->job->payload);
    return mx_lane_begin(work, lane);
}

static inline void mx_uring_loop(mx_work *work, mx_uring *ring, mx_lane *lanes, int count, int index) {
    unsigned in_flight = 0;
    for (int lane = 0; lane < count && mx_lane_begin(work, lanes + lane); lane++) {
        mx_uring_prepare(ring, work, lanes + lane, (unsigned)lane);
        in_flight++;
    }
    while (in_flight > 0) { /* also after a failure: the kernel writes into our memory until then */
        long sent = syscall(SYS_io_uring_enter, ring->fd, ring->waiting, 1, IORING_ENTER_GETEVENTS, NULL, 0);
        if (sent > 0) {
            ring->waiting -= (unsigned)sent;
        } else if (sent < 0 && errno != EINTR && errno != EAGAIN && errno != EBUSY) {
            mx_fail(work, &lanes->piece, 0, errno); /* no more goes out; what the kernel has taken is waited for */
            in_flight -= ring->waiting;
            ring->waiting = 0;
            usleep(1000);
        }
        unsigned head = *ring->cq_head;
        if (head != __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE)) {
            struct io_uring_cqe done = ring->done[head & *ring->cq_mask];
            __atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
            if (mx_lane_finish(work, lanes + done.user_data, done.res)) {
                mx_uring_prepare(ring, work, lanes + done.user_data, (unsigned)done.user_data);
            } else {
                in_flight--;
            }
        }
        if (index == 0 && work->tick(work->tick_data) != 0) {
            __atomic_store_n(&work->stopped, 1, __ATOMIC_RELEASE);
        }
    }
}

static inline void mx_uring_jobs(mx_work *work, int index) {
    mx_uring ring;
    mx_lane lanes[MX_MAX_LANES];
    int count = work->lanes / work->threads;
    char *slots = work->slots + (int64_t)index * count * work->slot_bytes;
    int error = mx_uring_open(&ring, MX_MAX_LANES);
    if (error != 0) { /* blocking reads do as well; what was chosen can be seen in failed_setup */
        __atomic_store_n(&work->failed_setup, error, __ATOMIC_RELAXED);
        mx_read_jobs(work, index);
        return;
    }
    error = mx_uring_pin(&ring, slots, (size_t)(count * work->slot_bytes));
    if (error != 0) {
        __atomic_store_n(&work->register_error, error, __ATOMIC_RELAXED);
    }
    for (int lane = 0; lane < count; lane++) {
        lanes[lane].slot = slots + lane * work->slot_bytes;
    }
    mx_uring_loop(work, &ring, lanes, count, index);
    mx_uring_close(&ring);
}

/* 0, or why io_uring cannot be used here. */
static inline int mx_uring_refused(void) {
    mx_uring ring;
    int error = mx_uring_open(&ring, 2);
    if (error == 0) {
        mx_uring_close(&ring);
    }
    return error;
}

#endif
