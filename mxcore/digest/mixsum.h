/* mixsum-64: a 64-bit digest of bytes that thousands of threads make together.
 *
 * The bytes are words of 8, little-endian, the last one filled up with zeros. Word i is xored with its key, (i + 1)
 * times the golden ratio of 2^64, and mixed (Stafford's variant 13 of MurmurHash3's finalizer, as in SplitMix64). The
 * words' sum modulo 2^64, and the number of bytes, are mixed once more. A sum does not care who adds first: any stretch
 * of words can be summed anywhere, in any order. docs/reference/digests.md says what it detects, and what not.
 *
 * For C, C++ and CUDA: nothing here is more than arithmetic.
 */
#ifndef MX_MIXSUM_H
#define MX_MIXSUM_H

#include <stdint.h>

#ifdef __CUDACC__
#define MX_ON_BOTH __host__ __device__ static inline
#else
#define MX_ON_BOTH static inline
#endif

#define MX_MIXSUM_KEY 0x9E3779B97F4A7C15ULL

MX_ON_BOTH uint64_t mx_mix(uint64_t word) {
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9ULL;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBULL;
    return word ^ (word >> 31);
}

/* What word `index` of the bytes adds to the sum. */
MX_ON_BOTH uint64_t mx_mixed(uint64_t word, uint64_t index) { return mx_mix(word ^ ((index + 1) * MX_MIXSUM_KEY)); }

/* The digest of `bytes` bytes whose words have that sum. */
MX_ON_BOTH uint64_t mx_mixsum_end(uint64_t sum, uint64_t bytes) { return mx_mix(sum + mx_mix(bytes ^ MX_MIXSUM_KEY)); }

#endif
