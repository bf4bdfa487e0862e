"""Digests of host memory, one thread, against a copy of the same bytes."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterator

import pytest

from bench.micro.conftest import Measure
from mxcore.digest import digest as digest
from mxcore.memory import HostBuffer

SIZE_BYTES = 64 * 1024 * 1024
SEGMENT_BYTES = 16 * 1024
WIDTHS = {0: "baseline", 1: "avx2", 2: "avx512"}

pytestmark = pytest.mark.benchmark(group="digest of 64 MiB")


@pytest.fixture(scope="module")
def memory() -> Iterator[HostBuffer]:
    with HostBuffer(SIZE_BYTES) as buffer:
        view = memoryview(buffer)
        view[:] = bytes(range(256)) * (SIZE_BYTES // 256)
        del view
        yield buffer


def test_limit_memcpy(measure: Measure, memory: HostBuffer) -> None:
    with HostBuffer(SIZE_BYTES) as to:
        measure(lambda: ctypes.memmove(to.address, memory.address, SIZE_BYTES), total_bytes=SIZE_BYTES)


@pytest.mark.parametrize(
    ("function", "choose"),
    [(digest.xxh3_64, digest._choose_vectors), (digest.mixsum_64, digest._choose_mixsum_vectors)],
    ids=["xxh3", "mixsum"],
)
@pytest.mark.parametrize("width", WIDTHS, ids=WIDTHS.values())
def test_digest(
    measure: Measure,
    memory: HostBuffer,
    function: Callable[[HostBuffer], int],
    choose: Callable[[int], int],
    width: int,
) -> None:
    if choose(width) != width:
        choose(max(WIDTHS))
        pytest.skip(f"this processor has no {WIDTHS[width]}")
    try:
        measure(lambda: function(memory), total_bytes=SIZE_BYTES)
    finally:
        choose(max(WIDTHS))


def test_xxh3_of_segments(measure: Measure, memory: HostBuffer) -> None:
    """A chunk of many small tensors: segments of 16 KiB."""
    count = SIZE_BYTES // SEGMENT_BYTES
    addresses = array("Q", range(memory.address, memory.address + SIZE_BYTES, SEGMENT_BYTES))
    lengths = array("Q", [SEGMENT_BYTES] * count)
    measure(lambda: digest.xxh3_64_segments(addresses, lengths), total_bytes=SIZE_BYTES)
