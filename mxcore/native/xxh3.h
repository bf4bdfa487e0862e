/* XXH3-64 for other extensions: mxcore.digest has the code, here are its functions' types.
 *
 * xxhash's kernels make half a megabyte of machine code. A module takes the table once, at its import (`xxh3_functions`
 * of digest.pxd), and calls through it: once a piece of some hundred KiB, which costs nothing.
 */
#ifndef MX_NATIVE_XXH3_H
#define MX_NATIVE_XXH3_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* A digest that is being made. */
typedef struct {
    _Alignas(64) unsigned char bytes[576]; /* room for XXH3_state_t; digest_dispatch.h compares */
} mx_xxh3;

typedef struct {
    void (*begin)(mx_xxh3 *state);
    void (*update)(mx_xxh3 *state, const void *data, size_t length);
    uint64_t (*end)(const mx_xxh3 *state);
} mx_xxh3_functions;

static const mx_xxh3_functions *mx_xxh3_table; /* of the module that includes this */

static inline void mx_xxh3_use(const mx_xxh3_functions *functions) { mx_xxh3_table = functions; }

static inline void mx_xxh3_begin(mx_xxh3 *state) { mx_xxh3_table->begin(state); }

static inline void mx_xxh3_update(mx_xxh3 *state, const void *data, size_t length) {
    mx_xxh3_table->update(state, data, length);
}

/* The first `bytes` bytes, at most all, of the vectors. */
static inline void mx_xxh3_update_vectors(mx_xxh3 *state, const struct iovec *vectors, size_t bytes) {
    for (; bytes != 0; vectors++) {
        size_t length = vectors->iov_len < bytes ? vectors->iov_len : bytes;
        mx_xxh3_update(state, vectors->iov_base, length);
        bytes -= length;
    }
}

static inline uint64_t mx_xxh3_end(const mx_xxh3 *state) { return mx_xxh3_table->end(state); }

#endif
