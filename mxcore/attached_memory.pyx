"""Another process' memory, read by cross-memory attach. Types and documentation: attached_memory.pyi."""

cimport cython
from libc.stdint cimport uint64_t

import os

from mxcore.descriptors import merge_adjoining

cdef extern from "attached_read.h" nogil:
    ctypedef int pid_t
    int mx_digest_choose(int widest)
    int mx_attached_allow()
    int mx_attached_read(pid_t pid, const uint64_t* local, const uint64_t* remote, const uint64_t* lengths,
                         size_t count, uint64_t* digest)
cdef extern from "vector_width.h":
    enum: MX_AVX512

mx_digest_choose(MX_AVX512)


@cython.boundscheck(False)
@cython.wraparound(False)
def read_attached(int pid, local_addresses not None, remote_addresses not None, lengths not None, *, bint hashed=True):
    if pid <= 0:
        raise ValueError(f"{pid} is no process")
    merged = merge_adjoining(local_addresses, remote_addresses, lengths)
    cdef const uint64_t[::1] local = merged[0], remote = merged[1], sizes = merged[2]
    cdef size_t count = sizes.shape[0]
    cdef uint64_t digest = 0
    cdef int error = 0
    if count:
        with nogil:
            error = mx_attached_read(pid, &local[0], &remote[0], &sizes[0], count, &digest if hashed else NULL)
    if error:
        raise OSError(error, os.strerror(error))
    if not hashed:
        return b""
    if not count:
        raise ValueError("nothing to read has no digest")
    return digest.to_bytes(8, "little")


def allow_attaching():
    return mx_attached_allow() == 0
