"""Neighbouring extents merged into the regions that are registered: never one per tensor where they adjoin."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from mxcore.memory import merge_extents
from mxcore.transfer.layout.layout import Placement

__all__ = ["PAGE_BYTES", "Regions", "merge_regions"]

PAGE_BYTES = 4096


class Regions(NamedTuple):
    """Stretches of memory on one device, as arrays of uint64 (addresses, lengths in bytes), sorted by address."""

    device_index: int
    addresses: array[int]
    lengths: array[int]


def merge_regions(placement: Placement, extent_bytes: Sequence[int]) -> list[Regions]:
    """The regions that cover all extents, one `Regions` a device, sorted by device.

    Two extents are one region when one ends in the page where the next begins, or in the page before it: then every
    byte between them is in a page that holds a byte of either, so that it is mapped as long as they are.
    """
    found = merge_extents(placement.device_indices, placement.addresses, extent_bytes, PAGE_BYTES)
    return [Regions(*regions) for regions in found]
