/* XXH3-64 over ranges of memory, with the widest vectors of the processor.
 *
 * The vendored xxhash.h compiles to SSE2 on x86_64, so that one build runs anywhere. Its AVX2 kernel, and one of ours
 * for AVX-512, are compiled beside it with their own target attributes and chosen once at run time. On data in cache an
 * AMD EPYC of 2024 hashes 35 GB/s with SSE2, 70 with AVX2, 85 with xxhash's AVX-512 kernel and 145 with ours; on data
 * in memory 29, 34, 36 and 37. On other processors (NEON, VSX) xxhash's own choice at compile time is right.
 */
#ifndef MX_DIGEST_DISPATCH_H
#define MX_DIGEST_DISPATCH_H

#include "native/vector_width.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define MX_DIGEST_X86 1
#define XXH_X86DISPATCH 1 /* SSE2 by name, and alignment for the widest kernel */
#define XXH_DISPATCH_AVX2 1
#define XXH_DISPATCH_AVX512 1
#define XXH_TARGET_AVX2 __attribute__((__target__("avx2")))
#define XXH_TARGET_AVX512 __attribute__((__target__("avx512f")))
#endif

#define XXH_INLINE_ALL
#include "xxhash.h"

#include "native/xxh3.h"

#include <stddef.h>
#include <stdint.h>

_Static_assert(sizeof(mx_xxh3) >= sizeof(XXH3_state_t) && _Alignof(mx_xxh3) >= _Alignof(XXH3_state_t), "");

#ifdef MX_DIGEST_X86
static XXH_TARGET_AVX2 XXH_errorcode mx_digest_update_avx2(XXH3_state_t *state, const void *data, size_t length) {
    return XXH3_update(state, (const xxh_u8 *)data, length, XXH3_accumulate_avx2, XXH3_scrambleAcc_avx2);
}

enum { MX_BLOCK_BYTES = 1024, MX_BLOCK_STRIPES = 16, MX_PREFETCH_BYTES = 512 }; /* blocks as of the default secret */

/* Whole blocks. XXH3 adds each stripe to the accumulators in turn, and the next addition waits for it. Here a block is
 * summed apart, and added once; swapping the halves of the sum is swapping those of each. The accumulators stay in a
 * register from block to block. */
static XXH_TARGET_AVX512 void mx_digest_blocks_avx512(xxh_u64 *accumulators, const xxh_u8 *data, size_t blocks,
                                                      const xxh_u8 *secret) {
    __m512i sum = _mm512_load_si512(accumulators);
    const __m512i last = _mm512_loadu_si512(secret + XXH_SECRET_CONSUME_RATE * MX_BLOCK_STRIPES);
    const __m512i prime = _mm512_set1_epi32((int)XXH_PRIME32_1);
    for (; blocks != 0; blocks--, data += MX_BLOCK_BYTES) {
        __m512i words[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        __m512i products[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 16
        for (int stripe = 0; stripe < MX_BLOCK_STRIPES; stripe++) {
            const xxh_u8 *at = data + XXH_STRIPE_LEN * stripe;
            __m512i word = _mm512_loadu_si512(at);
            __m512i keyed = _mm512_xor_si512(word, _mm512_loadu_si512(secret + XXH_SECRET_CONSUME_RATE * stripe));
            __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
            _mm_prefetch((const char *)at + MX_PREFETCH_BYTES, _MM_HINT_T0);
            words[stripe % 2] = _mm512_add_epi64(words[stripe % 2], word);
            products[stripe % 2] = _mm512_add_epi64(products[stripe % 2], product);
        }
        __m512i swapped = _mm512_shuffle_epi32(_mm512_add_epi64(words[0], words[1]), _MM_PERM_BADC);
        sum = _mm512_add_epi64(sum, _mm512_add_epi64(_mm512_add_epi64(products[0], products[1]), swapped));
        /* XXH3's scramble */
        __m512i mixed = _mm512_ternarylogic_epi32(last, sum, _mm512_srli_epi64(sum, 47), 0x96 /* xor of all three */);
        __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(mixed, 32), prime);
        sum = _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64(high, 32));
    }
    _mm512_store_si512(accumulators, sum);
}

/* Blocks that begin in `data` by `blocks`, the ends by xxhash's own update, whose buffer has up to 256 bytes. */
static XXH_TARGET_AVX512 void mx_digest_update_avx512(XXH3_state_t *state, const void *data, size_t length) {
    const xxh_u8 *at = data;
    const unsigned char *secret = state->extSecret == NULL ? state->customSecret : state->extSecret;
    size_t head = (size_t)(-state->totalLen % MX_BLOCK_BYTES); /* to where a block begins */
    if (length >= head + 2 * MX_BLOCK_BYTES && state->nbStripesPerBlock == MX_BLOCK_STRIPES) {
        if (head != 0) {
            XXH3_update(state, at, head, XXH3_accumulate_avx512, XXH3_scrambleAcc_avx512);
        }
        if (state->bufferedSize != 0) {
            /* the end of the block before, whole stripes, which is not the last: more follows */
            XXH3_consumeStripes(state->acc, &state->nbStripesSoFar, state->nbStripesPerBlock, state->buffer,
                                state->bufferedSize / XXH_STRIPE_LEN, secret, state->secretLimit,
                                XXH3_accumulate_avx512, XXH3_scrambleAcc_avx512);
            state->bufferedSize = 0;
        }
        size_t blocks = (length - head) / MX_BLOCK_BYTES - 1; /* what is left then is more than the buffer takes */
        mx_digest_blocks_avx512(state->acc, at + head, blocks, secret);
        state->totalLen += blocks * MX_BLOCK_BYTES;
        head += blocks * MX_BLOCK_BYTES;
        at += head;
        length -= head;
    }
    XXH3_update(state, at, length, XXH3_accumulate_avx512, XXH3_scrambleAcc_avx512);
}
#endif

static int mx_digest_width = MX_PLAIN;

/* Called at the module's import, and by tests to reach all kernels: allows vectors up to `widest`, returns the used. */
static int mx_digest_choose(int widest) {
    mx_digest_width = mx_vector_width(widest);
    return mx_digest_width;
}

static void mx_digest_update(mx_xxh3 *digest, const void *data, size_t length) {
    XXH3_state_t *state = (XXH3_state_t *)digest;
#ifdef MX_DIGEST_X86
    if (mx_digest_width == MX_AVX512) {
        mx_digest_update_avx512(state, data, length);
        return;
    }
    if (mx_digest_width == MX_AVX2) {
        mx_digest_update_avx2(state, data, length);
        return;
    }
#endif
    XXH3_64bits_update(state, data, length);
}

static void mx_digest_begin_seeded(mx_xxh3 *state, uint64_t seed) {
    XXH3_INITSTATE((XXH3_state_t *)state);
    XXH3_64bits_reset_withSeed((XXH3_state_t *)state, seed);
}

static void mx_digest_begin(mx_xxh3 *state) { mx_digest_begin_seeded(state, 0); }

static uint64_t mx_digest_end(const mx_xxh3 *state) { return XXH3_64bits_digest((const XXH3_state_t *)state); }

/* The digest of `count` stretches of memory, one after the other. */
static uint64_t mx_digest_segments(const uint64_t *addresses, const uint64_t *lengths, size_t count, uint64_t seed) {
    mx_xxh3 state;
    mx_digest_begin_seeded(&state, seed);
    for (size_t index = 0; index < count; index++) {
        if (lengths[index] != 0) {
            mx_digest_update(&state, (const void *)(uintptr_t)addresses[index], (size_t)lengths[index]);
        }
    }
    return mx_digest_end(&state);
}

/* For other extensions. */
static const mx_xxh3_functions mx_digest_functions = {mx_digest_begin, mx_digest_update, mx_digest_end};

#endif
