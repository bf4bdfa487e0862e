/* What to read, as data: parts → jobs → pieces; and how a piece that was read gets to its destinations.
 *
 * A part is `count` runs of `bytes` each, `stride` bytes apart in a file and `to_stride` apart in memory: a whole
 * tensor is one run, a slice along an inner dimension many. A job is what one thread takes: a stretch of the list of
 * parts, with one digest if it has one. A piece is one read: runs that are near in one file, at most piece_bytes long,
 * never across a multiple of piece_bytes, so that all but the first and last are aligned.
 */
#ifndef MX_READ_PARTS_H
#define MX_READ_PARTS_H

#include <stddef.h>
#include <stdint.h>

#define MX_SEGMENTS 512 /* parts of one preadv */

typedef struct {
    int64_t file; /* index */
    int64_t offset;
    int64_t bytes;
    int64_t stride;
    int64_t count;
    int64_t to; /* address */
    int64_t to_stride;
} mx_part;

typedef struct {
    size_t part;
    int64_t run;
    int64_t skip; /* bytes of the run that are done */
} mx_cursor;

typedef struct {
    mx_cursor from;
    int64_t payload; /* bytes for destinations */
    int64_t digest;  /* index of its digest; -1: none */
} mx_job;

typedef struct {
    int fd;
    int direct_fd;       /* opened with O_DIRECT; -1: none */
    char *map;           /* the whole file; NULL: none */
    int64_t align_bytes; /* what O_DIRECT wants of offsets, lengths and memory; a power of two */
} mx_file;

typedef struct {
    mx_cursor from, next;
    int64_t file, offset, length, payload;
    size_t segments; /* 1: goes to one place in memory */
} mx_piece;

typedef struct {
    int64_t piece_bytes;
    int64_t gap_bytes; /* runs that are no further apart are read together */
    size_t segments;   /* at most so many a piece */
} mx_limits;

static inline int64_t mx_least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t mx_cursor_offset(const mx_part *parts, const mx_cursor *at) {
    const mx_part *part = parts + at->part;
    return part->offset + at->run * part->stride + at->skip;
}

static inline char *mx_cursor_address(const mx_part *parts, const mx_cursor *at) {
    const mx_part *part = parts + at->part;
    return (char *)(uintptr_t)(part->to + at->run * part->to_stride + at->skip);
}

/* Moves on by `bytes`, at most what the run has left. */
static inline void mx_cursor_advance(const mx_part *parts, mx_cursor *at, int64_t bytes) {
    const mx_part *part = parts + at->part;
    at->skip += bytes;
    if (at->skip == part->bytes) {
        at->skip = 0;
        if (++at->run == part->count) {
            at->run = 0;
            at->part++;
        }
    }
}

/* Bytes that lie together in the file, and in memory. */
typedef struct {
    int64_t offset;
    char *to;
    int64_t bytes;
} mx_run;

/* The bytes at the cursor up to the end of their run, at most the `left` ones of a piece; moves on behind them. */
static inline mx_run mx_next_run(const mx_part *parts, mx_cursor *at, int64_t *left) {
    mx_run run = {mx_cursor_offset(parts, at), mx_cursor_address(parts, at),
                  mx_least(*left, parts[at->part].bytes - at->skip)};
    mx_cursor_advance(parts, at, run.bytes);
    *left -= run.bytes;
    return run;
}

/* The next piece of a job of which `payload` bytes are left (1 or more); all parts have bytes. */
static inline mx_piece mx_next_piece(const mx_part *parts, mx_cursor from, int64_t payload, const mx_limits *limits) {
    mx_piece piece = {.from = from, .file = parts[from.part].file, .offset = mx_cursor_offset(parts, &from)};
    int64_t cut = (piece.offset / limits->piece_bytes + 1) * limits->piece_bytes;
    int64_t at = piece.offset;
    piece.next = from;
    for (;;) {
        int64_t left = parts[piece.next.part].bytes - piece.next.skip;
        int64_t take = mx_least(mx_least(left, cut - at), payload - piece.payload);
        piece.payload += take;
        piece.length = at + take - piece.offset;
        piece.segments++;
        mx_cursor_advance(parts, &piece.next, take);
        if (take < left || piece.payload == payload || piece.segments == limits->segments) {
            return piece;
        }
        int64_t end = at + take;
        at = mx_cursor_offset(parts, &piece.next);
        if (parts[piece.next.part].file != piece.file || at < end || at - end > limits->gap_bytes || at >= cut) {
            return piece;
        }
    }
}

#endif
