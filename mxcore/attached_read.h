/* Reading another process' memory by cross-memory attach, each piece hashed while it is in the core's cache.
 *
 * Pieces of half a MiB: the kernel's call costs about as much as copying 10 KiB, and what was copied is still in the
 * second-level cache (1 MiB on an AMD EPYC of 2024) when it is hashed, at twice the speed of memory there.
 */
#ifndef MX_ATTACHED_READ_H
#define MX_ATTACHED_READ_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <linux/futex.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include "digest_dispatch.h"

enum { MX_ATTACHED_PIECE_BYTES = 512 * 1024, MX_ATTACHED_VECTORS = 128 };

/* Lets processes of this user read this one's memory where Yama restricts that to ancestors (kernel.yama.ptrace_scope
 * = 1, Ubuntu's default). Returns 0 or errno: EINVAL where there is no Yama. */
static inline int mx_attached_allow(void)
{
    return prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0) ? errno : 0;
}

/* Turns to copy: whoever hashes meanwhile leaves its turn to another thread. */
typedef struct {
    int left, waiting; /* threads that may begin to copy, and those that sleep until one may */
    int limited;
} mx_attached_turns;

enum { MX_ATTACHED_LOOKS = 2000 }; /* before a thread sleeps: about the time in which a piece is copied */

static inline void mx_attached_turns_open(mx_attached_turns *turns, size_t copying) {
    turns->left = (int)copying;
    turns->waiting = 0;
    turns->limited = copying != 0;
}

static inline int mx_attached_try_turn(mx_attached_turns *turns) {
    int left = __atomic_load_n(&turns->left, __ATOMIC_RELAXED);
    return left > 0 && __atomic_compare_exchange_n(&turns->left, &left, left - 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

static inline void mx_attached_turn(mx_attached_turns *turns) {
    for (int look = 0; look < MX_ATTACHED_LOOKS; look++) {
        if (mx_attached_try_turn(turns)) {
            return;
        }
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    __atomic_fetch_add(&turns->waiting, 1, __ATOMIC_SEQ_CST);
    while (!mx_attached_try_turn(turns)) {
        syscall(SYS_futex, &turns->left, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    }
    __atomic_fetch_sub(&turns->waiting, 1, __ATOMIC_SEQ_CST);
}

static inline void mx_attached_turn_over(mx_attached_turns *turns) {
    __atomic_fetch_add(&turns->left, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&turns->waiting, __ATOMIC_SEQ_CST) != 0) {
        syscall(SYS_futex, &turns->left, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    }
}

/* Where the copy stands: `done` bytes of stretch `index`. */
typedef struct {
    const uint64_t *local, *remote, *lengths;
    size_t count, index, done;
} mx_attached_walk;

/* The next piece as vectors; returns their number, 0 at the end. */
static inline size_t mx_attached_piece(mx_attached_walk *walk, struct iovec *here, struct iovec *there, size_t *bytes)
{
    size_t vectors = 0;
    *bytes = 0;
    while (walk->index < walk->count && vectors < MX_ATTACHED_VECTORS && *bytes < MX_ATTACHED_PIECE_BYTES) {
        size_t left = (size_t)walk->lengths[walk->index] - walk->done, room = MX_ATTACHED_PIECE_BYTES - *bytes;
        size_t length = left < room ? left : room;
        if (length != 0) {
            here[vectors].iov_base = (void *)(uintptr_t)(walk->local[walk->index] + walk->done);
            there[vectors].iov_base = (void *)(uintptr_t)(walk->remote[walk->index] + walk->done);
            here[vectors].iov_len = there[vectors].iov_len = length;
            vectors++;
            *bytes += length;
        }
        walk->done += length;
        if (length == left) {
            walk->index++;
            walk->done = 0;
        }
    }
    return vectors;
}

/* Copies `count` stretches; with `digest`, also their XXH3-64 as it is here, one after the other; with `turns`, each
 * piece in a turn. Returns 0 or errno; a copy that ends early (the rest is not mapped there) is EFAULT. */
static inline int mx_attached_read(pid_t pid, const uint64_t *local, const uint64_t *remote, const uint64_t *lengths,
                                   size_t count, uint64_t *digest, mx_attached_turns *turns)
{
    struct iovec here[MX_ATTACHED_VECTORS], there[MX_ATTACHED_VECTORS];
    mx_attached_walk walk = {local, remote, lengths, count, 0, 0};
    size_t vectors, bytes;
    int in_turns = turns != NULL && turns->limited;
    XXH3_state_t state; /* its type carries the 64-byte alignment that it needs */
    XXH3_INITSTATE(&state);
    XXH3_64bits_reset(&state);
    while ((vectors = mx_attached_piece(&walk, here, there, &bytes)) != 0) {
        if (in_turns)
            mx_attached_turn(turns);
        ssize_t copied = process_vm_readv(pid, here, vectors, there, vectors, 0);
        int error = errno;
        if (in_turns)
            mx_attached_turn_over(turns);
        if (copied < 0)
            return error;
        if ((size_t)copied != bytes)
            return EFAULT;
        for (size_t vector = 0; digest != NULL && vector < vectors; vector++)
            mx_digest_update(&state, here[vector].iov_base, here[vector].iov_len);
    }
    if (digest != NULL)
        *digest = XXH3_64bits_digest(&state);
    return 0;
}

#endif
