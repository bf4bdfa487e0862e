"""The cut into chunks, and regions."""

from __future__ import annotations

from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxcore.transfer.layout import Chunks, Layout, Placement, merge_regions
from mxcore.transfer.layout.regions import PAGE_BYTES

SPACE = 1000  # from one extent to the next


def layout_of(*extent_bytes: int) -> Layout:
    return Layout("raw", (), extent_bytes)


def segments(chunks: Chunks, extents: int, chunk: int) -> list[tuple[int, int, int]]:
    """The parts of a chunk: extent, offset, length."""
    addresses = chunks.slice_of(chunks.addresses([SPACE * extent for extent in range(extents)]), chunk)
    lengths = chunks.slice_of(chunks.lengths, chunk)
    return [(*divmod(address, SPACE), length) for address, length in zip(addresses, lengths, strict=True)]


def test_small_extents_share_a_chunk_and_large_ones_are_split() -> None:
    chunks = Chunks(layout_of(3, 4, 10), 8)
    assert len(chunks) == 3
    assert segments(chunks, 3, 0) == [(0, 0, 3), (1, 0, 4), (2, 0, 1)]
    assert segments(chunks, 3, 1) == [(2, 1, 8)]
    assert segments(chunks, 3, 2) == [(2, 9, 1)]
    assert [chunks.bytes_of(i) for i in range(3)] == [8, 8, 1]
    assert chunks.segment_starts == array("Q", [0, 3, 4, 5])


def test_addresses_follow_the_extents() -> None:
    chunks = Chunks(layout_of(3, 10), 8)
    addresses = chunks.local_addresses(Placement((1000, 5000), (0, 0), "cpu"))
    assert addresses == array("Q", [1000, 5000, 5005])
    assert chunks.slice_of(addresses, 0) == array("Q", [1000, 5000])
    assert chunks.slice_of(chunks.lengths, 1) == array("Q", [5])


def test_a_layout_without_bytes_has_no_chunks() -> None:
    assert len(Chunks(layout_of())) == 0


@pytest.mark.parametrize("bad", [0, -1])
def test_limits_must_be_positive(bad: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Chunks(layout_of(1), bad)


@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 64))
def test_chunks_are_the_layouts_bytes_in_order(extents: list[int], chunk_bytes: int) -> None:
    chunks = Chunks(layout_of(*extents), chunk_bytes)
    parts = [segments(chunks, len(extents), chunk) for chunk in range(len(chunks))]
    walked = [(extent, offset + i) for each in parts for extent, offset, length in each for i in range(length)]
    assert walked == [(extent, i) for extent, size in enumerate(extents) for i in range(size)]
    sizes = [sum(length for _, _, length in each) for each in parts]
    assert sizes == [chunks.bytes_of(chunk) for chunk in range(len(chunks))]
    assert all(size == chunk_bytes for size in sizes[:-1])
    assert chunks.segment_starts[-1] == len(chunks.lengths)


def test_neighbours_become_one_region() -> None:
    placement = Placement((0x10000, 0x10100, 0x13000, 0x20000), (0, 0, 0, 0), "cpu")
    [regions] = merge_regions(placement, (0x100, 0x1000, 0x10, 0x10))
    assert regions.addresses == array("Q", [0x10000, 0x13000, 0x20000])
    assert regions.lengths == array("Q", [0x1100, 0x10, 0x10])


def test_a_gap_of_a_whole_page_separates() -> None:
    assert len(merge_regions(Placement((0x1000, 0x2000), (0, 0), "cpu"), (1, 1))[0].addresses) == 1
    assert len(merge_regions(Placement((0x1000, 0x3000), (0, 0), "cpu"), (1, 1))[0].addresses) == 2


def test_devices_do_not_mix() -> None:
    first, second = merge_regions(Placement((0x1000, 0x1010, 0x1020), (0, 1, 0), "cuda"), (16, 16, 16))
    assert (first.device_index, list(first.addresses), list(first.lengths)) == (0, [0x1000], [48])
    assert (second.device_index, list(second.addresses)) == (1, [0x1010])


@given(st.lists(st.tuples(st.integers(0, 50_000), st.integers(1, 9000)), max_size=40))
def test_regions_cover_all_extents_and_only_their_pages(steps: list[tuple[int, int]]) -> None:
    addresses = []
    end = PAGE_BYTES
    for gap, length in steps:
        addresses.append(end + gap)
        end += gap + length
    lengths = [length for _, length in steps]
    placement = Placement(tuple(addresses), (0,) * len(steps), "cpu")
    regions = [
        range(begin, begin + length)
        for merged in merge_regions(placement, lengths)
        for begin, length in zip(merged.addresses, merged.lengths, strict=True)
    ]
    pages = {
        page
        for begin, length in zip(addresses, lengths, strict=True)
        for page in range(begin // PAGE_BYTES, (begin + length - 1) // PAGE_BYTES + 1)
    }
    for begin, length in zip(addresses, lengths, strict=True):
        assert sum(begin in region and begin + length - 1 in region for region in regions) == 1
    for region in regions:
        assert set(range(region.start // PAGE_BYTES, (region.stop - 1) // PAGE_BYTES + 1)) <= pages
    for before, after in pairwise(regions):
        assert after.start // PAGE_BYTES - (before.stop - 1) // PAGE_BYTES > 1


def test_extents_and_the_chunks_that_cover_them() -> None:
    """Extents of 30, 150, 20 and 100 bytes, cut each 100."""
    sizes = (30, 150, 20, 100)
    layout, placement = Layout("raw", (), sizes), Placement((1000, 2000, 3000, 4000), (0,) * 4, "cpu")
    chunks = Chunks(layout, 100)
    assert [chunks.covering({extent}) for extent in range(4)] == [0b001, 0b011, 0b010, 0b100]
    assert chunks.covering({0, 3}) == 0b101
    assert chunks.extents_of(0b010) == {1, 2}
    assert chunks.extents_of(0) == set()
    part, where = chunks.touched(layout, placement, 0b110)
    assert (part.extent_bytes, where.addresses) == ((150, 20, 100), (2000, 3000, 4000))
