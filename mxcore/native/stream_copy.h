/* Copying much memory once: with stores that go past the cache.
 *
 * A destination that nobody reads soon costs a third of the traffic when its lines are not fetched before they are
 * overwritten (non-temporal stores): on two cores of an AMD EPYC 24 GB/s, against 15 of memcpy and of pread. Chosen at
 * run time by what the processor has; elsewhere this is memcpy.
 */
#ifndef MX_STREAM_COPY_H
#define MX_STREAM_COPY_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MX_STREAM_COPY_LEAST 16384 /* shorter copies stay in the cache, where their neighbours soon are */

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* `to` has to be aligned to 64 bytes, `length` a multiple of 256. */
__attribute__((target("avx512f"))) static inline void mx_stream_avx512(char *to, const char *from, size_t length) {
    for (; length; length -= 256, to += 256, from += 256) {
        _mm_prefetch(from + 1024, _MM_HINT_T0); /* past the end it does nothing */
        _mm_prefetch(from + 1088, _MM_HINT_T0);
        _mm_prefetch(from + 1152, _MM_HINT_T0);
        _mm_prefetch(from + 1216, _MM_HINT_T0);
        __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 64);
        __m512i c = _mm512_loadu_si512(from + 128), d = _mm512_loadu_si512(from + 192);
        _mm512_stream_si512((__m512i *)to, a);
        _mm512_stream_si512((__m512i *)(to + 64), b);
        _mm512_stream_si512((__m512i *)(to + 128), c);
        _mm512_stream_si512((__m512i *)(to + 192), d);
    }
    _mm_sfence();
}

__attribute__((target("avx"))) static inline void mx_stream_avx(char *to, const char *from, size_t length) {
    for (; length; length -= 128, to += 128, from += 128) {
        _mm_prefetch(from + 1024, _MM_HINT_T0);
        _mm_prefetch(from + 1088, _MM_HINT_T0);
        __m256i a = _mm256_loadu_si256((const __m256i *)from), b = _mm256_loadu_si256((const __m256i *)(from + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(from + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(from + 96));
        _mm256_stream_si256((__m256i *)to, a);
        _mm256_stream_si256((__m256i *)(to + 32), b);
        _mm256_stream_si256((__m256i *)(to + 64), c);
        _mm256_stream_si256((__m256i *)(to + 96), d);
    }
    _mm_sfence();
}

static inline void mx_stream_copy(char *to, const char *from, size_t length) {
    if (length < MX_STREAM_COPY_LEAST || !__builtin_cpu_supports("avx")) {
        memcpy(to, from, length);
        return;
    }
    size_t head = (size_t)(-(uintptr_t)to & 63);
    memcpy(to, from, head);
    to += head;
    from += head;
    length -= head;
    size_t body = length & ~(size_t)255;
    if (__builtin_cpu_supports("avx512f")) {
        mx_stream_avx512(to, from, body);
    } else {
        mx_stream_avx(to, from, body);
    }
    memcpy(to + body, from + body, length - body);
}
#else
static inline void mx_stream_copy(char *to, const char *from, size_t length) { memcpy(to, from, length); }
#endif

#endif
