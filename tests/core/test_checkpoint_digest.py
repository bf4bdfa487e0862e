"""What the checkpoint's digest sees, what it does not, and what it does not depend on."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mxcore.errors import StorageError
from mxcore.safetensors.errors import HeaderBeyondFile, RangeBeyondFile
from mxcore.storage.checkpoint import checkpoint_digest, content_digest, known_digests
from mxcore.storage.checkpoint.content_digest import BLOCK_BYTES
from mxcore.storage.checkpoint.known_digests import SampledFile
from tests.core.safetensors.headers import entry, file_of

DATA_BYTES = 300_000
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def make_checkpoint(folder: Path) -> tuple[list[Path], Path]:
    folder.mkdir(parents=True)
    for number, name in enumerate(SHARDS):
        data = np.random.default_rng(number).integers(0, 256, DATA_BYTES, dtype=np.uint8).tobytes()
        header = {"__metadata__": {"format": "pt"}, f"layer.{number}": entry("BF16", [DATA_BYTES // 2], 0, DATA_BYTES)}
        (folder / name).write_bytes(file_of(header, data))
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    return [folder / name for name in SHARDS], index


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[list[Path], Path]:
    return make_checkpoint(tmp_path / "a")


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def data_offset(path: Path) -> int:
    return path.stat().st_size - DATA_BYTES


def test_it_is_the_same_for_the_same_content(checkpoint: tuple[list[Path], Path], tmp_path: Path) -> None:
    """Another folder, another order, links as the hub makes them, other times."""
    files, index = checkpoint
    digest = checkpoint_digest(files, index)
    assert len(digest) == 16
    assert digest == f"{int(digest, 16):016x}"
    assert checkpoint_digest(files[::-1], index) == digest
    copied, copied_index = make_checkpoint(tmp_path / "b" / "c")
    assert checkpoint_digest(copied, copied_index) == digest
    links = tmp_path / "links"
    blobs = tmp_path / "blobs"
    links.mkdir()
    blobs.mkdir()
    for number, path in enumerate([*files, index]):
        shutil.copy(path, blobs / str(number))
        (links / path.name).symlink_to(blobs / str(number))
    assert checkpoint_digest([links / name for name in SHARDS], links / index.name) == digest


def test_no_weight_files_have_no_digest(checkpoint: tuple[list[Path], Path]) -> None:
    assert checkpoint_digest([], None) == ""
    assert checkpoint_digest([], checkpoint[1]) == ""


SEEN: dict[str, Callable[[list[Path], Path], object]] = {
    "a letter in the header": lambda files, _: flip(files[0], 8 + 20),
    "the index": lambda _, index: index.write_text('{"weight_map": {"a": "b"}}'),
    "a file's name": lambda files, _: files[0].rename(files[0].with_name("model.safetensors")),
}


@pytest.mark.parametrize("change", SEEN)
def test_it_sees(checkpoint: tuple[list[Path], Path], change: str) -> None:
    files, index = checkpoint
    before = checkpoint_digest(files, index)
    SEEN[change](files, index)
    assert checkpoint_digest(sorted(files[0].parent.glob("*.safetensors")), index) != before


def test_it_sees_missing_parts(checkpoint: tuple[list[Path], Path]) -> None:
    files, index = checkpoint
    digests = {
        checkpoint_digest(files, index),
        checkpoint_digest(files, None),
        checkpoint_digest(files[:1], index),
        checkpoint_digest(files[1:], index),
        checkpoint_digest(files[:1], None),
    }
    assert len(digests) == 5


def many_tensors(path: Path) -> Path:
    """A file of 200 tensors."""
    header, data = {}, b""
    for number in range(200):
        size = (64, 50_000, 8192, 3)[number % 4]
        header[f"layers.{number}.weight"] = entry("U8", [size], len(data), len(data) + size)
        data += bytes([number]) * size
    path.write_bytes(file_of(header, data))
    return path


def test_every_tensor_is_seen(tmp_path: Path) -> None:
    """Findings A4 and W4: one norm, one projection, whatever its place and size."""
    path = many_tensors(tmp_path / "m.safetensors")
    seen = {checkpoint_digest([path], None)}
    with path.open("r+b", buffering=0) as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes - 8))
        for number, tensor in enumerate(header.values()):
            begin, end = tensor["data_offsets"]
            for value in (number ^ 0xFF, number):
                os.pwrite(file.fileno(), bytes([value]) * (end - begin), header_bytes + begin)
                os.utime(path, ns=(number, number))  # a file that says it is as it was is not read again
                if value != number:
                    seen.add(checkpoint_digest([path], None))
    assert len(seen) == 201


def test_a_merge_into_attention_alone_is_seen(tmp_path: Path) -> None:
    """TinyLlama's layout at an eighth: the old digest's evenly spaced blocks lay in other tensors, all of them."""
    shapes = {"q": 512, "k": 64, "v": 64, "o": 512, "gate": 1408, "up": 1408, "down": 1408}
    digests = set()
    for merged in ((), ("q",), ("k",), ("v",), ("q", "k", "v", "o")):
        header, data = {}, b""
        for layer in range(4):
            for name, rows in shapes.items():
                size = rows * 64
                header[f"layers.{layer}.{name}"] = entry("U8", [size], len(data), len(data) + size)
                data += bytes([name in merged]) * size
        path = tmp_path / "model.safetensors"
        path.write_bytes(file_of(header, data))
        digests.add(checkpoint_digest([path], None))
    assert len(digests) == 5


def test_it_does_not_see_an_element(checkpoint: tuple[list[Path], Path]) -> None:
    """As documented: this is the price of not reading everything. Of 300,000 bytes it sees 4096."""
    files, index = checkpoint
    before = checkpoint_digest(files, index)
    seen = 0
    for at in range(0, DATA_BYTES, 10_000):
        flip(files[0], data_offset(files[0]) + at)
        seen += checkpoint_digest(files, index) != before
        flip(files[0], data_offset(files[0]) + at)
    assert seen <= 1


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES])
def test_small_tensors_are_seen_whole(tmp_path: Path, size: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_of({"a": entry("U8", [size], 0, size)}, bytes(size)))
    seen = {checkpoint_digest([path], None)}
    for at in range(0, size, max(1, size // 9)):
        flip(path, path.stat().st_size - size + at)
        seen.add(checkpoint_digest([path], None))
    assert len(seen) == 1 + len(range(0, size, max(1, size // 9)))


def test_it_is_made_once_while_the_files_stay(
    checkpoint: tuple[list[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, index = checkpoint
    monkeypatch.setattr(known_digests, "SETTLED_SECONDS", 0)
    digest = checkpoint_digest(files, index)
    with monkeypatch.context() as patched:
        patched.setattr("mxcore.storage.checkpoint.content_digest.read_header", None)
        assert checkpoint_digest(files, index) == digest
    stat = files[0].stat()
    changed = bytes(DATA_BYTES)
    with files[0].open("r+b") as file:
        file.seek(-DATA_BYTES, os.SEEK_END)
        file.write(changed)
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # what hides a change from size and mtime
    assert checkpoint_digest(files, index) != digest


def test_other_formats_have_size_and_blocks_only(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"")
    empty = checkpoint_digest([path], None)
    path.write_bytes(bytes(100_000))
    full = checkpoint_digest([path], None)
    flip(path, 0)
    assert len({empty, full, checkpoint_digest([path], None)}) == 3


def test_a_huge_file_costs_a_few_reads(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    size = 1 << 38
    path.write_bytes(file_of({"a": entry("U8", [size], 0, size)}))
    os.truncate(path, path.stat().st_size + size)
    assert len(checkpoint_digest([path], None)) == 16


def test_errors(checkpoint: tuple[list[Path], Path], tmp_path: Path) -> None:
    files, index = checkpoint
    with pytest.raises(StorageError, match=r"none\.safetensors: cannot be read: No such file"):
        checkpoint_digest([*files, tmp_path / "none.safetensors"], index)
    with pytest.raises(StorageError, match=r"none\.json: cannot be read"):
        checkpoint_digest(files, tmp_path / "none.json")
    with pytest.raises(ValueError, match="same name"):
        checkpoint_digest([*files, tmp_path / "other" / SHARDS[0]], index)
    os.truncate(files[0], files[0].stat().st_size - 1)
    with pytest.raises(RangeBeyondFile):
        checkpoint_digest(files, index)
    os.truncate(files[0], 20)
    with pytest.raises(HeaderBeyondFile):
        checkpoint_digest(files, index)


def test_groups_of_one_file_are_read_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of several files: a model in one file would otherwise wait for each group in turn."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(
        file_of({f"t{number}": entry("U8", [8], 8 * number, 8 * number + 8) for number in range(8)}, bytes(64))
    )
    together = threading.Barrier(8)
    read_ranges = content_digest.read_ranges

    def waited(files: Sequence[Path], ranges: list[tuple[int, int, int, int]], *, threads: int) -> None:
        if [length for _, _, length, _ in ranges] == [8]:
            together.wait(60)
        read_ranges(files, ranges, threads=threads)

    monkeypatch.setattr(content_digest, "read_ranges", waited)
    monkeypatch.setattr(content_digest, "_GROUP_RANGES", 1)
    assert content_digest._made([SampledFile.of(file.name, file)], [])
    assert together.n_waiting == 0
