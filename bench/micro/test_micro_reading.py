"""Each way of reading a checkpoint into memory that is there already, against bare reads of the same bytes."""

from __future__ import annotations

import os
import random
from array import array
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.micro.conftest import Measure
from mxcore.storage.access import open_checkpoint
from mxcore.storage.load import load
from mxcore.storage.plan import Row, merged

TENSORS = 32
TENSOR_BYTES = 4 * 1024 * 1024
TOTAL_BYTES = TENSORS * TENSOR_BYTES
RANGES = 20_000

pytestmark = pytest.mark.benchmark(group="128 MiB from a file to memory")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading") / "model.safetensors"
    save_file({f"t{n}": torch.full((TENSOR_BYTES,), n, dtype=torch.uint8) for n in range(TENSORS)}, path)
    return path


@pytest.mark.parametrize("way", ["mapped", "buffered", "direct", "uring"])
def test_way(measure: Measure, file: Path, way: str) -> None:
    """`mapped` and `buffered` from the page cache; `direct` and `uring` from the disk."""
    into = {f"t{n}": torch.empty(TENSOR_BYTES, dtype=torch.uint8) for n in range(TENSORS)}
    checkpoint = open_checkpoint(file)
    measure(lambda: load(checkpoint, into, mode=way), total_bytes=TOTAL_BYTES)
    assert all(int(into[f"t{n}"][-1]) == n for n in range(TENSORS))


def test_limit_page_cache(measure: Measure, file: Path) -> None:
    """One thread, preadv of 8 MiB."""
    into = torch.zeros(file.stat().st_size, dtype=torch.uint8)
    view = memoryview(into.numpy())
    step = 8 * 1024 * 1024
    handle = os.open(file, os.O_RDONLY)

    def read() -> None:
        for begin in range(0, len(view), step):
            os.preadv(handle, [view[begin : begin + step]], begin)

    try:
        measure(read, total_bytes=TOTAL_BYTES)
    finally:
        os.close(handle)


def test_limit_disk(measure: Measure, file: Path) -> None:
    """Four reads of 8 MiB in flight, past the page cache."""
    from mxbench.load.candidates import disk_limit

    read = disk_limit(4)
    measure(lambda: read([file], {}), total_bytes=TOTAL_BYTES)


@pytest.mark.benchmark(group="20,000 read ranges")
def test_ranges_are_merged(measure: Measure) -> None:
    """Ranges of 4 KiB in any order, half of which follow each other in file and memory."""
    rows: list[Row] = []
    at = 0
    for n in range(RANGES):
        rows.append((0, at, 4096, 0, 1, 1 << 40 | at, 0))
        at += 4096 if n % 2 else 8192
    random.Random(1).shuffle(rows)
    assert len(measure(lambda: merged(rows), times=RANGES)) < RANGES


@pytest.mark.benchmark(group="20,000 read ranges")
def test_limit_sort(measure: Measure) -> None:
    """A sort of as many integers."""
    numbers = array("Q", range(RANGES))
    shuffled = random.Random(1).sample(numbers.tolist(), RANGES)
    measure(lambda: sorted(shuffled), times=RANGES)
