/* What one thread of each kernel does: the whole of the kernels but for their reduction (cuda_kernels.cu).
 *
 * Host code makes the records; the tests' stand-in driver runs these functions for every thread of a launch.
 */
#ifndef MX_CUDA_KERNELS_H
#define MX_CUDA_KERNELS_H

#include "digest/mixsum.h"

#define MX_BLOCK_THREADS 256
#define MX_TILE_WORDS 8192    /* of 8 bytes: 64 KiB for a block */
#define MX_STITCH_BYTES 65536 /* what a block of mx_stitch copies at most */

/* A stretch of whole words of one digest; the address may be any. */
typedef struct {
    uint64_t address;
    uint64_t first; /* index of its first word in the digest's bytes */
    uint64_t words;
} mx_tile;

/* A word whose bytes lie in several stretches. */
typedef struct {
    uint64_t address[8]; /* of each byte; 0: none, a zero */
    uint64_t index;
} mx_seam;

/* A copy of bytes, from memory that the device reads to memory of the device. */
typedef struct {
    uint64_t to;
    uint64_t from;
    uint64_t bytes; /* up to MX_STITCH_BYTES */
} mx_stitch_record;

/* The part of a tile's sum that thread `lane` of `lanes` makes. */
MX_ON_BOTH uint64_t mx_tile_lane(const mx_tile *tile, uint32_t lane, uint32_t lanes) {
    uint64_t sum = 0;
    uint64_t words = tile->words, first = tile->first;
    uint32_t skew = (uint32_t)(tile->address & 7);
    const uint64_t *source = (const uint64_t *)(uintptr_t)(tile->address - skew);
    if (skew != 0) {
        /* aligned loads, of which two make a word; the ends of the outermost are in the same 8 bytes as ours */
        for (uint64_t at = lane; at < words; at += lanes) {
            uint64_t word = (source[at] >> (8 * skew)) | (source[at + 1] << (64 - 8 * skew));
            sum += mx_mixed(word, first + at);
        }
        return sum;
    }
    if ((tile->address & 15) != 0) {
        for (uint64_t at = lane; at < words; at += lanes) {
            sum += mx_mixed(source[at], first + at);
        }
        return sum;
    }
#ifdef __CUDA_ARCH__
#pragma unroll 4
#endif
    for (uint64_t at = 2 * (uint64_t)lane; at + 1 < words; at += 2 * (uint64_t)lanes) {
#ifdef __CUDA_ARCH__
        ulonglong2 both = *(const ulonglong2 *)(source + at);
        sum += mx_mixed(both.x, first + at) + mx_mixed(both.y, first + at + 1);
#else
        sum += mx_mixed(source[at], first + at) + mx_mixed(source[at + 1], first + at + 1);
#endif
    }
    if ((words & 1) != 0 && lane == 0) {
        sum += mx_mixed(source[words - 1], first + words - 1);
    }
    return sum;
}

MX_ON_BOTH uint64_t mx_seam_value(const mx_seam *seam) {
    uint64_t word = 0;
    for (int byte = 0; byte < 8; byte++) {
        if (seam->address[byte] != 0) {
            word |= (uint64_t)*(const uint8_t *)(uintptr_t)seam->address[byte] << (8 * byte);
        }
    }
    return mx_mixed(word, seam->index);
}

/* The part of a copy that thread `lane` of `lanes` makes: 16 bytes at a time where both sides allow it. */
MX_ON_BOTH void mx_stitch_lane(const mx_stitch_record *record, uint32_t lane, uint32_t lanes) {
    uint64_t done = 0;
#ifdef __CUDA_ARCH__
    if (((record->to | record->from) & 15) == 0) {
        done = record->bytes & ~(uint64_t)15;
        for (uint64_t at = 16 * (uint64_t)lane; at < done; at += 16 * (uint64_t)lanes) {
            *(ulonglong2 *)(record->to + at) = *(const ulonglong2 *)(record->from + at);
        }
    }
#endif
    for (uint64_t at = done + lane; at < record->bytes; at += lanes) {
        *(uint8_t *)(uintptr_t)(record->to + at) = *(const uint8_t *)(uintptr_t)(record->from + at);
    }
}

#endif
