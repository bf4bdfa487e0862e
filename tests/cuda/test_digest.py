"""The digest kernels on the stand-in: every thread's work, planned, launched and summed, equals the host's digest."""

from __future__ import annotations

import ctypes
import random
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mxcore.cuda import PLAN_BYTES, DeviceBuffer, DeviceDigest, context_of
from mxcore.cuda import digest as cuda_digest
from mxcore.cuda.memory import live_pinned_bytes
from mxcore.digest import mixsum_64_many
from mxcore.errors import CudaError, DeviceMemoryError
from tests.cuda.stand_in import StandIn

SIZE = 400_000


@pytest.fixture
def memory(driver: StandIn) -> Iterator[DeviceBuffer]:
    """Device memory with random bytes: on the stand-in the host reaches it."""
    buffer = DeviceBuffer(context_of(0), SIZE)
    ctypes.memmove(buffer.address, random.Random(1).randbytes(SIZE), SIZE)
    yield buffer
    buffer.close()


@pytest.fixture
def digest(memory: DeviceBuffer) -> Iterator[DeviceDigest]:
    made = DeviceDigest(memory.context)
    yield made
    made.close()


def same(digest: DeviceDigest, memory: DeviceBuffer, groups: list[list[tuple[int, int]]]) -> None:
    """The device's digests of groups of (offset, length) are the host's."""
    flat = [segment for group in groups for segment in group]
    addresses = array("Q", (memory.address + offset for offset, _ in flat))
    lengths = array("Q", (length for _, length in flat))
    starts = array("Q", [0])
    for group in groups:
        starts.append(starts[-1] + len(group))
    assert digest.many(addresses, lengths, starts) == mixsum_64_many(addresses, lengths, starts)


def test_lengths_and_alignments(memory: DeviceBuffer, digest: DeviceDigest) -> None:
    same(
        digest, memory, [[(offset, length)] for offset in range(17) for length in (0, 1, 7, 8, 9, 15, 16, 17, 33, 4099)]
    )
    same(digest, memory, [[(offset, 150_001)] for offset in (0, 8, 16, 1, 5, 12)])  # several tiles
    same(digest, memory, [[(0, SIZE)], [], [(1, SIZE - 1)]])
    assert digest.many(array("Q"), array("Q"), array("Q", [0])) == b""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 1000), st.sampled_from([0, 1, 2, 3, 5, 8, 13, 64, 999])), max_size=9),
        max_size=6,
    )
)
def test_any_groups(memory: DeviceBuffer, digest: DeviceDigest, groups: list[list[tuple[int, int]]]) -> None:
    same(digest, memory, groups)


def test_more_than_one_launch_holds(driver: StandIn, memory: DeviceBuffer, digest: DeviceDigest) -> None:
    before = driver.counts().launches
    same(digest, memory, [[(8 * index, 8) for index in range(20_000)]])  # 16,384 tiles a launch
    assert driver.counts().launches == before + 2
    same(digest, memory, [[(3 * index, 3) for index in range(20_000)], [(0, 5)]])  # 2,048 seams a launch
    assert driver.counts().launches > before + 4


def test_nothing_is_allocated_on_the_device(driver: StandIn, memory: DeviceBuffer, digest: DeviceDigest) -> None:
    before = driver.counts().device_allocations
    same(digest, memory, [[(0, SIZE)]])
    assert driver.counts().device_allocations == before
    assert live_pinned_bytes() == PLAN_BYTES


def test_threads_share_one(memory: DeviceBuffer, digest: DeviceDigest) -> None:
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(5):
                same(digest, memory, [[(chance.randrange(1000), chance.randrange(50_000))] for _ in range(4)])
        except BaseException as error:  # noqa: BLE001 - raised by the test
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_one_module_a_device(driver: StandIn, memory: DeviceBuffer, digest: DeviceDigest) -> None:
    second = DeviceDigest(memory.context)
    assert driver.counts().modules == 1
    second.close()
    second.close()
    with pytest.raises(CudaError, match="closed"):
        second.many(array("Q", [memory.address]), array("Q", [8]), array("Q", [0, 1]))


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (lambda driver: driver.fail("cuLaunchKernel", 719), "cuLaunchKernel failed with CUDA_ERROR_LAUNCH_FAILED"),
        (lambda driver: driver.fail_later("launch", 719), "cuStreamSynchronize failed with CUDA_ERROR_LAUNCH_FAILED"),
        (lambda driver: driver.fail("cuStreamSynchronize", 700), "cuStreamSynchronize failed with CUDA_ERROR_ILLEGAL"),
        (
            lambda driver: driver.fail("cuCtxPushCurrent_v2", 201),
            "cuCtxPushCurrent failed with CUDA_ERROR_INVALID_CONT",
        ),
    ],
)
def test_failures_have_names(driver: StandIn, memory: DeviceBuffer, digest: DeviceDigest, fail, message: str) -> None:  # type: ignore[no-untyped-def]
    fail(driver)
    with pytest.raises(CudaError, match=message):
        digest.many(array("Q", [memory.address]), array("Q", [4096]), array("Q", [0, 1]))
    driver.reset()
    same(digest, memory, [[(0, 4096)]])


def test_a_failed_start_leaves_nothing(driver: StandIn, tmp_path: Path) -> None:
    context = context_of(0)
    driver.fail("cuMemHostAlloc", 2)
    with pytest.raises(DeviceMemoryError):
        DeviceDigest(context)
    kept = cuda_digest.PTX_FILE
    broken = tmp_path / "kernels.ptx"
    broken.write_text(kept.read_text().replace(".version 7.0", ".version 99.0"))
    try:
        cuda_digest.PTX_FILE = broken
        with pytest.raises(CudaError, match=r"device 0 takes no kernels of kernels.ptx: the stand-in compiles nothing"):
            DeviceDigest(context)
        broken.write_text(kept.read_text().replace("mx_sum_seams", "mx_sum_other"))
        with pytest.raises(CudaError, match=r"cuModuleGetFunction failed with CUDA_ERROR_NOT_FOUND.*mx_sum_seams"):
            DeviceDigest(context)
    finally:
        cuda_digest.PTX_FILE = kept


def test_addresses_of_nobody_are_seen(driver: StandIn, memory: DeviceBuffer, digest: DeviceDigest) -> None:
    with pytest.raises(CudaError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        digest.many(array("Q", [memory.address]), array("Q", [SIZE + 8]), array("Q", [0, 1]))
    assert "go beyond their allocation" in driver.violation()
    driver.reset()


def test_wrong_arrays_are_refused(digest: DeviceDigest) -> None:
    for addresses, lengths, starts in (([1], [], [0, 0]), ([1], [1], [0]), ([1], [1], [1, 1]), ([], [], []),
                                       ([1, 2], [1, 1], [0, 2, 1, 2])):  # fmt: skip
        with pytest.raises(ValueError):  # noqa: PT011 - which one is said for people
            digest.many(array("Q", addresses), array("Q", lengths), array("Q", starts))
