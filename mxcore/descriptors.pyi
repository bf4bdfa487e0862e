"""Lists of descriptors for NIXL, made where Python would take longer than the transfer."""

from array import array
from collections.abc import Iterable

def merge_adjoining(
    local_addresses: Iterable[int], remote_addresses: Iterable[int], lengths: Iterable[int]
) -> tuple[array[int], array[int], array[int]]:
    """New arrays of uint64 in which stretches that follow each other on both sides are one (lengths in bytes).

    Each descriptor costs its transfer some microseconds, however short it is. Order and bytes stay the same. What is
    merged must lie in one registered region on either side. Thread-safe. Raises ValueError for different lengths.
    """
