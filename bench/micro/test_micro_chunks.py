"""What a transfer works out about a model of 20,000 tensors before and while bytes move."""

from __future__ import annotations

import ctypes
import random
from array import array

import pytest

from bench.micro.conftest import Measure
from mxcore.memory import merge_adjoining
from mxcore.transfer.layout import (
    Chunks,
    Layout,
    LocalTensor,
    Placement,
    SwarmPlan,
    all_chunks,
    build_layout,
    merge_regions,
    set_from_bytes,
    set_to_bytes,
)

TENSORS = 20_000
TENSOR_BYTES = 1024 * 1024
GAP_BYTES = 512
CHUNKS = 8_750  # of 16 MiB: 140 GB

pytestmark = pytest.mark.benchmark(group="20,000 tensors")


def tensors() -> list[LocalTensor]:
    """Side by side with a small gap, as an allocator places them; nothing reads these addresses."""
    step = TENSOR_BYTES + GAP_BYTES
    return [
        LocalTensor(
            name=f"model.layers.{n // 100}.mlp.experts.{n % 100}.weight",
            dtype="torch.bfloat16",
            shape=(512, 1024),
            stride=(1024, 1),
            address=(1 << 40) + n * step,
            itemsize_bytes=2,
            storage_address=(1 << 40) + n * step,
            storage_bytes=TENSOR_BYTES,
            device_type="cpu",
            device_index=0,
        )
        for n in range(TENSORS)
    ]


@pytest.fixture(scope="module")
def made() -> tuple[Layout, Placement]:
    return build_layout("raw", tensors())


def test_layout(measure: Measure) -> None:
    listed = tensors()
    measure(lambda: build_layout("raw", listed), times=TENSORS)


def test_fingerprint(measure: Measure, made: tuple[Layout, Placement]) -> None:
    """`fingerprint` is kept by a layout, so each round has a new one."""
    layout, _ = made
    assert measure(
        lambda fresh: fresh.fingerprint,
        fresh=lambda: (Layout(layout.kind, layout.tensors, layout.extent_bytes),),
        times=TENSORS,
    )


def test_chunks_are_cut(measure: Measure, made: tuple[Layout, Placement]) -> None:
    assert len(measure(lambda: Chunks(made[0]), times=TENSORS)) > TENSORS * TENSOR_BYTES // (16 << 20) - 1


def test_descriptors_are_merged(measure: Measure, made: tuple[Layout, Placement]) -> None:
    chunks = Chunks(made[0])
    addresses = chunks.local_addresses(made[1])
    moved = array("Q", (address + (1 << 41) for address in addresses))
    merged = measure(lambda: merge_adjoining(addresses, moved, chunks.lengths), times=len(addresses))
    assert len(merged[0]) <= len(addresses)


def test_regions_are_merged(measure: Measure, made: tuple[Layout, Placement]) -> None:
    layout, placement = made
    assert measure(lambda: merge_regions(placement, layout.extent_bytes), times=TENSORS)


def test_limit_memcpy(measure: Measure) -> None:
    """The numbers that describe them (where from, where to, how long), copied once."""
    numbers = array("Q", range(3 * TENSORS))
    into = array("Q", bytes(numbers.itemsize * len(numbers)))
    (begin, count), (target, _) = numbers.buffer_info(), into.buffer_info()
    measure(lambda: ctypes.memmove(target, begin, count * numbers.itemsize), times=TENSORS)
    assert into == numbers


@pytest.mark.benchmark(group="140 GB: 8,750 chunks, four holders")
def test_limit_loop(measure: Measure) -> None:
    """Nothing but a number of each chunk, one after the other, as Python counts."""

    def counted() -> int:
        last = 0
        for chunk in range(CHUNKS):
            last = chunk
        return last

    assert measure(counted, times=CHUNKS) == CHUNKS - 1


@pytest.mark.benchmark(group="140 GB: 8,750 chunks, four holders")
def test_limit_set_memcpy(measure: Measure) -> None:
    """A copy of the bytes of a set."""
    have = random.Random(1).randbytes(CHUNKS // 8 + 1)
    assert measure(lambda: bytearray(have), times=1) == have


@pytest.mark.benchmark(group="140 GB: 8,750 chunks, four holders")
def test_chunks_are_assigned(measure: Measure) -> None:
    """Every chunk asked for, granted, claimed and done, as fast as holders could answer."""

    def whole() -> bool:
        plan = SwarmPlan(CHUNKS, 16 << 20)
        for holder in "abcd":
            plan.add_holder(holder, all_chunks(CHUNKS))
        now = 0.0
        while not plan.finished:
            now += 0.01
            for holder in "abcd":
                request = plan.wanted(holder, now)
                granted = []
                left = request.preferred or request.chunks
                while left and len(granted) < request.most:
                    granted.append((left & -left).bit_length() - 1)
                    left &= left - 1
                taken, _ = plan.claim(holder, granted, now)
                for chunk in taken:
                    plan.done(holder, chunk, now + 0.005)
        return plan.finished

    assert measure(whole, fresh=tuple, rounds=5, times=CHUNKS)


@pytest.mark.benchmark(group="140 GB: 8,750 chunks, four holders")
def test_sets_are_exchanged(measure: Measure) -> None:
    """What a holder has, to bytes and back."""
    have = random.Random(1).getrandbits(CHUNKS)
    assert measure(lambda: set_from_bytes(set_to_bytes(have, CHUNKS), CHUNKS), times=1) == have
