/* mixsum-64 of host memory: the sum of a stretch of words, with the widest vectors of the processor, and whole streams.
 *
 * One loop, compiled three times for x86_64 and chosen at run time (AVX-512 multiplies 64-bit lanes by itself, AVX2 out
 * of 32-bit products); on other processors the compiler's own choice.
 */
#ifndef MX_MIXSUM_HOST_H
#define MX_MIXSUM_HOST_H

#include "mixsum.h"
#include "native/vector_width.h"

#include <stddef.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "mixsum-64's words are little-endian; loading them on this processor wants a swap"
#endif

#define MX_SUM_LOOP                         \
    uint64_t sum = 0;                       \
    for (size_t at = 0; at < words; at++) { \
        uint64_t word;                      \
        memcpy(&word, data + 8 * at, 8);    \
        sum += mx_mixed(word, first + at);  \
    }                                       \
    return sum;

static uint64_t mx_sum_plain(const unsigned char *data, size_t words, uint64_t first) { MX_SUM_LOOP }

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2"))) static uint64_t mx_sum_avx2(const unsigned char *data, size_t words, uint64_t first) {
    MX_SUM_LOOP
}

__attribute__((target("avx512f,avx512dq,prefer-vector-width=512"))) static uint64_t mx_sum_avx512(
    const unsigned char *data, size_t words, uint64_t first) {
    MX_SUM_LOOP
}
#endif

static int mx_mixsum_width = MX_PLAIN;

/* Allows vectors up to `widest`; returns what is used: the widest that the processor has. */
static int mx_mixsum_choose(int widest) {
    mx_mixsum_width = mx_vector_width(widest);
    return mx_mixsum_width;
}

static uint64_t mx_sum_words(const unsigned char *data, size_t words, uint64_t first) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (mx_mixsum_width == MX_AVX512) {
        return mx_sum_avx512(data, words, first);
    }
    if (mx_mixsum_width == MX_AVX2) {
        return mx_sum_avx2(data, words, first);
    }
#endif
    return mx_sum_plain(data, words, first);
}

typedef struct {
    uint64_t sum;
    uint64_t bytes;        /* so far */
    unsigned char part[8]; /* the word that is not full yet */
} mx_mixsum;

static void mx_mixsum_update(mx_mixsum *state, const void *source, size_t length) {
    const unsigned char *data = (const unsigned char *)source;
    size_t held = state->bytes % 8;
    uint64_t index = state->bytes / 8;
    state->bytes += length;
    if (held != 0) {
        size_t take = length < 8 - held ? length : 8 - held;
        memcpy(state->part + held, data, take);
        if (held + take < 8) {
            return;
        }
        state->sum += mx_sum_words(state->part, 1, index++);
        data += take;
        length -= take;
    }
    state->sum += mx_sum_words(data, length / 8, index);
    memcpy(state->part, data + length / 8 * 8, length % 8);
}

static uint64_t mx_mixsum_digest(mx_mixsum *state) {
    uint64_t sum = state->sum;
    if (state->bytes % 8 != 0) {
        memset(state->part + state->bytes % 8, 0, 8 - state->bytes % 8);
        sum += mx_sum_words(state->part, 1, state->bytes / 8);
    }
    return mx_mixsum_end(sum, state->bytes);
}

/* The digest of `count` stretches of memory, one after the other. */
static uint64_t mx_mixsum_segments(const uint64_t *addresses, const uint64_t *lengths, size_t count) {
    mx_mixsum state = {0, 0, {0}};
    for (size_t index = 0; index < count; index++) {
        if (lengths[index] != 0) {
            mx_mixsum_update(&state, (const void *)(uintptr_t)addresses[index], (size_t)lengths[index]);
        }
    }
    return mx_mixsum_digest(&state);
}

#endif
