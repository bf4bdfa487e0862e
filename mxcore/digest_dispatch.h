/* XXH3-64 over ranges of memory, with AVX2 where the processor has it.
 *
 * The vendored xxhash.h compiles to SSE2 on x86_64, so that one build runs anywhere. Its AVX2 kernel is compiled
 * beside it with its own target attribute and chosen once at run time: twice as fast on data in cache (58 to 29 GB/s
 * on an AMD EPYC of 2024), the same on data in memory. Its AVX-512 kernel was no faster than AVX2 there. On other
 * processors (NEON, VSX) xxhash's own choice at compile time is right.
 */
#ifndef MX_DIGEST_DISPATCH_H
#define MX_DIGEST_DISPATCH_H

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define MX_DIGEST_X86 1
#define XXH_X86DISPATCH 1 /* SSE2 by name, and alignment for the widest kernel */
#define XXH_DISPATCH_AVX2 1
#define XXH_TARGET_AVX2 __attribute__((__target__("avx2")))
#endif

#define XXH_INLINE_ALL
#include "xxhash.h"

#include <stddef.h>
#include <stdint.h>

#ifdef MX_DIGEST_X86
static XXH_TARGET_AVX2 XXH_errorcode mx_digest_update_avx2(XXH3_state_t *state, const void *data, size_t length) {
    return XXH3_update(state, (const xxh_u8 *)data, length, XXH3_accumulate_avx2, XXH3_scrambleAcc_avx2);
}
#endif

static int mx_digest_wide = 0;

/* Called at the module's import, and by tests to reach both kernels. Returns whether the wide one is used. */
__attribute__((unused)) static int mx_digest_choose(int allow_wide) {
    mx_digest_wide = 0;
#ifdef MX_DIGEST_X86
    __builtin_cpu_init();
    mx_digest_wide = allow_wide && __builtin_cpu_supports("avx2");
#else
    (void)allow_wide;
#endif
    return mx_digest_wide;
}

__attribute__((unused)) static void mx_digest_update(XXH3_state_t *state, const void *data, size_t length) {
#ifdef MX_DIGEST_X86
    if (mx_digest_wide) {
        mx_digest_update_avx2(state, data, length);
        return;
    }
#endif
    XXH3_64bits_update(state, data, length);
}

/* The digest of `count` stretches of memory, one after the other. */
static inline uint64_t mx_digest_segments(const uint64_t *addresses, const uint64_t *lengths, size_t count, uint64_t seed) {
    XXH3_state_t state; /* its type carries the 64-byte alignment that it needs */
    XXH3_INITSTATE(&state);
    XXH3_64bits_reset_withSeed(&state, seed);
    for (size_t index = 0; index < count; index++) {
        if (lengths[index] != 0) {
            mx_digest_update(&state, (const void *)(uintptr_t)addresses[index], (size_t)lengths[index]);
        }
    }
    return XXH3_64bits_digest(&state);
}

#endif
