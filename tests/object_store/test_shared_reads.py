"""Ranks of one node: together they fetch a checkpoint once, whoever dies, comes late or not at all."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mxcore.errors import StorageError
from mxcore.storage.plan import budget
from mxcore.storage.remote import LocalFolder, RemoteRange, SharedReads, open_remote, shared_reads, stream_remote
from tests.object_store.conftest import make_checkpoint

PATIENCE_SECONDS = 60.0
_SPAWN = multiprocessing.get_context("spawn")


class Counted(LocalFolder):
    """A folder that knows how much was read of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read_bytes = 0

    def read_into(self, ranges: Sequence[RemoteRange]) -> None:
        super().read_into(ranges)
        self.read_bytes += sum(part.length for part in ranges)


def rank(folder: Path, below: Path, ranks: int, answers: Any, done: Any) -> None:
    """One rank in a process of its own: loads all, says what it fetched, stays until `done`."""
    remote = Counted(folder)
    checkpoint = open_remote(remote)
    headers = remote.read_bytes
    shared = SharedReads("here", remote.files, ranks, remote.read_into, below=below)
    sums = {
        name: float(tensor.double().sum())
        for name, tensor in stream_remote(remote, checkpoint, read=shared.read_into, batch_bytes=1 << 20)
    }
    answers.put((sums, remote.read_bytes - headers, shared.shared_bytes))
    done.wait(PATIENCE_SECONDS)
    shared.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "model")
    return tmp_path / "model"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_have_all_and_fetch_it_once(folder: Path, tmp_path: Path, ranks: int) -> None:
    answers, done = _SPAWN.Queue(), _SPAWN.Event()
    below = tmp_path / "shm"
    below.mkdir()
    processes = [_SPAWN.Process(target=rank, args=(folder, below, ranks, answers, done)) for _ in range(ranks)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=PATIENCE_SECONDS) for _ in processes]
    done.set()
    for process in processes:
        process.join(PATIENCE_SECONDS)

    total = open_remote(LocalFolder(folder)).total_bytes
    assert all(sums == found[0][0] for sums, _, _ in found)
    assert len(found[0][0]) == 8
    assert sum(fetched for _, fetched, _ in found) == total
    assert sum(shared for _, _, shared in found) == total * (ranks - 1)
    assert list(below.iterdir()) == [], "nothing stays in shared memory"


def pieces(folder: LocalFolder, room: np.ndarray) -> list[RemoteRange]:
    file = next(file for file in folder.files if file.path.endswith("1-of-00002.safetensors"))
    return [
        RemoteRange(file.path, 0, 1000, room.ctypes.data),
        RemoteRange(file.path, 5000, 24, room.ctypes.data + 1000),
    ]


def dies(ranges: Sequence[RemoteRange]) -> None:
    os._exit(7)


def begin_and_die(folder: Path, below: Path) -> None:
    remote = LocalFolder(folder)
    shared = SharedReads("here", remote.files, 2, dies, below=below, room_bytes=1 << 20)
    room = np.zeros(1024, dtype=np.uint8)  # kept: ranges hold its address alone
    shared.read_into(pieces(remote, room))


def test_a_rank_that_dies_while_fetching_leaves_it_to_the_next(folder: Path, tmp_path: Path) -> None:
    process = _SPAWN.Process(target=begin_and_die, args=(folder, tmp_path))
    process.start()
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 7

    remote, room = Counted(folder), np.zeros(1024, dtype=np.uint8)
    other = SharedReads("here", remote.files, 2, remote.read_into, below=tmp_path, room_bytes=1 << 20)
    other.read_into(pieces(remote, room))
    assert remote.read_bytes == 1024
    data = (folder / "model-00001-of-00002.safetensors").read_bytes()
    assert room.tobytes() == data[:1000] + data[5000:5024]


def test_a_rank_alone_reads_on_when_nobody_makes_room(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_reads, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(shared_reads, "LINGER_SECONDS", 0.0)
    remote, room = Counted(folder), np.zeros(1024, dtype=np.uint8)
    shared = SharedReads("here", remote.files, 2, remote.read_into, below=tmp_path, room_bytes=1500)
    first = pieces(remote, room)
    shared.read_into(first)
    shared.read_into([first[0]._replace(offset=64)])  # 1000 bytes more do not fit
    assert remote.read_bytes == 2024
    shared.close()
    wait_until(lambda: not list(tmp_path.glob("mx-reads-*")))


def test_what_cannot_be_read_is_the_same_error(folder: Path, tmp_path: Path) -> None:
    def fails(ranges: Sequence[RemoteRange]) -> None:
        raise StorageError("gone")

    remote = LocalFolder(folder)
    shared = SharedReads("here", remote.files, 2, fails, below=tmp_path, room_bytes=1 << 20)
    room = np.zeros(1024, dtype=np.uint8)  # kept: ranges hold its address alone
    with pytest.raises(StorageError, match="gone"):
        shared.read_into(pieces(remote, room))
    assert not list(tmp_path.rglob("*.batch"))
    shared.close()
    assert not list(tmp_path.glob("mx-reads-*"))


def test_one_rank_shares_nothing(folder: Path, tmp_path: Path) -> None:
    remote = Counted(folder)
    shared = SharedReads("here", remote.files, 1, remote.read_into, below=tmp_path)
    room = np.zeros(1024, dtype=np.uint8)  # kept: ranges hold its address alone
    shared.read_into(pieces(remote, room))
    shared.close()
    assert not list(tmp_path.glob("mx-reads-*"))


def test_where_no_memory_can_be_shared_each_reads_all(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = Counted(folder)
    shared = SharedReads("here", remote.files, 2, remote.read_into, below=tmp_path / "none")
    room = np.zeros(1024, dtype=np.uint8)  # kept: ranges hold its address alone
    shared.read_into(pieces(remote, room))
    shared.close()
    assert remote.read_bytes == 1024
    assert "each reads all" in caplog.text


def test_what_ranks_share_counts_in_the_memory_limit(folder: Path, tmp_path: Path) -> None:
    """It is host memory (findings, row 21)."""
    before = budget().limit_bytes, budget().origin
    budget().set_limit(5_000_000, "this test")
    remote = LocalFolder(folder)
    shared = SharedReads("here", remote.files, 2, remote.read_into, below=tmp_path)
    try:
        assert shared._room_bytes <= 5_000_000
    finally:
        shared.close()
        budget().set_limit(*before)
