"""Storage → device on the stand-in: every byte where it belongs, through one ring, and nothing under way afterwards."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mxcore.cuda import DeviceBuffer, Stream, context_of, copy_on_device
from mxcore.cuda import driver as cuda_driver
from mxcore.cuda.memory import live_pinned_bytes
from mxcore.digest import xxh3_64
from mxcore.errors import CudaError, DestinationMismatch, HostMemoryLimit, TruncatedRead
from mxcore.memory import HostBuffer
from mxcore.reading import DeviceRing, slot_bytes
from mxcore.storage.checkpoint import Checkpoint, open_checkpoint
from mxcore.storage.load import LoadReport, Reader, device_ring, release_rings
from mxcore.storage.load.near_device import node_of, prefer_node
from mxcore.storage.plan import MemoryBudget, Row, Want, merged, parts_of
from tests.cuda.device_tensor import DeviceTensor, load_to_device, same_bits
from tests.cuda.stand_in import ROOT, StandIn

MODES = ("auto", "buffered", "mapped", "direct", "uring")


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    small = {f"small.{index:03}": torch.randn(3 + index % 9, 17) for index in range(400)}
    return {
        **small,
        "large": torch.randn(1500, 1000),
        "wide": torch.randn(64, 4096).bfloat16(),
        "odd": torch.randint(0, 255, (70_001,), dtype=torch.uint8),
        "fp8": torch.randn(64, 65).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }


@pytest.fixture(scope="module")
def checkpoint(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return in_two_files(tensors, tmp_path_factory.mktemp("checkpoint"))


def in_two_files(tensors: dict[str, torch.Tensor], folder: Path) -> Checkpoint:
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, folder / "a.safetensors", {"x": "y" * 3})
    save_file({name: tensors[name] for name in names[1::2]}, folder / "b.safetensors")
    return open_checkpoint([folder / "a.safetensors", folder / "b.safetensors"])


@pytest.fixture
def memory(driver: StandIn) -> Iterator[MemoryBudget]:
    yield from budget_that_is_given_back()


def budget_that_is_given_back() -> Iterator[MemoryBudget]:
    made = MemoryBudget(1 << 30, "a test")
    yield made
    release_rings()
    assert made.held_bytes == 0


def destinations(tensors: dict[str, torch.Tensor], index: int = 0) -> dict[str, DeviceTensor]:
    context = context_of(index)
    return {name: DeviceTensor(context, tensor) for name, tensor in tensors.items()}


def close(made: dict[str, DeviceTensor]) -> None:
    for tensor in made.values():
        tensor.buffer.close()


@pytest.mark.parametrize("mode", MODES)
def test_every_tensor_lands(
    driver: StandIn, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget, mode: str
) -> None:
    made = destinations(tensors)
    before = driver.counts().device_allocations
    told: list[tuple[int, int]] = []
    report = load_to_device(
        checkpoint, made, device_index=0, mode=mode, memory=memory, progress=lambda *now: told.append(now)
    )
    for name, tensor in tensors.items():
        assert same_bits(made[name].on_host(), tensor), name
    assert report.wanted_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert told[-1] == (report.wanted_bytes, report.wanted_bytes)
    assert report.ring_bytes == memory.held_bytes == live_pinned_bytes() > 0
    counts = driver.counts()
    assert counts.device_allocations == before, "nothing is allocated on the device"
    assert counts.unpinned_copies == 0
    close(made)


def test_small_tensors_travel_together(
    driver: StandIn, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget
) -> None:
    small = {name: tensor for name, tensor in tensors.items() if name.startswith("small")}
    made = destinations(small)
    load_to_device(checkpoint, made, device_index=0, memory=memory, mode="buffered")
    close(made)
    first = driver.counts()
    made = destinations(small)
    load_to_device(checkpoint, made, device_index=0, memory=memory, mode="buffered")
    assert all(same_bits(made[name].on_host(), tensor) for name, tensor in small.items())
    counts = driver.counts()
    assert counts.launches - first.launches <= 8, "400 tensors of two files"
    assert counts.copies - first.copies <= 8
    close(made)


def test_parts_and_strides(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget) -> None:
    context = context_of(0)
    part = DeviceTensor(context, torch.empty(100, 50))
    turned = DeviceTensor(context, torch.empty(4096, 64, dtype=torch.bfloat16).t())
    spaced = DeviceTensor(context, torch.empty(1500, 2000)[:, 500:1500])
    wants = [Want("large", part, ((200, 300), (10, 60))), Want("wide", turned), Want("large", spaced)]
    load_to_device(checkpoint, wants, device_index=0, memory=memory)
    assert same_bits(part.on_host(), tensors["large"][200:300, 10:60])
    assert same_bits(turned.on_host(), tensors["wide"])
    assert same_bits(spaced.on_host(), tensors["large"])
    close({"a": part, "b": turned, "c": spaced})


def test_the_ring_is_used_again(
    driver: StandIn, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget
) -> None:
    made = destinations(tensors)
    load_to_device(checkpoint, made, device_index=0, memory=memory)
    held, registered = memory.held_bytes, driver.counts().registrations
    for _ in range(3):
        load_to_device(checkpoint, {"large": made["large"]}, device_index=0, memory=memory)
    assert (memory.held_bytes, driver.counts().registrations) == (held, registered) == (held, 1)
    other = destinations({"large": tensors["large"]}, index=1)
    load_to_device(checkpoint, other, device_index=1, memory=memory)
    assert same_bits(other["large"].on_host(), tensors["large"])
    assert driver.counts().registrations == 2
    close(made | {"other": other["large"]})


def test_threads_take_turns(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget) -> None:
    made = [destinations(tensors) for _ in range(3)]
    threads = [
        threading.Thread(target=load_to_device, args=(checkpoint, one), kwargs={"device_index": 0, "memory": memory})
        for one in made
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in made:
        assert all(same_bits(one[name].on_host(), tensor) for name, tensor in tensors.items())
        close(one)


def test_copies_wait_for_the_stream_they_are_told(
    driver: StandIn, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget
) -> None:
    """What was given to that stream before, such as a fill of the same memory, does not overwrite what is loaded."""
    context = context_of(0)
    made = destinations({"large": tensors["large"]})
    other = destinations({"large": tensors["large"]})
    load_to_device(checkpoint, made, device_index=0, memory=memory)
    theirs = Stream(context)
    done = threading.Event()

    def load() -> None:
        load_to_device(checkpoint, made, device_index=0, after=theirs.address, memory=memory)
        done.set()

    with driver.holding():
        size, source = tensors["large"].nbytes, other["large"].data_ptr()
        for _ in range(20):
            copy_on_device(made["large"].data_ptr(), source, size, theirs)
        thread = threading.Thread(target=load)
        thread.start()
        assert not done.is_set()
    thread.join()
    theirs.synchronize()
    assert same_bits(made["large"].on_host(), tensors["large"])
    close(made)
    close(other)


def test_no_copy_goes_beyond_an_allocation(
    checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that follow each other in a file and in memory may lie in two allocations; a driver copies into one."""
    made = destinations({"large": tensors["large"]})
    begin, size = made["large"].data_ptr(), tensors["large"].nbytes
    seams = [begin, begin + 1, begin + 70_000, begin + 70_512, begin + 5_000_000, begin + size]

    def of_many(address: int) -> tuple[int, int]:
        first, end = next((first, end) for first, end in itertools.pairwise(seams) if first <= address < end)
        return first, end - first

    copied: list[tuple[int, int]] = []
    read = Reader.read

    def seen(self: Reader, rows: list[Row], **more: Any) -> LoadReport:
        copied.extend((row[5], row[5] + row[2]) for row in rows)
        return read(self, rows, **more)

    load_to_device(checkpoint, made, device_index=0, memory=memory)  # makes the ring
    monkeypatch.setattr(cuda_driver, "address_range", of_many)
    monkeypatch.setattr(Reader, "read", seen)
    load_to_device(checkpoint, made, device_index=0, memory=memory)
    assert copied == list(itertools.pairwise(seams))
    assert same_bits(made["large"].on_host(), tensors["large"])
    close(made)


def test_digests_are_made_on_the_way(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], driver: StandIn) -> None:
    made = destinations({"large": tensors["large"], "odd": tensors["odd"]})
    piece_bytes = 1 << 20
    with HostBuffer(2 * 2 * slot_bytes(piece_bytes)) as buffer:
        ring = DeviceRing(context_of(0), buffer, piece_bytes=piece_bytes, threads=2)
        rows = [row for name in made for row in parts_of(checkpoint, Want(name, made[name]), on="cuda")]
        with Reader(checkpoint.files) as reader:
            report = reader.read(rows, groups=array("q", [0, 1, 2]), device=ring)
        ring.close()
    assert report.digests == [xxh3_64(tensors[name].view(torch.uint8).numpy()) for name in made]
    close(made)


def test_memory_of_the_wrong_kind_is_refused(
    checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget
) -> None:
    with pytest.raises(DestinationMismatch, match="on cpu"):
        load_to_device(checkpoint, {"large": torch.empty(1500, 1000)}, device_index=0, memory=memory)
    elsewhere = destinations({"large": tensors["large"]}, index=1)
    with pytest.raises(DestinationMismatch, match="memory of device 1, not memory of device 0"):
        load_to_device(checkpoint, elsewhere, device_index=0, memory=memory)
    elsewhere["large"].buffer.close()
    liar = destinations({"large": tensors["large"]})
    real = liar["large"].buffer
    liar["large"].data_ptr = lambda: real.address + 4096  # type: ignore[method-assign]
    with pytest.raises(DestinationMismatch, match="no device memory"):
        load_to_device(checkpoint, liar, device_index=0, memory=memory)
    real.close()


@pytest.mark.parametrize(
    ("function", "status", "later"),
    [("cuMemcpyHtoDAsync_v2", 1, False), ("cuLaunchKernel", 719, False), ("cuEventRecord", 719, False),
     ("cuStreamSynchronize", 700, False), ("cuEventSynchronize", 700, False), ("copy", 700, True),
     ("launch", 719, True)],
)  # fmt: skip
def test_a_failure_has_its_name_and_ends_all(
    driver: StandIn,
    checkpoint: Checkpoint,
    tensors: dict[str, torch.Tensor],
    memory: MemoryBudget,
    function: str,
    status: int,
    later: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_ring, "_piece_bytes", lambda *_: 1 << 18)  # so that slots are used again
    made = destinations(tensors)
    load_to_device(checkpoint, made, device_index=0, memory=memory)  # the ring is made
    (driver.fail_later if later else driver.fail)(function, status)
    expected = {"copy": "cu.* failed with CUDA_ERROR_ILLEGAL", "launch": "cu.* failed with CUDA_ERROR_LAUNCH"}
    with pytest.raises(CudaError, match=expected.get(function, function.removesuffix("_v2"))) as caught:
        load_to_device(checkpoint, made, device_index=0, memory=memory, mode="buffered", after=None)
    assert caught.value.status == status
    driver.reset()
    load_to_device(checkpoint, made, device_index=0, memory=memory)
    assert all(same_bits(made[name].on_host(), tensor) for name, tensor in tensors.items())
    close(made)


def test_a_flipped_bit_of_a_copy_is_there_to_be_seen(
    driver: StandIn, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget
) -> None:
    """That the stand-in's bus can err, for the digests' tests."""
    made = destinations({"large": tensors["large"]})
    load_to_device(checkpoint, made, device_index=0, memory=memory)
    driver.flip()
    load_to_device(checkpoint, made, device_index=0, memory=memory)
    assert not same_bits(made["large"].on_host(), tensors["large"])
    close(made)


def test_a_ring_is_tried_before_it_is_used_and_stays_refused(
    driver: StandIn, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget
) -> None:
    made = destinations(tensors)
    driver.flip(after=12)  # the copies that measure the bus come first
    for _ in range(2):
        with pytest.raises(CudaError, match="device 0: known bytes came out of its ring changed"):
            load_to_device(checkpoint, made, device_index=0, memory=memory)
        assert memory.held_bytes == live_pinned_bytes() == 0
    release_rings()
    driver.fail_later("launch", 719)  # the kernel for small runs
    with pytest.raises(CudaError, match="LAUNCH_FAILED"):
        load_to_device(checkpoint, made, device_index=0, memory=memory)
    driver.reset()
    with pytest.raises(CudaError, match="LAUNCH_FAILED"):
        load_to_device(checkpoint, made, device_index=0, memory=memory)
    release_rings()
    load_to_device(checkpoint, made, device_index=0, memory=memory)
    assert all(same_bits(made[name].on_host(), tensor) for name, tensor in tensors.items())
    close(made)


def test_a_file_that_is_cut_short(tmp_path: Path, tensors: dict[str, torch.Tensor], memory: MemoryBudget) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"large": tensors["large"]}, file)
    checkpoint = open_checkpoint([file])
    made = destinations({"large": tensors["large"]})
    os.truncate(file, file.stat().st_size - 5000)
    with pytest.raises(TruncatedRead):
        load_to_device(checkpoint, made, device_index=0, memory=memory, mode="buffered")
    close(made)


def test_progress_may_end_it(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget) -> None:
    made = destinations(tensors)

    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        load_to_device(checkpoint, made, device_index=0, memory=memory, progress=stop)
    load_to_device(checkpoint, made, device_index=0, memory=memory)
    close(made)


def test_a_small_ceiling_makes_a_small_ring(
    checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], driver: StandIn
) -> None:
    made = destinations(tensors)
    tight = MemoryBudget(3 << 20, "a test")
    load_to_device(checkpoint, made, device_index=0, memory=tight)
    assert 0 < tight.held_bytes <= 3 << 20
    assert all(same_bits(made[name].on_host(), tensor) for name, tensor in tensors.items())
    release_rings()
    assert tight.held_bytes == 0
    with pytest.raises(HostMemoryLimit, match="the ring between storage and device 0"):
        load_to_device(checkpoint, made, device_index=0, memory=MemoryBudget(1 << 20, "a test"))
    close(made)


def test_without_pinned_memory_it_works_and_says_so(
    driver: StandIn,
    checkpoint: Checkpoint,
    memory: MemoryBudget,
    tensors: dict[str, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = destinations(tensors)
    driver.fail("cuMemHostRegister_v2", 2)
    with caplog.at_level(logging.WARNING):
        load_to_device(checkpoint, made, device_index=0, memory=memory)
    assert "memory that is not pinned" in caplog.text
    assert "RLIMIT_MEMLOCK" in caplog.text
    assert all(same_bits(made[name].on_host(), tensor) for name, tensor in tensors.items())
    assert driver.counts().unpinned_copies > 0
    close(made)


@pytest.mark.parametrize(("latency", "gigabytes", "expected"), [(1e-5, 50, 4), (1e-5, 400, 16), (1e-6, 1, 1)])
def test_pieces_follow_the_bus(
    monkeypatch: pytest.MonkeyPatch, driver: StandIn, latency: float, gigabytes: float, expected: int
) -> None:
    monkeypatch.setattr(device_ring, "_seconds", lambda _to, _from, size, _stream: latency + size / gigabytes / 1e9)
    target = DeviceBuffer(context_of(0), 8 << 20)
    assert device_ring._piece_bytes(context_of(0), (target.address, 8 << 20), None) == expected << 20
    target.close()


def test_wrong_rings_are_refused(driver: StandIn, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    context = context_of(0)
    with HostBuffer(1 << 20) as buffer:
        for size, threads, slots in ((1 << 20, 1, 1), (4096, 0, 1), (4096, 65, 1), (4096, 1, 5), (1024, 1, 1)):
            with pytest.raises(ValueError, match=r"slots|threads"):
                DeviceRing(context, buffer, piece_bytes=size, threads=threads, slots=slots)
        ring = DeviceRing(context, buffer, piece_bytes=4096, threads=1)
        made = destinations({"odd": tensors["odd"]})
        rows = merged(parts_of(checkpoint, Want("odd", made["odd"]), on="cuda"))
        ring.close()
        ring.close()
        with Reader(checkpoint.files) as reader, pytest.raises(CudaError, match="closed"):
            reader.read(rows, device=ring)
        close(made)


def test_memory_near_a_device(tmp_path: Path) -> None:
    place = tmp_path / "sys/bus/pci/devices/0000:1b:00.0"
    place.mkdir(parents=True)
    (place / "numa_node").write_text("1\n")
    assert node_of("0000:1B:00.0", tmp_path) == 1
    (place / "numa_node").write_text("-1\n")
    assert node_of("0000:1b:00.0", tmp_path) is None
    assert node_of("0000:ff:00.0", tmp_path) is None
    with HostBuffer(1 << 20, huge_pages=False) as buffer:
        assert not prefer_node(buffer.address, 1 << 20, 1023)  # no machine has so many
        assert not prefer_node(buffer.address, 1 << 20, 5000)
        if Path("/sys/devices/system/node/node0").is_dir() and prefer_node(buffer.address, 1 << 20, 0):
            memoryview(buffer)[:] = bytes(1 << 20)


def test_rings_end_with_the_process(loaded: StandIn, checkpoint: Checkpoint) -> None:
    code = f"""
import torch
from pathlib import Path
from mxcore.cuda import driver as cuda_driver
from mxcore.cuda.context import context_of
from mxcore.storage.checkpoint import open_checkpoint
from mxcore.cuda.memory import DeviceBuffer
from mxcore.storage.load.device_load import read_rows_to_device
cuda_driver._load_stand_in({str(loaded.path)!r})
checkpoint = open_checkpoint({[str(file) for file in checkpoint.files]!r})
info = checkpoint["large"]
buffer = DeviceBuffer(context_of(0), info.size_bytes)
rows = [(info.file, info.offset, info.size_bytes, 0, 1, buffer.address, 0)]
read_rows_to_device(checkpoint, rows, device_index=0)
buffer.close()
"""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr
