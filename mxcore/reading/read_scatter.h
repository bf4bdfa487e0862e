/* From where a piece was read to its destinations, with the digest on the way. */
#ifndef MX_READ_SCATTER_H
#define MX_READ_SCATTER_H

#include "native/stream_copy.h"
#include "native/xxh3.h"
#include "read_parts.h"

#define MX_DIGEST_BLOCK 131072 /* hashed, then copied while it is in the cache */

/* Copies a piece from where it was read or mapped to its destinations; digests on the way if `state` is given. */
static inline void mx_scatter(const mx_part *parts, const mx_piece *piece, const char *source, mx_xxh3 *state) {
    mx_cursor at = piece->from;
    int64_t left = piece->payload;
    while (left > 0) {
        mx_run run = mx_next_run(parts, &at, &left);
        const char *from = source + (run.offset - piece->offset);
        if (state == NULL) {
            mx_stream_copy(run.to, from, (size_t)run.bytes);
            continue;
        }
        for (int64_t done = 0; done < run.bytes; done += MX_DIGEST_BLOCK) {
            size_t block = (size_t)mx_least(run.bytes - done, MX_DIGEST_BLOCK);
            mx_stream_copy(run.to + done, from + done, block);
            mx_xxh3_update(state, from + done, block);
        }
    }
}

/* Digests a piece of one segment that was read in place. */
static inline void mx_digest_piece(const mx_part *parts, const mx_piece *piece, mx_xxh3 *state) {
    mx_xxh3_update(state, mx_cursor_address(parts, &piece->from), (size_t)piece->payload);
}

#endif
