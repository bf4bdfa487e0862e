/* Stretches of memory, walked in pieces that one call of the kernel takes. */
#ifndef MX_NATIVE_STRETCHES_H
#define MX_NATIVE_STRETCHES_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Where a walk stands: `done` bytes of stretch `index`. */
typedef struct {
    const uint64_t *addresses, *lengths;
    size_t count, index, done;
} mx_stretches;

/* The next piece as up to `most` vectors of up to `most_bytes` bytes in all, without moving on; returns their number, 0
 * at the end, and their bytes. */
static inline size_t mx_stretches_piece(const mx_stretches *walk, struct iovec *vectors, size_t most, size_t most_bytes,
                                        size_t *bytes) {
    size_t found = 0, index = walk->index, done = walk->done;
    *bytes = 0;
    for (; index < walk->count && found < most && *bytes < most_bytes; index++, done = 0) {
        size_t left = (size_t)walk->lengths[index] - done, room = most_bytes - *bytes;
        if (left != 0) {
            vectors[found].iov_base = (void *)(uintptr_t)(walk->addresses[index] + done);
            vectors[found].iov_len = left < room ? left : room;
            *bytes += vectors[found++].iov_len;
        }
    }
    return found;
}

/* Moves on by `bytes`, and past what is empty. */
static inline void mx_stretches_advance(mx_stretches *walk, size_t bytes) {
    while (bytes != 0 || (walk->index < walk->count && walk->done == walk->lengths[walk->index])) {
        size_t left = (size_t)walk->lengths[walk->index] - walk->done;
        if (bytes < left) {
            walk->done += bytes;
            return;
        }
        bytes -= left;
        walk->index++;
        walk->done = 0;
    }
}

/* Takes the first `bytes` bytes, at most all, from the vectors, whose places change: what a call moved is done. */
static inline void mx_vectors_advance(struct iovec **vectors, size_t *count, size_t bytes) {
    for (; *count != 0 && bytes >= (*vectors)->iov_len; ++*vectors, --*count) {
        bytes -= (*vectors)->iov_len;
    }
    if (bytes != 0) {
        (*vectors)->iov_base = (char *)(*vectors)->iov_base + bytes;
        (*vectors)->iov_len -= bytes;
    }
}

#endif
