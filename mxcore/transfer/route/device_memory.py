"""What differs between host and device memory: who makes its digests, whether it can be moved, what is registered."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from mxcore.cuda import driver as cuda_driver
from mxcore.errors import CudaError
from mxcore.transfer.layout import (
    ChunkDigests,
    Chunks,
    Digester,
    HostDigester,
    Layout,
    Placement,
    Regions,
    chunk_digests,
    merge_regions,
)
from mxcore.transfer.route.device_proof import proven_device

__all__ = ["allocation_regions", "digester_of", "memory_digests", "require_movable"]


def digester_of(placement: Placement) -> Digester:
    """What makes the digests of a placement's memory. Raises LayoutUnsupported for memory that cannot be checked."""
    return HostDigester() if placement.device_type == "cpu" else proven_device(placement).digester


def memory_digests(layout: Layout, placement: Placement, *, kind: str | None = None) -> ChunkDigests:
    """The digests of all chunks in this process' memory, as `chunk_digests`. Raises as `digester_of`."""
    chunks = Chunks(layout)
    return chunk_digests(digester_of(placement), chunks, chunks.local_addresses(placement), kind=kind)


def require_movable(placement: Placement) -> None:
    """The one check of what kind of memory can be moved.

    Raises:
        LayoutUnsupported: device memory whose bytes cannot be checked or moved here; the message says what failed.
    """
    if placement.device_type != "cpu":
        proven_device(placement)


def allocation_regions(placement: Placement, extent_bytes: Sequence[int]) -> list[Regions]:
    """As `merge_regions`, for device memory: a region never goes beyond the allocation that its extents lie in.

    Within one allocation all is one region, from the first extent to the end of the last. Raises CudaError for an
    extent that is in no allocation, or in several.
    """
    stretches: dict[tuple[int, int], tuple[int, int]] = {}
    for device, address, length in sorted(
        zip(placement.device_indices, placement.addresses, extent_bytes, strict=True)
    ):
        base, size = cuda_driver.address_range(address)
        if address + length > base + size:
            raise CudaError(f"{length} bytes at {address:#x} go beyond their allocation of {size} bytes at {base:#x}")
        first, end = stretches.get((device, base), (address, address))
        stretches[device, base] = (min(first, address), max(end, address + length))
    apart = [
        Regions(device, array("Q", [first]), array("Q", [end - first]))
        for (device, _), (first, end) in sorted(stretches.items())
    ]
    return apart or merge_regions(placement, extent_bytes)
