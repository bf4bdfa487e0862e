"""Tensors and boxes of them into memory that exists, in every way, with safetensors as the oracle."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from mxcore.engine import lazy_weights
from mxcore.errors import CheckpointError, DestinationMismatch, HostMemoryLimit, StorageError, TruncatedRead
from mxcore.reading import read_ranges
from mxcore.storage.checkpoint import Checkpoint, open_checkpoint
from mxcore.storage.load import Reader, load, stream
from mxcore.storage.load.tensor_stream import load_file
from mxcore.storage.plan import MemoryBudget, Want, merged, parts_of
from tests.core.safetensors.headers import entry, file_of
from tests.storage.conftest import MODES, Maker, Tensors, same


@pytest.mark.parametrize("mode", MODES)
def test_all_tensors_in_every_way(checkpoint: Checkpoint, tensors: Tensors, mode: str) -> None:
    there = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    report = load(checkpoint, there, mode=mode)
    assert all(same(there[name], tensor) for name, tensor in tensors.items())
    assert report.wanted_bytes == checkpoint.total_bytes == sum(report.bytes_by_way.values())
    assert report.read_bytes >= report.wanted_bytes
    assert report.gigabytes_per_second > 0
    if mode != "auto":
        assert set(report.bytes_by_way) == {mode}


@pytest.mark.parametrize("mode", MODES)
def test_numpy_and_strided_destinations(checkpoint: Checkpoint, tensors: Tensors, mode: str) -> None:
    large, cube = tensors["large"], tensors["cube"]
    array = np.zeros((3000, 1000), np.float32)
    turned = torch.zeros(1000, 3000).t()
    every_second = torch.zeros(7, 5, 22)[:, :, ::2]
    padded = torch.zeros(7, 8, 11)[:, 1:6]
    wants = [Want("large", array), Want("large", turned), Want("cube", every_second), Want("cube", padded)]
    load(checkpoint, wants, mode=mode)
    assert (array == large.numpy()).all()
    assert same(turned, large)
    assert same(every_second, cube)
    assert same(padded, cube)
    assert every_second._base is not None
    assert not every_second._base[:, :, 1::2].any()


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_reads_only_its_part(checkpoint: Checkpoint, tensors: Tensors, mode: str) -> None:
    rows, columns = torch.zeros(1500, 1000), torch.zeros(3000, 250)
    by_rows = load(checkpoint, [Want("large", rows, ((1500, 3000), (0, 1000)))], mode=mode)
    by_columns = load(checkpoint, [Want("large", columns, ((0, 3000), (250, 500)))], mode=mode)
    assert same(rows, tensors["large"][1500:])
    assert same(columns, tensors["large"][:, 250:500])
    assert by_rows.wanted_bytes == 2 * by_columns.wanted_bytes == 6_000_000
    assert by_rows.read_bytes <= by_rows.wanted_bytes + 2 * 4096 * 2
    if mode in ("buffered", "mapped"):
        assert by_columns.read_bytes == by_columns.wanted_bytes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), mode=st.sampled_from(MODES))
def test_any_box_is_safetensors_slice(checkpoint: Checkpoint, data: st.DataObject, mode: str) -> None:
    name = data.draw(st.sampled_from(["bf16", "cube", "large", "fp8", "int64", "empty"]))
    info = checkpoint[name]
    box = tuple(tuple(sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in info.shape)
    with safe_open(checkpoint.files[info.file], "pt") as opened:
        oracle = opened.get_tensor(name)[tuple(slice(*pair) for pair in box)]
    order = data.draw(st.permutations(range(len(info.shape))))
    there = torch.zeros([oracle.shape[d] for d in order], dtype=oracle.dtype).permute(
        [order.index(d) for d in range(len(order))]
    )
    load(checkpoint, [Want(name, there, box)], mode=mode)
    assert same(there, oracle)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float64]),
    mode=st.sampled_from(MODES),
    shift=st.integers(0, 9),
)
def test_any_file_is_what_safetensors_reads(
    tmp_path: Path, shapes: list[list[int]], dtype: torch.dtype, mode: str, shift: int
) -> None:
    file = tmp_path / "any.safetensors"
    written = {f"t{i}": torch.randint(0, 99, shape).to(dtype) for i, shape in enumerate(shapes)}
    save_file(written, file, metadata={"pad": "x" * shift})
    there = {name: torch.zeros_like(tensor) for name, tensor in written.items()}
    load(open_checkpoint(file), there, mode=mode)
    with safe_open(file, "pt") as opened:
        assert all(same(there[name], opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118


@pytest.mark.parametrize("mode", MODES)
def test_sub_byte_types_are_bytes(tmp_path: Path, mode: str) -> None:
    data = bytes(range(32))
    file = tmp_path / "f4.safetensors"
    header = {"q": entry("F4", [4, 8], 0, 16), "r": entry("F6_E2M3", [4, 4], 16, 28), "u": entry("U8", [4], 28, 32)}
    file.write_bytes(file_of(header, data))
    q, part, raw = (torch.zeros(shape, dtype=torch.uint8) for shape in ((4, 4), (2, 2), (4, 4)))
    r = torch.zeros(12, dtype=torch.uint8)
    pairs = q.view(torch.float4_e2m1fn_x2)
    wants = [Want("q", pairs), Want("q", part, ((2, 4), (1, 3))), Want("q", raw), Want("r", r)]
    load(open_checkpoint(file), wants, mode=mode)
    assert bytes(q.flatten()) == bytes(raw.flatten()) == data[:16]
    assert bytes(part.flatten()) == data[9:11] + data[13:15]
    assert bytes(r) == data[16:28]
    for wrong in (((0, 4), (1, 4)), ((0, 4), (0, 2))):
        with pytest.raises(DestinationMismatch, match=r"begin and end at bytes|in a stretch"):
            load(open_checkpoint(file), [Want("r", torch.zeros(9, dtype=torch.uint8), wrong)], mode=mode)


def test_pairs_of_f4_and_null_metadata_come_as_safetensors_gives_them(tmp_path: Path) -> None:
    """Small and lazy tensors, in both dimensions; `"__metadata__": null` is what MLX writes (safetensors#823)."""
    data = bytes(range(32))
    file = tmp_path / "f4.safetensors"
    file.write_bytes(file_of({"__metadata__": None, "w": entry("F4", [4, 16], 0, 32)}, data))
    with safe_open(file, "pt") as opened:
        theirs = opened.get_tensor("w").view(torch.uint8)
    (_, streamed), (_, lazy) = next(stream(open_checkpoint(file))), next(lazy_weights(open_checkpoint(file)))
    whole = next(lazy_weights(open_checkpoint(file), lazy_least_bytes=1))[1]
    part = torch.empty(2, 4, dtype=torch.float4_e2m1fn_x2)
    part.copy_(whole[2:, 4:])
    for ours in (streamed, lazy, load_file(file)["w"]):
        assert (ours.dtype, ours.shape) == (torch.float4_e2m1fn_x2, theirs.shape)
        assert torch.equal(ours.view(torch.uint8), theirs)
    assert torch.equal(part.view(torch.uint8), theirs[2:, 4:])
    file.write_bytes(file_of({"w": entry("F4", [2, 5], 0, 5)}, data[:5]))
    with pytest.raises(CheckpointError, match=r"'w' is F4 \[2, 5\]"):
        open_checkpoint(file)


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2"])
def test_a_type_that_torch_does_not_have_is_refused_by_name(tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "f6.safetensors"
    file.write_bytes(file_of({"w": entry(dtype, [4, 4], 0, 12)}, bytes(12)))
    for read in (stream, lazy_weights, lambda _: load_file(file)):
        with pytest.raises(CheckpointError, match=f"'w' is {dtype}"):
            list(read(open_checkpoint(file)))


def test_one_byte_types_may_go_to_bytes(checkpoint: Checkpoint, tensors: Tensors) -> None:
    raw = torch.zeros(64, 65, dtype=torch.uint8)
    load(checkpoint, {"fp8": raw})
    assert same(raw, tensors["fp8"].view(torch.uint8))


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (torch.zeros(7, 5, 12), "destination"),
        (torch.zeros(7, 5, 11, dtype=torch.float64), "F64"),
        (torch.zeros(1).expand(7, 5, 11), "overlaps itself"),
        (torch.zeros(7, 5, 11, device="meta"), "meta"),
        (np.broadcast_to(np.zeros((), np.float32), (7, 5, 11)), "read-only"),
        (np.zeros((7, 5, 11), ">f4"), "destination"),
        (bytearray(7 * 5 * 11 * 4), "torch or numpy"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint: Checkpoint, to: Any, message: str) -> None:
    with pytest.raises(DestinationMismatch, match=message):
        load(checkpoint, {"cube": to})


def test_wrong_names_and_boxes_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(KeyError):
        load(checkpoint, {"nobody": torch.zeros(1)})
    for box in (((0, 8), (0, 5), (0, 11)), ((0, 7), (0, 5)), ((3, 2), (0, 5), (0, 11)), ((-1, 7), (0, 5), (0, 11))):
        with pytest.raises(IndexError):
            load(checkpoint, [Want("cube", torch.zeros(7, 5, 11), box)])
    with pytest.raises(ValueError, match="mode is 'fast'"):
        load(checkpoint, {}, mode="fast")


def test_nothing_wanted_is_nothing_read(checkpoint: Checkpoint) -> None:
    assert load(checkpoint, {}).read_bytes == 0
    assert load(checkpoint, {"empty": torch.zeros(0, 4)}).read_bytes == 0


def test_ranges_are_sorted_and_merged(made: Maker) -> None:
    whole = torch.zeros(300)
    checkpoint = made({f"t{i}": torch.full((100,), float(i)) for i in range(3)})
    wants = [Want(f"t{i}", whole[100 * i : 100 * i + 100]) for i in (2, 0, 1)]
    rows = [row for want in wants for row in parts_of(checkpoint, want)]
    assert len(merged(rows)) == 1
    assert merged(rows)[0][2] == 1200
    load(checkpoint, wants, keep_order=True)
    assert whole.tolist() == [0.0] * 100 + [1.0] * 100 + [2.0] * 100


def test_progress_ends_at_the_total(checkpoint: Checkpoint, tensors: Tensors) -> None:
    told: list[tuple[int, int]] = []
    load(checkpoint, {"large": torch.zeros(3000, 1000)}, progress=lambda *now: told.append(now))
    assert told[-1] == (12_000_000, 12_000_000)


@pytest.mark.parametrize("mode", ["direct", "uring"])
def test_the_ring_stays_below_the_ceiling(checkpoint: Checkpoint, tensors: Tensors, mode: str) -> None:
    there = torch.zeros(3000, 1000)
    small = MemoryBudget(4 << 20, "a test")
    report = load(checkpoint, {"large": there}, mode=mode, memory=small)
    assert same(there, tensors["large"])
    assert 0 < report.ring_bytes <= 4 << 20
    assert small.held_bytes == 0
    with pytest.raises(HostMemoryLimit, match="MX_HOST_MEMORY_LIMIT"):
        load(checkpoint, {"large": there}, mode=mode, memory=MemoryBudget(1000, "a test"))


def resident(file: Path) -> int:
    """Pages of a file in the page cache, by mincore: a read that does not wait starts reading ahead (Linux 6)."""
    size_bytes = file.stat().st_size
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        found = (ctypes.c_ubyte * -(-size_bytes // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        assert mincore(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), found) == 0
        return sum(page & 1 for page in found)


def test_the_cache_is_left_clean_on_request(made: Maker) -> None:
    checkpoint = made({"x": torch.randn(1000, 1000)})
    descriptor = os.open(checkpoint.files[0], os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)
    there = torch.zeros(1000, 1000)
    load(checkpoint, {"x": there}, mode="mapped")
    assert resident(checkpoint.files[0]) > 0
    load(checkpoint, {"x": there}, mode="mapped", leave_cache_clean=True)
    assert resident(checkpoint.files[0]) == 0
    assert load(checkpoint, {"x": there}).bytes_by_way.keys() == {"direct"}


def test_one_reader_reads_again_and_again(checkpoint: Checkpoint, tensors: Tensors) -> None:
    with Reader(checkpoint.files, mode="direct") as reader:
        for name in ("large", "cube", "bf16", "large"):
            there = torch.zeros_like(tensors[name])
            reader.read(merged(parts_of(checkpoint, Want(name, there))))
            assert same(there, tensors[name])
    with pytest.raises(ValueError, match="not open"):
        reader.read(merged(parts_of(checkpoint, Want("large", torch.zeros(3000, 1000)))))


MIB = 1 << 20
SIZE = 20 * MIB + 12345  # more than two pieces, and a rest


@pytest.fixture(scope="module")
def content() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, content: np.ndarray) -> list[Path]:
    """The content in two files."""
    folder = tmp_path_factory.mktemp("ranges")
    for name, part in (("a", content[: SIZE // 2]), ("b", content[SIZE // 2 :])):
        (folder / name).write_bytes(part.tobytes())
    return [folder / "a", folder / "b"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, SIZE // 2), st.integers(0, 5000) | st.integers(0, SIZE)), max_size=30
    ),
    st.sampled_from([1, 2, 8, 64]),
)
def test_any_ranges_of_files(
    halves: list[Path], content: np.ndarray, spans: list[tuple[bool, int, int]], threads: int
) -> None:
    ranges = [(int(second), offset, min(length, SIZE // 2 - offset)) for second, offset, length in spans]
    to = np.zeros(sum(length for _, _, length in ranges) + 2, np.uint8)
    wanted, at = [], to.ctypes.data + 1
    for file, offset, length in ranges:
        wanted.append((file, offset, length, at))
        at += length
    read_ranges(halves, wanted, threads=threads)
    begins = [(file * (SIZE // 2) + offset, length) for file, offset, length in ranges]
    expected = [content[begin : begin + length] for begin, length in begins]
    assert np.array_equal(to[1:-1], np.concatenate([*expected, content[:0]]))
    assert to[0] == to[-1] == 0


def test_neighbours_in_the_file_scattered_in_memory(halves: list[Path], content: np.ndarray) -> None:
    """More of them than one preadv takes, with empty ones between."""
    parts = [np.zeros(length, np.uint8) for length in [1, 0, 7, 4096, 0, 33] * 200]
    wanted, at = [], 5
    for part in parts:
        wanted.append((0, at, len(part), part.ctypes.data if len(part) else 0))
        at += len(part)
    read_ranges(halves, wanted, threads=3)
    assert np.array_equal(np.concatenate(parts), content[5:at])


@pytest.mark.parametrize(
    ("offset", "length", "got"),
    [(SIZE // 2, 1, 0), (SIZE // 2 - 1, 2, 1), (0, SIZE // 2 + 1, SIZE // 2), (2**62, 5, 0)],
)
def test_a_range_beyond_the_end_is_found_before_anything_is_read(
    halves: list[Path], offset: int, length: int, got: int
) -> None:
    first = np.zeros(10, np.uint8)
    with pytest.raises(TruncatedRead) as caught:
        read_ranges(halves, [(1, 0, 10, first.ctypes.data), (0, offset, length, 4096)], threads=2)
    error = caught.value
    assert (error.file, error.offset, error.wanted, error.got) == (str(halves[0]), offset, length, got)
    assert not first.any()


def test_ranges_of_files_that_cannot_be_read(halves: list[Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    to = np.zeros(10, np.uint8)
    for file, message in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "no regular"),
        (tmp_path / "fifo", "no regular"),
    ):
        with pytest.raises(StorageError, match=message) as caught:
            read_ranges([*halves, file], [(0, 0, 10, to.ctypes.data), (2, 5, 10, to.ctypes.data)], threads=2)
        assert not isinstance(caught.value, TruncatedRead)
    with pytest.raises(StorageError, match="Bad address"):
        read_ranges(halves, [(0, 7, 1000, 4096)], threads=2)  # page 1 is never mapped
    for threads in (0, 65):
        with pytest.raises(ValueError, match="threads"):
            read_ranges(halves, [(0, 20 * number, 10, to.ctypes.data) for number in range(70)], threads=threads)
    read_ranges(halves, [(0, SIZE, 0, 0)], threads=1)


def test_ranges_are_read_by_many_at_once(halves: list[Path], content: np.ndarray) -> None:
    def read(index: int) -> bool:
        to = np.zeros(MIB, np.uint8)
        read_ranges(halves, [(0, index, MIB, to.ctypes.data)], threads=2)
        return np.array_equal(to, content[index : index + MIB])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(40)))


def test_more_files_than_the_process_may_open(tmp_path: Path) -> None:
    """300 shards with names of 250 bytes where 200 files may be open: some are opened at a time."""
    names = {f"t{number:03}": f"{'x' * 235}{number:03}.safetensors" for number in range(300)}
    for number, (name, file) in enumerate(names.items()):
        save_file({name: torch.full((3,), float(number))}, tmp_path / file)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told: list[tuple[int, int]] = []
    taken = {name: np.empty(3, np.float32) for name in names}
    resource.setrlimit(resource.RLIMIT_NOFILE, (200 + len(list(Path("/proc/self/fd").iterdir())), hard))
    try:
        checkpoint = open_checkpoint(tmp_path)
        report = load(checkpoint, taken, progress=lambda *now: told.append(now))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all((array == number).all() for number, array in enumerate(taken.values()))
    assert report.wanted_bytes == 3600
    assert told[-1] == (3600, 3600)
    assert told == sorted(told)
