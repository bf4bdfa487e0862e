"""Checkpoints that are read by ranges, here of a folder: boxes with short and long gaps, bounded batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mxcore import LoadReport, Want, load, load_file, open_checkpoint, stream
from mxcore.errors import DestinationMismatch, ModeUnavailable, StorageError
from mxcore.storage.access import RemoteCheckpoint, remote_checkpoint
from mxcore.storage.remote import LocalFolder, RemoteRange
from mxserver.wire import SettingError


class Counted(LocalFolder):
    """A folder that keeps what was asked for."""

    asked: Sequence[Sequence[RemoteRange]] = ()

    def read_into(self, ranges: Sequence[RemoteRange]) -> None:
        self.asked = (*self.asked, tuple(ranges))
        super().read_into(ranges)


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, Any]:
    random = np.random.default_rng(5)
    made = {
        "wide": random.integers(0, 255, (6, 200_000), np.uint8),
        "narrow": random.standard_normal((300, 40), dtype=np.float32),
        "cube": random.integers(0, 2**15, (7, 8, 9), np.int16),
        "nothing": np.empty((0, 3), np.float32),
    }
    save_file(made, tmp_path / "model.safetensors")
    return made


@pytest.fixture
def checkpoint(arrays: dict[str, Any], tmp_path: Path) -> RemoteCheckpoint:
    return RemoteCheckpoint(Counted(tmp_path))


def boxed(array: Any, box: tuple[tuple[int, int], ...]) -> Any:
    return array[tuple(slice(first, end) for first, end in box)]


def read(checkpoint: RemoteCheckpoint, arrays: dict[str, Any], name: str, *box: tuple[int, int]) -> LoadReport:
    """Reads a box and compares it."""
    wanted = boxed(arrays[name], box) if box else arrays[name]
    to = np.full_like(wanted, 77)
    report = load(checkpoint, [Want(name, to, box or None)])
    np.testing.assert_array_equal(to, wanted)
    assert report.wanted_bytes == wanted.nbytes
    return report


def test_short_gaps_are_read_long_ones_are_not(checkpoint: RemoteCheckpoint, arrays: dict[str, Any]) -> None:
    assert read(checkpoint, arrays, "narrow", (10, 20), (0, 40)).read_bytes == 10 * 160  # one run
    assert read(checkpoint, arrays, "narrow", (10, 20), (5, 9)).read_bytes == 9 * 160 + 16
    assert read(checkpoint, arrays, "wide", (1, 4), (50_000, 60_000)).read_bytes == 3 * 10_000
    folder = checkpoint.folder
    assert isinstance(folder, Counted)
    assert [len(ranges) for ranges in folder.asked[-3:]] == [1, 1, 3]
    read(checkpoint, arrays, "cube", (1, 6), (2, 7), (3, 5))
    assert read(checkpoint, arrays, "nothing").read_bytes == 0


@pytest.mark.parametrize("batch_bytes", [3000, 300_000])
def test_batches_are_bounded(
    checkpoint: RemoteCheckpoint, arrays: dict[str, Any], batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_checkpoint, "BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(remote_checkpoint, "_RANGES_AT_ONCE", 64)
    told: list[tuple[int, int]] = []
    to = {name: np.zeros_like(array) for name, array in arrays.items()}
    load(checkpoint, to, progress=lambda *now: told.append(now))
    for name, array in arrays.items():
        np.testing.assert_array_equal(to[name], array)
    total = sum(array.nbytes for array in arrays.values())
    assert told[-1] == (total, total)
    assert told == sorted(told)
    read(checkpoint, arrays, "narrow", (0, 300), (3, 8))
    read(checkpoint, arrays, "wide", (0, 6), (0, 100))
    folder = checkpoint.folder
    assert isinstance(folder, Counted)
    # A run with its gap is one request: the smallest that there can be.
    assert max(sum(part.length for part in ranges) for ranges in folder.asked[4:]) <= max(batch_bytes, 200)
    assert max(map(len, folder.asked)) <= 64


def test_a_file_is_one_stretch_of_memory(arrays: dict[str, Any], tmp_path: Path) -> None:
    """By file://, which is read as a folder is."""
    found = load_file(f"file://{tmp_path}", framework="numpy")
    assert {name: found[name].tolist() for name in ("cube", "narrow")} == {
        name: arrays[name].tolist() for name in ("cube", "narrow")
    }
    assert dict(stream(tmp_path, ["cube"], framework="numpy")).keys() == {"cube"}
    assert open_checkpoint(f"file://{tmp_path}").total_bytes == sum(array.nbytes for array in arrays.values())


def test_what_cannot_be_is_refused(checkpoint: RemoteCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(ModeUnavailable, match="mode='direct' is for local files"):
        load(checkpoint, {}, mode="direct")
    with pytest.raises(DestinationMismatch):
        load(checkpoint, {"cube": np.zeros((7, 8, 9), np.int32)})
    with pytest.raises(SettingError, match="the checkpoint's URI='ftp://x/y': there are s3://"):
        open_checkpoint("ftp://x/y")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes() + b"x")
    with pytest.raises(StorageError, match="has changed since it was opened"):
        load(checkpoint, {"cube": np.zeros((7, 8, 9), np.int16)})
