"""Digests that are made while files are read, in every way to read, and memory that is no longer what was read."""

from __future__ import annotations

import ctypes

import pytest
import torch

from mxcore.digest import xxh3_64
from mxcore.storage.checkpoint import Checkpoint
from mxcore.storage.load import Reader, ReadRecord
from mxcore.storage.load.read_record import ReadCheck
from mxcore.storage.plan import Want, merged, parts_of
from tests.storage.conftest import MODES, Maker, Tensors, same

LARGE_BYTES = 12_000_000
Memory = list[tuple[int, int]]


def memory_of(*tensors: torch.Tensor) -> Memory:
    return [(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()) for tensor in tensors]


def read(checkpoint: Checkpoint, record: ReadRecord, *wants: Want, mode: str = "auto") -> None:
    """As lazy tensors do it: a read for each want."""
    with Reader(checkpoint.files, mode=mode, stamps=checkpoint.stamps) as reader:
        for want in wants:
            rows, starts = record.cut(merged(parts_of(checkpoint, want)))
            record.note(checkpoint, rows, starts, reader.read(rows, groups=starts).digests)


@pytest.mark.parametrize("mode", MODES)
def test_digests_are_those_of_what_was_read(checkpoint: Checkpoint, tensors: Tensors, mode: str) -> None:
    large, columns, cube = torch.zeros(3000, 1000), torch.zeros(3000, 100), torch.zeros(7, 5, 11)
    record = ReadRecord()
    wants = [Want("large", large), Want("large", columns, ((0, 3000), (50, 150))), Want("cube", cube)]
    read(checkpoint, record, *wants, mode=mode)
    assert same(large, tensors["large"])
    assert same(columns, tensors["large"][:, 50:150])
    digests = [int.from_bytes(group.digest, "little") for group in record._groups]
    first = (8 << 20) // 4
    assert digests == [
        xxh3_64(tensors["large"].flatten()[:first].numpy()),
        xxh3_64(tensors["large"].flatten()[first:].numpy()),
        xxh3_64(tensors["large"][:, 50:150].contiguous().numpy()),
        xxh3_64(tensors["cube"].numpy()),
    ]
    sizes = LARGE_BYTES + 1_200_000 + 7 * 5 * 11 * 4
    assert record.check(memory_of(large, columns, cube), threads=2) == ReadCheck(sizes)
    large_alone = memory_of(large)
    assert record.check(large_alone) == ReadCheck(LARGE_BYTES)  # the rest may be freed
    assert record.check([]) == ReadCheck()


def test_flipped_bits_are_found_and_written_again(checkpoint: Checkpoint, tensors: Tensors) -> None:
    large, columns = torch.zeros(3000, 1000), torch.zeros(100, 300).t()  # strewn: read in many runs
    record = ReadRecord()
    read(checkpoint, record, Want("large", large), Want("large", columns, ((0, 300), (0, 100))))
    for tensor, offset in ((large, 11_999_999), (large, 5), (columns, 77_777)):
        ctypes.c_uint8.from_address(tensor.data_ptr() + offset).value ^= 0b1001
    found = record.check(memory_of(large, columns))
    assert (found.repaired_bits, found.changed_bytes) == (6, 0)
    assert same(large, tensors["large"])
    assert same(columns, tensors["large"][:300, :100])
    assert record.check(memory_of(large, columns)).repaired_bits == 0


def test_what_a_loader_computes_is_no_damage(checkpoint: Checkpoint) -> None:
    large = torch.zeros(3000, 1000)
    record = ReadRecord()
    read(checkpoint, record, Want("large", large))
    large.flatten()[: 1 << 20].neg_()
    computed = large.clone()
    assert record.check(memory_of(large)) == ReadCheck(LARGE_BYTES, 0, 8 << 20)
    assert same(large, computed)


def test_what_is_read_later_counts(made: Maker) -> None:
    checkpoint = made({"a": torch.ones(1000), "b": torch.zeros(1000)})
    there = torch.zeros(3000)
    record = ReadRecord()
    read(checkpoint, record, Want("a", there[:1000]), Want("a", there[1000:2000]), Want("b", there[500:1500]))
    assert record.check(memory_of(there)) == ReadCheck(4000)
    there[:500] = 7  # of the first read, which the later one overlaps
    assert record.check(memory_of(there)) == ReadCheck(4000)
