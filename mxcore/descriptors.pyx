"""Lists of descriptors for NIXL. Types and documentation: descriptors.pyi."""

cimport cython
from libc.stdint cimport uint64_t

import array


def merge_adjoining(local_addresses not None, remote_addresses not None, lengths not None):
    merged = tuple(array.array("Q", values) for values in (local_addresses, remote_addresses, lengths))
    local, remote, sizes = merged
    if not len(local) == len(remote) == len(sizes):
        raise ValueError(f"{len(local)} local and {len(remote)} remote addresses, {len(sizes)} lengths")
    if len(sizes) > 1:
        count = _merge(local, remote, sizes)  # its views end with the call: only then may an array shrink
        for values in merged:
            del values[count:]
    return merged


@cython.boundscheck(False)
@cython.wraparound(False)
cdef Py_ssize_t _merge(uint64_t[::1] local, uint64_t[::1] remote, uint64_t[::1] sizes) noexcept:
    cdef Py_ssize_t last = 0, index
    with nogil:
        for index in range(1, sizes.shape[0]):
            if local[last] + sizes[last] == local[index] and remote[last] + sizes[last] == remote[index]:
                sizes[last] += sizes[index]
                continue
            last += 1
            local[last], remote[last], sizes[last] = local[index], remote[index], sizes[index]
    return last + 1
