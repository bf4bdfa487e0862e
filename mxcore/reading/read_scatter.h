/* From where a piece was read to its destinations, with the digest on the way. */
#ifndef MX_READ_SCATTER_H
#define MX_READ_SCATTER_H

#include "digest/digest_dispatch.h"
#include "read_parts.h"
#include "native/stream_copy.h"

#define MX_DIGEST_BLOCK 131072 /* hashed, then copied while it is in the cache */

/* Copies a piece from where it was read or mapped to its destinations; digests on the way if `state` is given. */
static inline void mx_scatter(const mx_part *parts, const mx_piece *piece, const char *source, XXH3_state_t *state) {
    mx_cursor at = piece->from;
    int64_t left = piece->payload;
    while (left > 0) {
        const char *from = source + (mx_cursor_offset(parts, &at) - piece->offset);
        char *to = mx_cursor_address(parts, &at);
        int64_t take = mx_least(left, parts[at.part].bytes - at.skip);
        if (state != NULL) {
            for (int64_t done = 0; done < take; done += MX_DIGEST_BLOCK) {
                size_t block = (size_t)mx_least(take - done, MX_DIGEST_BLOCK);
                mx_stream_copy(to + done, from + done, block);
                mx_digest_update(state, from + done, block);
            }
        } else {
            mx_stream_copy(to, from, (size_t)take);
        }
        mx_cursor_advance(parts, &at, take);
        left -= take;
    }
}

/* Digests a piece of one segment that was read in place. */
static inline void mx_digest_piece(const mx_part *parts, const mx_piece *piece, XXH3_state_t *state) {
    mx_digest_update(state, mx_cursor_address(parts, &piece->from), (size_t)piece->payload);
}

#endif
