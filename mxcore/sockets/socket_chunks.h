/* Chunks over a TCP connection: the holder sends them out of its memory, the receiver takes them into its own.
 *
 * A request is 4 bytes, the chunk's number; an answer is 8, the number and a status (0: its bytes follow), both
 * little-endian. Both sides know the chunk's length by the layout. Answers come in the order of the requests.
 *
 * Why so and not by UCX: stretches apart in memory are one call of the kernel on either side, a piece is hashed
 * while the core's cache has it, and nothing arrives once the connection is closed. The receiver is woken for
 * half a piece at a time (SO_RCVLOWAT): for each of the 64 KiB stretches that TCP brings, it took 3.6 instead of 5 GB/s
 * over loopback.
 *
 * By TLS the same goes through two functions of the connection's owner, for Python's ssl has the keys. A record's bytes
 * are there (16 KiB at most) or they are not: there is nothing to wait for with SO_RCVLOWAT.
 */
#ifndef MX_SOCKET_CHUNKS_H
#define MX_SOCKET_CHUNKS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>

#include "native/stretches.h"

enum {
    MX_SOCKET_PIECE_BYTES = 2048 * 1024,  /* of one call, on either side: with 256 KiB it was 4.6 instead of 5.4 GB/s */
    MX_SOCKET_WAKE_BYTES = 1024 * 1024,   /* a receiver sleeps until so many have come */
    MX_TLS_PIECE_BYTES = 4 * 1024 * 1024, /* sent by one call: between two of them Python's lock is waited for */
    MX_TLS_RECORD_BYTES = 16 * 1024,
    MX_SOCKET_VECTORS = 512,
    MX_SOCKET_REQUEST_BYTES = 4,
    MX_SOCKET_ANSWER_BYTES = 8,
    MX_SOCKET_LOOK_MICROSECONDS = 200 * 1000 /* what has come so far is taken this often, if it is less than a piece */
};
enum { MX_SOCKET_BYTES_FOLLOW = 0, MX_SOCKET_NOT_HERE = 1 };

static inline void mx_socket_put32(unsigned char *place, uint32_t value) {
    for (int i = 0; i < 4; i++) {
        place[i] = (unsigned char)(value >> (8 * i));
    }
}

static inline uint32_t mx_socket_get32(const unsigned char *place) {
    return place[0] | (uint32_t)place[1] << 8 | (uint32_t)place[2] << 16 | (uint32_t)place[3] << 24;
}

/* A connection: `tls` is the object of the TLS connection over `fd`, or NULL. */
typedef struct {
    int fd;
    void *tls;
} mx_socket_link;

/* By TLS: sends all bytes (0, or -errno); takes some (how many, 0 at the end, or -errno). A thread of ours is around
 * both between `begin` and `end`, which is given what `begin` returned. */
typedef struct {
    ssize_t (*send)(void *tls, const void *data, size_t bytes);
    ssize_t (*take)(void *tls, void *data, size_t bytes);
    void *(*begin)(void);
    void (*end)(void *begun);
} mx_tls_functions;

static mx_tls_functions mx_tls; /* of the module that includes this */

/* Copies between a record and vectors, up to the record's size; returns the bytes. */
static inline size_t mx_tls_copy(unsigned char *record, size_t most, const struct iovec *vectors, size_t count,
                                 bool out) {
    size_t done = 0;
    for (size_t i = 0; i < count && done < most; i++) {
        size_t room = most - done, part = vectors[i].iov_len < room ? vectors[i].iov_len : room;
        memcpy(out ? record + done : vectors[i].iov_base, out ? vectors[i].iov_base : record + done, part);
        done += part;
    }
    return done;
}

/* Sends all of the vectors, which it changes: small ones gathered to records. Returns 0 or errno. */
static inline int mx_tls_send_all(void *tls, struct iovec *vectors, size_t count) {
    unsigned char record[MX_TLS_RECORD_BYTES];
    while (count != 0) {
        bool alone = count == 1 || vectors->iov_len >= sizeof record;
        size_t bytes = alone ? vectors->iov_len : mx_tls_copy(record, sizeof record, vectors, count, true);
        ssize_t failed = mx_tls.send(tls, alone ? vectors->iov_base : record, bytes);
        if (failed < 0) {
            return (int)-failed;
        }
        mx_vectors_advance(&vectors, &count, bytes);
    }
    return 0;
}

/* Takes a record, or a part of one, into the vectors. Returns as `mx_tls.take`. */
static inline ssize_t mx_tls_take_some(void *tls, struct iovec *vectors, size_t count) {
    unsigned char record[MX_TLS_RECORD_BYTES];
    size_t room = 0;
    if (count == 1 || vectors->iov_len >= sizeof record) {
        return mx_tls.take(tls, vectors->iov_base, vectors->iov_len);
    }
    for (size_t i = 0; i < count && room < sizeof record; i++) {
        room += vectors[i].iov_len;
    }
    ssize_t got = mx_tls.take(tls, record, room < sizeof record ? room : sizeof record);
    if (got > 0) {
        mx_tls_copy(record, (size_t)got, vectors, count, false);
    }
    return got;
}

/* Sends all of the vectors, which it changes. Returns 0 or errno. */
static inline int mx_socket_send(const mx_socket_link *link, struct iovec *vectors, size_t count) {
    if (link->tls != NULL) {
        return mx_tls_send_all(link->tls, vectors, count);
    }
    while (count != 0) {
        const struct msghdr message = {.msg_iov = vectors, .msg_iovlen = count};
        ssize_t sent = sendmsg(link->fd, &message, MSG_NOSIGNAL);
        if (sent >= 0) {
            mx_vectors_advance(&vectors, &count, (size_t)sent);
        } else if (errno != EINTR) {
            return errno;
        }
    }
    return 0;
}

/* Takes exactly so many bytes. Returns them, fewer where the other side has closed, or -errno. */
static inline ssize_t mx_socket_take_all(const mx_socket_link *link, unsigned char *place, size_t bytes) {
    size_t have = 0;
    while (have < bytes) {
        ssize_t got = link->tls != NULL ? mx_tls.take(link->tls, place + have, bytes - have)
                                        : recv(link->fd, place + have, bytes - have, MSG_WAITALL);
        if (got == 0) {
            break;
        }
        if (got > 0) {
            have += (size_t)got;
        } else if (link->tls != NULL) {
            return got;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return (ssize_t)have;
}

/* The next piece of a chunk as vectors; see mx_stretches_piece. */
static inline size_t mx_socket_piece(const mx_stretches *walk, struct iovec *vectors, size_t most, size_t *bytes) {
    return mx_stretches_piece(walk, vectors, MX_SOCKET_VECTORS, most, bytes);
}

/* What a reader may take: chunk i is the stretches `starts[i]` up to `starts[i + 1]`; `allowed` has a bit a chunk. */
typedef struct {
    const uint64_t *addresses, *lengths, *starts;
    size_t chunks;
    unsigned char *allowed;
} mx_socket_table;

/* Whether the chunk may be sent, which is so once. */
static inline bool mx_socket_may_send(const mx_socket_table *table, size_t chunk) {
    unsigned char bit = (unsigned char)(1 << chunk % 8);
    return chunk < table->chunks &&
           (__atomic_fetch_and(&table->allowed[chunk / 8], (unsigned char)~bit, __ATOMIC_ACQ_REL) & bit) != 0;
}

static inline int mx_socket_answer(const mx_socket_table *table, const mx_socket_link *link, uint32_t chunk,
                                   uint64_t *sent) {
    struct iovec vectors[1 + MX_SOCKET_VECTORS];
    unsigned char head[MX_SOCKET_ANSWER_BYTES];
    bool here = mx_socket_may_send(table, chunk);
    uint64_t first = here ? table->starts[chunk] : 0, last = here ? table->starts[chunk + 1] : 0;
    mx_stretches walk = {table->addresses + first, table->lengths + first, (size_t)(last - first), 0, 0};
    size_t count, bytes, most = link->tls != NULL ? MX_TLS_PIECE_BYTES : MX_SOCKET_PIECE_BYTES;
    int error;
    mx_socket_put32(head, chunk);
    mx_socket_put32(head + 4, here ? MX_SOCKET_BYTES_FOLLOW : MX_SOCKET_NOT_HERE);
    vectors[0].iov_base = head;
    vectors[0].iov_len = sizeof head;
    count = mx_socket_piece(&walk, vectors + 1, most, &bytes);
    if ((error = mx_socket_send(link, vectors, 1 + count)) != 0) {
        return error;
    }
    while (bytes != 0) {
        __atomic_fetch_add(sent, bytes, __ATOMIC_RELAXED);
        mx_stretches_advance(&walk, bytes);
        count = mx_socket_piece(&walk, vectors, most, &bytes);
        if ((error = mx_socket_send(link, vectors, count)) != 0) {
            return error;
        }
    }
    return 0;
}

/* Answers requests until the other side closes (0) or something fails (errno; also when it was shut down here). */
static inline int mx_socket_serve(const mx_socket_table *table, const mx_socket_link *link, uint64_t *sent) {
    unsigned char request[MX_SOCKET_REQUEST_BYTES];
    for (;;) {
        ssize_t got = mx_socket_take_all(link, request, sizeof request);
        if (got != (ssize_t)sizeof request) {
            return got < 0 ? (int)-got : 0;
        }
        int error = mx_socket_answer(table, link, mx_socket_get32(request), sent);
        if (error != 0) {
            return error;
        }
    }
}

/* The receiver's end. `expected` bytes were requested and have not come yet. */
typedef struct {
    mx_socket_link link;
    size_t expected;
    int low_water; /* of the socket, as it is set */
    const bool *closing;
} mx_socket_end;

static inline ssize_t mx_socket_take_tls(mx_socket_end *end, struct iovec *vectors, size_t count) {
    ssize_t got = mx_tls_take_some(end->link.tls, vectors, count);
    if (got > 0) {
        end->expected -= (size_t)got;
        return got;
    }
    return got == 0 || __atomic_load_n(end->closing, __ATOMIC_ACQUIRE) ? -ECONNRESET : got;
}

/* Takes some bytes into the vectors. Returns how many, or -errno: ECONNRESET when the other side has closed.
 *
 * With SO_RCVLOWAT the kernel wakes nobody for less: it must not be more than what is still to come. */
static inline ssize_t mx_socket_take(mx_socket_end *end, struct iovec *vectors, size_t count) {
    if (end->link.tls != NULL) {
        return mx_socket_take_tls(end, vectors, count);
    }
    struct msghdr message = {.msg_iov = vectors, .msg_iovlen = count};
    int low_water = end->expected >= 2 * MX_SOCKET_WAKE_BYTES ? MX_SOCKET_WAKE_BYTES : 1;
    if (low_water != end->low_water &&
        setsockopt(end->link.fd, SOL_SOCKET, SO_RCVLOWAT, &low_water, sizeof low_water) == 0) {
        end->low_water = low_water;
    }
    for (;;) {
        ssize_t got = recvmsg(end->link.fd, &message, 0);
        if (got > 0) {
            end->expected -= (size_t)got;
            return got;
        }
        if (got == 0 || __atomic_load_n(end->closing, __ATOMIC_ACQUIRE)) {
            return -ECONNRESET;
        }
        if (errno != EINTR && errno != EAGAIN && errno != EWOULDBLOCK) {
            return -errno;
        }
    }
}

static inline int mx_socket_open_end(mx_socket_end *end, mx_socket_link link, const bool *closing) {
    const struct timeval look = {0, MX_SOCKET_LOOK_MICROSECONDS};
    *end = (mx_socket_end){link, 0, 1, closing};
    return link.tls != NULL || setsockopt(link.fd, SOL_SOCKET, SO_RCVTIMEO, &look, sizeof look) == 0 ? 0 : errno;
}

/* Requests a chunk of `bytes` bytes. Returns 0 or errno. */
static inline int mx_socket_request(mx_socket_end *end, uint32_t chunk, size_t bytes) {
    unsigned char request[MX_SOCKET_REQUEST_BYTES];
    struct iovec vector = {request, sizeof request};
    mx_socket_put32(request, chunk);
    end->expected += MX_SOCKET_ANSWER_BYTES + bytes;
    return mx_socket_send(&end->link, &vector, 1);
}

/* Takes the head of the next answer. Returns 0 or errno: EPROTO for another chunk's, ENODATA where it has no bytes. */
static inline int mx_socket_take_head(mx_socket_end *end, uint32_t chunk) {
    unsigned char head[MX_SOCKET_ANSWER_BYTES];
    size_t have = 0;
    while (have < sizeof head) {
        struct iovec vector = {head + have, sizeof head - have};
        ssize_t got = mx_socket_take(end, &vector, 1);
        if (got < 0) {
            return (int)-got;
        }
        have += (size_t)got;
    }
    if (mx_socket_get32(head) != chunk) {
        return EPROTO;
    }
    return mx_socket_get32(head + 4) == MX_SOCKET_BYTES_FOLLOW ? 0 : ENODATA;
}

#endif
