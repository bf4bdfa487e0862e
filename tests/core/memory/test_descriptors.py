"""Descriptors that follow each other on both sides become one; the bytes that they name stay the same."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxcore.memory import merge_adjoining, merge_extents


def expanded(local: array[int], remote: array[int], lengths: array[int]) -> list[tuple[int, int]]:
    """Which byte goes to which."""
    return [
        (ours + i, theirs + i)
        for ours, theirs, length in zip(local, remote, lengths, strict=True)
        for i in range(length)
    ]


def test_neighbours_on_both_sides_are_one() -> None:
    assert merge_adjoining([0, 10, 20], [100, 110, 120], [10, 10, 5]) == (
        array("Q", [0]),
        array("Q", [100]),
        array("Q", [25]),
    )


def test_neighbours_on_one_side_stay_apart() -> None:
    assert merge_adjoining([0, 10, 21], [100, 111, 121], [10, 10, 5])[2] == array("Q", [10, 10, 5])


def test_none_and_one() -> None:
    assert merge_adjoining([], [], []) == (array("Q"), array("Q"), array("Q"))
    assert merge_adjoining(array("Q", [2**64 - 8]), [8], [8])[0] == array("Q", [2**64 - 8])


def test_what_was_given_is_not_changed() -> None:
    given_lengths = array("Q", [1, 1])
    merge_adjoining([0, 1], [0, 1], given_lengths)
    assert given_lengths == array("Q", [1, 1])


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 local and 1 remote addresses, 2 lengths"):
        merge_adjoining([0, 1], [0], [1, 1])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4)), max_size=30))
def test_the_same_bytes_go_to_the_same_places(steps: list[tuple[int, int, int]]) -> None:
    local, remote, lengths = [0], [1000], [1]
    for gap, other_gap, length in steps:
        local.append(local[-1] + lengths[-1] + gap)
        remote.append(remote[-1] + lengths[-1] + other_gap)
        lengths.append(length)
    merged = merge_adjoining(local, remote, lengths)
    assert expanded(*merged) == expanded(array("Q", local), array("Q", remote), array("Q", lengths))
    assert len(merged[0]) == 1 + sum(bool(gap or other_gap) for gap, other_gap, _ in steps)


def test_regions_come_sorted_by_device_and_address() -> None:
    found = merge_extents((1, 0, 1, 0), (0x9000, 0x5000, 0x1000, 0x1000), [8, 8, 8, 8], 4096)
    assert found == [
        (0, array("Q", [0x1000, 0x5000]), array("Q", [8, 8])),
        (1, array("Q", [0x1000, 0x9000]), array("Q", [8, 8])),
    ]


def test_no_extents_are_no_regions() -> None:
    assert merge_extents((), (), (), 4096) == []


def test_extents_at_the_end_of_all_addresses() -> None:
    last = 2**64 - 4096
    assert merge_extents((0, 0), (last, last - 4096), (4095, 4096), 4096) == [
        (0, array("Q", [last - 4096]), array("Q", [8191]))
    ]


def test_what_are_no_extents_is_refused() -> None:
    with pytest.raises(ValueError, match="1 addresses, 1 devices, 2 lengths"):
        merge_extents((0,), (1,), (1, 2), 4096)
    for wrong in (-1, 2**64):
        with pytest.raises(OverflowError):
            merge_extents((0,), (wrong,), (1,), 4096)
