"""Lists of descriptors and regions for NIXL, made where Python would take longer than the transfer."""

from array import array
from collections.abc import Iterable, Sequence

def merge_adjoining(
    local_addresses: Iterable[int], remote_addresses: Iterable[int], lengths: Iterable[int]
) -> tuple[array[int], array[int], array[int]]:
    """New arrays of uint64 in which stretches that follow each other on both sides are one (lengths in bytes).

    Each descriptor costs its transfer some microseconds, however short it is. Order and bytes stay the same. What is
    merged must lie in one registered region on either side. Thread-safe. Raises ValueError for different lengths.
    """

def merge_extents(
    device_indices: tuple[int, ...], addresses: tuple[int, ...], lengths: Sequence[int], page_bytes: int
) -> list[tuple[int, array[int], array[int]]]:
    """The regions that cover all extents: (device index, addresses, lengths in bytes), sorted by device and address.

    Two extents of a device are one region where one ends in the page in which the next begins, or in the page before.
    Extents may come in any order and overlap nowhere. Thread-safe. Raises ValueError for different lengths,
    OverflowError for what is no uint64.
    """
