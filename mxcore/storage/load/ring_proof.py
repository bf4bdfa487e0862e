"""A new ring to a device is tried on known bytes: a ring that changes one is never used for weights.

The bytes pass as weights do, large runs by copies and small ones by the kernel, into memory that the load is going to
overwrite, and come back by a copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from mxcore.cuda import Stream, copy_to_host
from mxcore.errors import CudaError
from mxcore.reading import DeviceRing
from mxcore.storage.load.host_load import Reader
from mxcore.storage.plan import Row

__all__ = ["prove"]

_MOST_BYTES = 200_000  # less than any ring has
_LEAST_LARGE_BYTES = 100_000  # a run that is copied by itself
_SMALL_RUNS = (1, 7, 33, 700, 4096, 5000, 2, 17_001)  # bytes, again and again


def prove(ring: DeviceRing, target: tuple[int, int]) -> None:
    """Tries the ring on `target`, (address, bytes) of device memory. Raises CudaError."""
    address, size_bytes = target[0], min(target[1], _MOST_BYTES)
    data = bytes((7 * index + index // 251) % 256 for index in range(size_bytes))
    rows = list(_rows(address, size_bytes))
    file = os.memfd_create("mx-ring-proof")
    try:
        os.write(file, data)
        with Reader([f"/proc/self/fd/{file}"], mode="buffered") as reader:
            reader.read(rows, device=ring)
    finally:
        os.close(file)
    expected = bytearray(size_bytes)
    for _, offset, length, _, _, to, _ in rows:
        expected[to - address : to - address + length] = data[offset : offset + length]
    if _read_back(ring, address, size_bytes) != expected:
        raise CudaError(
            f"device {ring.context.index}: known bytes came out of its ring changed; nothing is loaded through it"
        )


def _rows(address: int, size_bytes: int) -> Iterator[Row]:
    """All bytes: a large run, where there is room, and small ones in the opposite order, so that none join."""
    begin = _LEAST_LARGE_BYTES if size_bytes > _LEAST_LARGE_BYTES else 0
    if begin:
        yield (0, 0, begin, 0, 1, address, 0)
    to, number = address + size_bytes, 0
    while begin < size_bytes:
        length = min(_SMALL_RUNS[number % len(_SMALL_RUNS)], size_bytes - begin)
        to -= length
        yield (0, begin, length, 0, 1, to, 0)
        begin += length
        number += 1


def _read_back(ring: DeviceRing, address: int, size_bytes: int) -> bytes:
    """Through the ring's own memory, which is larger and at rest."""
    stream = Stream(ring.context)
    copy_to_host(ring.buffer.address, address, size_bytes, stream)
    stream.synchronize()
    with memoryview(ring.buffer) as view, view[:size_bytes] as part:
        return bytes(part)
