"""GPUDirect Storage on the stand-in: proven first, every byte right, and whatever goes wrong the ring reads."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mxbench.gpu import measure, sections
from mxcore.cuda import DeviceBuffer, DeviceDigest, Stream, context_of, copy_on_device
from mxcore.engine import lazy_weights
from mxcore.engine.lazy_tensors import LazyTensor
from mxcore.errors import DestinationMismatch, TruncatedRead
from mxcore.reading import cufile
from mxcore.storage.checkpoint import Checkpoint, open_checkpoint
from mxcore.storage.load import Reader, cufile_trial, device_direct, read_rows_to_device
from mxcore.storage.load import host_load as load
from mxcore.storage.load.device_ring import ring_of
from mxcore.storage.plan import MemoryBudget, Row, Want
from tests.cuda.device_tensor import DeviceTensor, load_to_device, same_bits
from tests.cuda.stand_in import ROOT, StandIn
from tests.cuda.storage.test_cufile import on_device
from tests.cuda.storage.test_device_load import budget_that_is_given_back, close, destinations, in_two_files

MIB = 1 << 20


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {
        "large": torch.randn(2000, 1027),
        "odd": torch.randint(0, 255, (3 * MIB + 1,), dtype=torch.uint8),
        "wide": torch.randn(128, 8192).bfloat16(),
        "short": torch.randn(300, 7),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }


@pytest.fixture(scope="module")
def checkpoint(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return in_two_files(tensors, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def memory(gpudirect: StandIn) -> Iterator[MemoryBudget]:
    yield from budget_that_is_given_back()


def loaded_right(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget, **more: object) -> int:
    """Loads all, looks at every bit; the bytes that came by cuFile."""
    made = destinations(tensors)
    report = load_to_device(checkpoint, made, device_index=0, memory=memory, **{"mode": "direct", **more})  # type: ignore[arg-type]
    for name, tensor in tensors.items():
        assert same_bits(made[name].on_host(), tensor), name
    assert sum(report.bytes_by_way.values()) == report.wanted_bytes == sum(tensor.nbytes for tensor in tensors.values())
    close(made)
    assert not cufile.driver_is_open()
    return report.bytes_by_way.get(load.STRAIGHT, 0)


def test_long_runs_come_straight_and_the_rest_through_the_ring(
    gpudirect: StandIn,
    checkpoint: Checkpoint,
    tensors: dict[str, torch.Tensor],
    memory: MemoryBudget,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    long_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if name in ("large", "odd", "wide"))
    straight = loaded_right(checkpoint, tensors, memory)
    assert long_bytes - 6 * cufile.LEAST_BYTES < straight < long_bytes, "but for edges, and short ends of pieces"
    assert straight % cufile.BLOCK_BYTES == 0
    assert "known bytes came right" in caplog.text
    before = gpudirect.counts()
    assert loaded_right(checkpoint, tensors, memory) == straight
    assert gpudirect.counts().cufile_reads > before.cufile_reads
    assert gpudirect.counts().unpinned_copies == 0
    assert caplog.text.count("known bytes came right") == 1, "one file system, one device, one proof"


def test_what_the_page_cache_has_comes_from_there(
    gpudirect: StandIn, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget
) -> None:
    for file in checkpoint.files:
        file.read_bytes()
    assert loaded_right(checkpoint, tensors, memory, mode="auto") == 0
    assert loaded_right(checkpoint, tensors, memory, mode="buffered") == 0
    assert gpudirect.counts().cufile_reads == 0


def test_a_second_device(
    gpudirect: StandIn, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget
) -> None:
    for index in (0, 1):
        made = destinations(tensors, index)
        before = gpudirect.counts().device_allocations
        report = load_to_device(checkpoint, made, device_index=index, memory=memory, mode="direct")
        assert report.bytes_by_way[load.STRAIGHT] > 0
        assert gpudirect.counts().device_allocations == before
        for name, tensor in tensors.items():
            assert same_bits(made[name].on_host(), tensor), name
        close(made)


def test_a_reader_reads_straight_to_one_device(
    gpudirect: StandIn, checkpoint: Checkpoint, memory: MemoryBudget
) -> None:
    info = checkpoint["large"]
    buffers = [DeviceBuffer(context_of(index), info.size_bytes) for index in (0, 1)]
    with Reader(checkpoint.files, mode="direct", memory=memory) as reader:
        ways = []
        for index in (0, 1, 0):
            row: Row = (info.file, info.offset, info.size_bytes, 0, 1, buffers[index].address, 0)
            with ring_of(index, (row[5], row[2]), None, memory) as ring:
                ways.append(load.STRAIGHT in reader.read([row], device=ring).bytes_by_way)
    assert ways == [True, False, True]
    assert on_device(buffers[0]) == on_device(buffers[1])
    for buffer in buffers:
        buffer.close()


@pytest.mark.parametrize("seed", range(6))
def test_any_ranges(gpudirect: StandIn, memory: MemoryBudget, tmp_path: Path, seed: int) -> None:
    """Runs of any place, length and alignment, one or several at a distance, against what the file has."""
    drawn = random.Random(seed)
    data = drawn.randbytes(6 * MIB + drawn.randrange(4096))
    (tmp_path / "f").write_bytes(data)
    room = 24 * MIB
    buffer = DeviceBuffer(context_of(0), room)
    expected, rows, at = bytearray(b"\xa5" * room), list[Row](), 0
    while True:
        size = drawn.choice([drawn.randrange(1, 9000), drawn.randrange(cufile.LEAST_BYTES, 2 * MIB)])
        count = drawn.choice([1, 1, 2, 3])
        stride, to_stride = size + drawn.randrange(5000), size + drawn.randrange(5000)
        offset = drawn.randrange(len(data))
        at += drawn.choice([0, drawn.randrange(5000)])
        if at + count * to_stride > room:
            break
        if offset + (count - 1) * stride + size > len(data):
            continue
        rows.append((0, offset, size, stride, count, buffer.address + at, to_stride))
        for run in range(count):
            begin, to = offset + run * stride, at + run * to_stride
            expected[to : to + size] = data[begin : begin + size]
        at += count * to_stride
    ring_target = (buffer.address, room)
    with (
        Reader([tmp_path / "f"], mode="direct", memory=memory) as reader,
        ring_of(0, ring_target, None, memory) as ring,
    ):
        buffer_fill(buffer)
        report = reader.read(sorted(rows), device=ring)
    assert report.bytes_by_way[load.STRAIGHT] > 0
    assert on_device(buffer) == bytes(expected)
    buffer.close()


def buffer_fill(buffer: DeviceBuffer) -> None:
    """As fresh: the ring's making and its proof wrote there."""
    ctypes.memset(buffer.address, 0xA5, buffer.size_bytes)


FAULTS = {
    "EIO": ("cuFileRead", errno.EIO, False),
    "driver": ("cuFileRead", 5010, False),
    "short": ("cufile-short", 4096, True),
    "nothing": ("cufile-short", -5, True),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("after", [0, 2])
def test_a_read_that_fails_in_a_load_is_read_again_by_the_ring(
    gpudirect: StandIn,
    checkpoint: Checkpoint,
    tensors: dict[str, torch.Tensor],
    memory: MemoryBudget,
    caplog: pytest.LogCaptureFixture,
    fault: str,
    after: int,
) -> None:
    loaded_right(checkpoint, tensors, memory)
    what, status, later = FAULTS[fault]
    (gpudirect.fail_later if later else gpudirect.fail)(what, status, after=after)
    told: list[tuple[int, int]] = []
    loaded_right(checkpoint, tensors, memory, progress=lambda *now: told.append(now))
    assert told[-1][0] == told[-1][1]
    assert "what is left comes through pinned memory" in caplog.text
    assert loaded_right(checkpoint, tensors, memory) == 0, "and it is not used again"


@pytest.mark.parametrize("fault", ["cufile-wrong", "cufile-beyond", "cufile-short"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_way_that_does_not_prove_itself_is_never_used(
    gpudirect: StandIn,
    checkpoint: Checkpoint,
    tensors: dict[str, torch.Tensor],
    memory: MemoryBudget,
    caplog: pytest.LogCaptureFixture,
    fault: str,
    after: int,
) -> None:
    caplog.set_level(logging.INFO)
    gpudirect.fail_later(fault, 4096, after=after)
    for _ in range(2):
        assert loaded_right(checkpoint, tensors, memory) == 0
    assert gpudirect.counts().cufile_reads == after + 1
    assert caplog.text.count("GPUDirect Storage is not used from") == 1
    assert "known bytes" in caplog.text or "gave 4096" in caplog.text


NOES = {
    "the setting": "",
    "the module": "nvidia-fs is not loaded",
    "the nodes": "in a container",
    "a trial": "cuFile ends the process",
    "cuFileDriverOpen": "CU_FILE_INTERNAL_ERROR",
    "cuFileHandleRegister": "CU_FILE_INTERNAL_ERROR",
    "cufile-host": "compatibility mode",
}


@pytest.mark.parametrize("no", NOES)
def test_every_no_is_one_line_and_the_ring(
    gpudirect: StandIn,
    checkpoint: Checkpoint,
    tensors: dict[str, torch.Tensor],
    memory: MemoryBudget,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    no: str,
) -> None:
    caplog.set_level(logging.INFO)
    if no == "the setting":
        monkeypatch.setenv("MX_GPUDIRECT_STORAGE", "off")
    elif no == "the module":
        monkeypatch.setattr(device_direct, "ROOT", device_direct.ROOT / "nothing")
    elif no == "the nodes":
        (device_direct.ROOT / "dev/nvidia-fs0").unlink()
    elif no == "a trial":
        monkeypatch.setattr(device_direct, "trial", lambda file: "cuFile ends the process that opens it (-6)")
    else:
        (gpudirect.fail_later if no == "cufile-host" else gpudirect.fail)(no, 5030)
    assert loaded_right(checkpoint, tensors, memory) == loaded_right(checkpoint, tensors, memory) == 0
    lines = [record.getMessage() for record in caplog.records if "GPUDirect" in record.getMessage()]
    assert len(lines) == (1 if NOES[no] else 0)
    assert NOES[no] in "".join(lines)
    assert gpudirect.counts().cufile_reads == 0


def test_a_file_that_is_not_taken_ends_it_for_its_file_system(
    gpudirect: StandIn,
    checkpoint: Checkpoint,
    tensors: dict[str, torch.Tensor],
    memory: MemoryBudget,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    gpudirect.fail("cuFileHandleRegister", 5008, after=1)
    assert 0 < loaded_right(checkpoint, tensors, memory) < 9 * MIB, "the first file alone"
    assert "not for this file system" in caplog.text
    assert loaded_right(checkpoint, tensors, memory) == 0


def test_a_setting_is_read_and_a_wrong_one_told(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    assert device_direct.chosen(None, {"MX_GPUDIRECT_STORAGE": " OFF "}) == "off"
    assert device_direct.chosen("auto", {"MX_GPUDIRECT_STORAGE": "off"}) == "auto"
    assert device_direct.chosen(None, {"MX_GPUDIRECT_STORAGE": "perhaps"}) == "auto"
    assert "MX_GPUDIRECT_STORAGE='perhaps' is refused" in caplog.text
    with pytest.raises(ValueError, match="one of auto, off"):
        Reader(checkpoint.files, gpudirect_storage="on")


def test_it_comes_after_what_a_stream_was_given(
    gpudirect: StandIn, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget
) -> None:
    """cuFile knows no streams; the stand-in complains of a read into memory that one is still going to write."""
    context = context_of(0)
    made, other = destinations({"large": tensors["large"]}), destinations({"large": tensors["large"]})
    theirs, done = Stream(context), threading.Event()

    def run() -> None:
        load_to_device(checkpoint, made, device_index=0, after=theirs.address, memory=memory, mode="direct")
        done.set()

    for _ in range(2):  # with its proof, and without
        with gpudirect.holding():
            for _ in range(20):
                size, source = tensors["large"].nbytes, other["large"].data_ptr()
                copy_on_device(made["large"].data_ptr(), source, size, theirs)
            thread = threading.Thread(target=run)
            thread.start()
            assert not done.is_set()
        thread.join()
        theirs.synchronize()
        assert same_bits(made["large"].on_host(), tensors["large"])
        done.clear()
    assert gpudirect.counts().cufile_reads > 2
    close(made)
    close(other)


def test_a_file_that_is_cut_meanwhile_is_told_as_such(
    gpudirect: StandIn, tensors: dict[str, torch.Tensor], memory: MemoryBudget, tmp_path: Path
) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"large": tensors["large"]}, path)
    checkpoint = open_checkpoint([path])
    made = destinations({"large": tensors["large"]})
    read_rows_to_device(checkpoint, rows_of(checkpoint, made["large"]), device_index=0, memory=memory, mode="direct")
    raised: list[BaseException] = []

    def run() -> None:
        try:
            load_to_device(checkpoint, made, device_index=0, after=None, memory=memory, mode="direct")
        except TruncatedRead as error:
            raised.append(error)

    before = gpudirect.counts().cufile_handles
    with gpudirect.holding():
        thread = threading.Thread(target=run)
        thread.start()
        while thread.is_alive() and gpudirect.counts().cufile_handles == before:
            time.sleep(0.001)  # until the file is registered: a read is about to begin, or waits already
        os.truncate(path, 5 * 4096)
    thread.join()
    assert len(raised) == 1
    assert not cufile.driver_is_open()
    close(made)


def rows_of(checkpoint: Checkpoint, to: DeviceTensor) -> list[Row]:
    info = checkpoint["large"]
    return [(info.file, info.offset, info.size_bytes, 0, 1, to.data_ptr(), 0)]


def test_a_load_that_is_ended_leaves_nothing_under_way(
    gpudirect: StandIn, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget
) -> None:
    made = destinations({"large": tensors["large"]})

    def stop(done_bytes: int, total_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_to_device(checkpoint, made, device_index=0, memory=memory, mode="direct", progress=stop)
    with pytest.raises(DestinationMismatch):
        load_to_device(checkpoint, {"large": torch.empty(3)}, device_index=0, memory=memory, mode="direct")
    assert not cufile.driver_is_open()
    close(made)


def test_what_vllm_copies_comes_straight(
    gpudirect: StandIn,
    checkpoint: Checkpoint,
    tensors: dict[str, torch.Tensor],
    memory: MemoryBudget,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    class TorchStream:
        cuda_stream = 0

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: TorchStream)
    for choice in ("auto", "off"):
        before = gpudirect.counts().cufile_reads
        for name, tensor in lazy_weights(checkpoint, mode="direct", gpudirect_storage=choice):
            if isinstance(tensor, LazyTensor):
                half = tensors[name].shape[0] // 2
                parameter = DeviceTensor(context_of(0), torch.empty(tensors[name][half:].shape, dtype=tensor.dtype))
                tensor.narrow(0, half, len(tensors[name]) - half).copy_into(parameter)
                assert same_bits(parameter.on_host(), tensors[name][half:]), name
                parameter.buffer.close()
        assert (gpudirect.counts().cufile_reads > before) is (choice == "auto")
        assert ("bytes came by GPUDirect Storage, of" in caplog.text) is (choice == "auto")
        caplog.clear()
    assert not cufile.driver_is_open()


def trial_of(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_it_is_tried_in_a_process_of_its_own(
    loaded_cufile: StandIn, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    file = str(checkpoint.files[0])
    opens = f"""
import sys
from mxbench.gpu import measure, sections
from mxcore.reading import cufile
from mxcore.storage.load.cufile_trial import attempt
cufile._load_stand_in({str(loaded_cufile.path)!r})
print("libcufile says something")
print(attempt(sys.argv[1:]))
"""
    answers = {
        opens: "",
        "import os; os.abort()": "cuFile ends the process that opens it (-6)",
        "print('CU_FILE_DRIVER_NOT_INITIALIZED')": "CU_FILE_DRIVER_NOT_INITIALIZED",
        "pass": "cuFile ends the process that opens it (0)",
    }
    for code, answer in answers.items():
        monkeypatch.setattr(cufile_trial, "_command", lambda library, file, code=code: [*trial_of(code), file])
        assert cufile_trial.trial(file) == answer
    monkeypatch.setattr(cufile_trial, "_command", lambda library, file: [*trial_of(opens), str(tmp_path)])
    assert "is no regular file" in cufile_trial.trial(file)
    monkeypatch.setattr(cufile_trial, "_SECONDS", 0.2)
    monkeypatch.setattr(cufile_trial, "_command", lambda library, file: trial_of("import time; time.sleep(60)"))
    assert cufile_trial.trial(file) == "cuFile does not open within 0.2 s"


def test_the_process_refuses_the_stand_in(
    loaded_cufile: StandIn, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert "stand-in, not libcufile" in cufile_trial.trial(str(checkpoint.files[0]))


def test_a_box_of_rows(
    gpudirect: StandIn, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], memory: MemoryBudget
) -> None:
    part = DeviceTensor(context_of(0), torch.empty(700, 1027))
    report = load_to_device(
        checkpoint, [Want("large", part, ((600, 1300), (0, 1027)))], device_index=0, memory=memory, mode="direct"
    )
    assert report.bytes_by_way[load.STRAIGHT] > 2 * MIB
    assert same_bits(part.on_host(), tensors["large"][600:1300])
    part.buffer.close()


def test_the_bench_measures_it(gpudirect: StandIn, checkpoint: Checkpoint, memory: MemoryBudget) -> None:
    target = DeviceBuffer(context_of(0), measure.arena_rows(checkpoint, 0)[2])
    found = measure.gpudirect(checkpoint, target, 1)
    assert 0.8 < found["share"] < 1
    assert sections.figures({"gpudirect": found})["gpudirect_vs_ring"] > 0
    digester = DeviceDigest(target.context)
    measure.check(checkpoint, digester, target)
    digester.close()
    device_direct.forget_verdicts()
    (device_direct.ROOT / "dev/nvidia-fs0").unlink()
    with pytest.raises(ValueError, match=r"is not used: nvidia-fs is loaded, but its /dev/nvidia-fs\* are not here"):
        measure.gpudirect(checkpoint, target, 1)
    target.close()
