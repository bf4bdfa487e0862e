"""XXH3-64 in C for other extensions, so that xxhash is compiled once."""

cdef extern from "native/xxh3.h" nogil:
    ctypedef struct mx_xxh3_functions:
        pass
    void mx_xxh3_use(const mx_xxh3_functions *functions)

cdef const mx_xxh3_functions *xxh3_functions() noexcept
