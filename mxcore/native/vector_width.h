/* Which vectors the processor has, for loops that are compiled several times and chosen at run time. */
#ifndef MX_VECTOR_WIDTH_H
#define MX_VECTOR_WIDTH_H

enum { MX_PLAIN, MX_AVX2, MX_AVX512 }; /* MX_PLAIN: what the compiler may use everywhere */

/* The widest that the processor and the system have, at most `allowed`. */
static int mx_vector_width(int allowed) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (allowed >= MX_AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
        return MX_AVX512;
    }
    if (allowed >= MX_AVX2 && __builtin_cpu_supports("avx2")) {
        return MX_AVX2;
    }
#else
    (void)allowed;
#endif
    return MX_PLAIN;
}

#endif
