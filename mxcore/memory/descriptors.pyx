"""Lists of descriptors and regions for NIXL. Types and documentation: descriptors.pyi."""

cimport cython
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc, qsort

import array


cdef object copied(values):
    """As an array of uint64; by the block where it is one already."""
    if type(values) is array.array and values.typecode == "Q":
        return values[:]
    return array.array("Q", values)


def merge_adjoining(local_addresses not None, remote_addresses not None, lengths not None):
    merged = copied(local_addresses), copied(remote_addresses), copied(lengths)
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


cdef struct Extent:
    uint64_t device
    uint64_t address
    uint64_t length


cdef int in_order(const void* left, const void* right) noexcept nogil:
    cdef const Extent* a = <const Extent*>left
    cdef const Extent* b = <const Extent*>right
    if a.device != b.device:
        return -1 if a.device < b.device else 1
    return (a.address > b.address) - (a.address < b.address)


def merge_extents(tuple device_indices not None, tuple addresses not None, lengths not None, uint64_t page_bytes):
    cdef Py_ssize_t count = len(addresses), index
    if not count == len(device_indices) == len(lengths):
        raise ValueError(f"{count} addresses, {len(device_indices)} devices, {len(lengths)} lengths")
    cdef Extent* extents = <Extent*>malloc((count + 1) * sizeof(Extent))
    cdef bint sorted_already = True
    if extents == NULL:
        raise MemoryError
    try:
        for index in range(count):
            extents[index] = Extent(device_indices[index], addresses[index], lengths[index])
            if index and in_order(&extents[index - 1], &extents[index]) > 0:
                sorted_already = False
        with nogil:
            if not sorted_already:
                qsort(extents, count, sizeof(Extent), in_order)
            count = _merge_extents(extents, count, page_bytes)
        return _by_device(extents, count)
    finally:
        free(extents)


cdef Py_ssize_t _merge_extents(Extent* extents, Py_ssize_t count, uint64_t page_bytes) noexcept nogil:
    """Leaves the merged ones at the beginning; returns how many. `page_bytes` are a power of two."""
    cdef Py_ssize_t last = -1, index
    cdef uint64_t end
    for index in range(count):
        if last >= 0 and extents[last].device == extents[index].device:
            end = extents[last].address + extents[last].length
            if <int64_t>(extents[index].address // page_bytes - (end - 1) // page_bytes) <= 1:
                extents[last].length = extents[index].address + extents[index].length - extents[last].address
                continue
        last += 1
        extents[last] = extents[index]
    return last + 1


cdef list _by_device(Extent* extents, Py_ssize_t count):
    cdef Py_ssize_t index
    found = []
    for index in range(count):
        if index == 0 or extents[index].device != extents[index - 1].device:
            found.append((extents[index].device, array.array("Q"), array.array("Q")))
        found[-1][1].append(extents[index].address)
        found[-1][2].append(extents[index].length)
    return found
