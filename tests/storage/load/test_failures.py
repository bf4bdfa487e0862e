"""Files that shrink, change or cannot be read; memory that is no memory; signals; limits of the process. No crash."""

from __future__ import annotations

import errno
import logging
import os
import signal
from array import array
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

from mxcore.errors import FileChanged, StorageError, TruncatedRead
from mxcore.memory import HostBuffer
from mxcore.reading import BUFFERED, DIRECT, MAPPED, URING, FileSet, JobList, checkpoint_reader
from mxcore.storage.checkpoint import open_checkpoint
from mxcore.storage.load import Reader, load, stream
from mxcore.storage.plan import Row, Want, chosen_mode, merged, parts_of, row
from tests.storage import limited_reads
from tests.storage.conftest import MODES, Maker
from tests.storage.limited import in_child

FORCED = MODES[1:]
WAYS = {"buffered": BUFFERED, "mapped": MAPPED, "direct": DIRECT, "uring": URING}


def rows_for(made: Maker, there: torch.Tensor) -> tuple[Path, list[Row]]:
    checkpoint = made({"x": torch.ones_like(there)})
    return checkpoint.files[0], merged(parts_of(checkpoint, Want("x", there)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("left_bytes", [0, 4096, 1_000_000, 3_999_999])
def test_a_file_cut_short_while_it_is_open(made: Maker, mode: str, left_bytes: int) -> None:
    """For `mapped` this is SIGBUS, in our threads and in the caller's."""
    there = torch.zeros(1000, 1000)
    file, rows = rows_for(made, there)
    with Reader([file], mode=mode) as reader:
        reader.read(rows)
        os.truncate(file, left_bytes)
        with pytest.raises(TruncatedRead, match="was cut from") as caught:
            reader.read(rows)
    assert str(file) in str(caught.value)
    assert there[0, 0] == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_file_cut_short_before_it_is_opened(made: Maker, mode: str) -> None:
    there = torch.zeros(1000)
    file, rows = rows_for(made, there)
    os.truncate(file, 2000)
    with pytest.raises(TruncatedRead) as caught, Reader([file], mode=mode) as reader:
        reader.read(rows)
    assert caught.value.wanted == 4000
    assert caught.value.got < 2000


@pytest.mark.parametrize("mode", MODES)
def test_a_file_written_to_while_it_is_open(made: Maker, mode: str) -> None:
    there = torch.zeros(1000)
    file, rows = rows_for(made, there)
    with Reader([file], mode=mode) as reader:
        reader.read(rows)
        with file.open("r+b") as opened:
            opened.seek(-4, os.SEEK_END)
            opened.write(b"\0\0\0\0")
        os.utime(file, ns=(0, 0))
        with pytest.raises(FileChanged, match="was written to"):
            reader.read(rows)


def test_sigbus_of_others_stays_theirs(made: Maker) -> None:
    """The handler is there only while we read, and leaves the one before in place."""
    seen: list[int] = []

    def theirs(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGBUS, theirs)
    try:
        there = torch.zeros(1000)
        file, rows = rows_for(made, there)
        with Reader([file], mode="mapped") as reader:
            reader.read(rows)
        assert signal.getsignal(signal.SIGBUS) is theirs
        signal.raise_signal(signal.SIGBUS)
        assert seen == [signal.SIGBUS]
    finally:
        signal.signal(signal.SIGBUS, before or signal.SIG_DFL)  # None: a handler that Python did not set (sanitizers)


@pytest.mark.parametrize("mode", ["buffered", "direct"])
def test_an_address_that_is_no_memory_is_an_error(made: Maker, mode: str) -> None:
    file, rows = rows_for(made, torch.zeros(1 << 20))
    lost = [(*part[:5], 4096 + part[1] % 4096, part[6]) for part in rows]  # never mapped; read in place, not copied
    with pytest.raises(StorageError, match=os.strerror(errno.EFAULT)), Reader([file], mode=mode) as reader:
        reader.read(lost)


@pytest.mark.parametrize("path", ["/dev/null", "/"])
def test_only_regular_files(path: str) -> None:
    with pytest.raises(StorageError, match=r"regular|opened"):
        FileSet([path])
    with pytest.raises(StorageError, match="opened"):
        FileSet(["/nowhere/at/all"])


# A read that takes long enough for the caller's thread to look around: a sparse file into one place, again and again.


@pytest.fixture
def long_read(tmp_path: Path) -> Callable[..., None]:
    def read(mode: str, progress: Callable[[int], None] | None = None) -> None:
        file = tmp_path / "sparse"
        with file.open("wb") as opened:
            opened.truncate(64 << 20)
        with FileSet([file]) as files, HostBuffer(64 << 20) as to, HostBuffer(66 << 20) as slots:
            jobs = JobList(files, row([(0, 0, 64 << 20, 0, 1, to.address, 0)]))
            files.map(0)
            files.open_direct(0)
            order = array("q", list(range(len(jobs))) * 4000)
            lanes = 4 if WAYS[mode] >= DIRECT else 1
            threads = 4 if mode == "direct" else 1
            checkpoint_reader.read_jobs(
                jobs, order, way=WAYS[mode], threads=threads, lanes=lanes, slots=slots, progress=progress
            )

    return read


@pytest.mark.parametrize("mode", FORCED)
def test_what_progress_raises_ends_the_read(long_read: Callable[..., None], mode: str) -> None:
    told: list[int] = []

    def stop(done_bytes: int) -> None:
        told.append(done_bytes)
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        long_read(mode, stop)
    assert len(told) == 1
    assert told[0] > 0


@pytest.mark.parametrize("mode", FORCED)
def test_a_file_cut_short_in_the_middle_of_a_read(long_read: Callable[..., None], tmp_path: Path, mode: str) -> None:
    """By who is told of the progress: all threads are in the file then."""

    def cut(done_bytes: int) -> None:
        os.truncate(tmp_path / "sparse", 1 << 20)

    with pytest.raises(TruncatedRead, match="was cut from 67108864 to 1048576 bytes while it was read"):
        long_read(mode, cut)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["replaced", "written to", "cut"])
def test_a_file_that_is_not_the_one_whose_header_was_read(made: Maker, tmp_path: Path, mode: str, how: str) -> None:
    """Of the same size and layout, so that it would be read without an error: half an old model, half a new one."""
    checkpoint = made({"a": torch.ones(1000), "b": torch.ones(1000)})
    file = checkpoint.files[0]
    if how == "replaced":
        other = made({"a": torch.zeros(1000), "b": torch.zeros(1000)}).files[0]
        os.utime(other, ns=(0, 1_000_000_000))
        other.replace(file)
    elif how == "written to":
        with file.open("r+b") as opened:
            opened.seek(-4, os.SEEK_END)
            opened.write(b"\0\0\0\0")
        os.utime(file, ns=(0, 1_000_000_000))
    else:
        os.truncate(file, file.stat().st_size - 4)
    there = torch.full((1000,), 5.0)
    with pytest.raises(TruncatedRead if how == "cut" else FileChanged, match="since its header was read"):
        load(checkpoint, {"a": there}, mode=mode)
    assert bool((there == 5).all())
    with pytest.raises(TruncatedRead if how == "cut" else FileChanged, match="since its header was read"):
        list(stream(checkpoint, mode=mode))


@pytest.mark.parametrize("mode", FORCED)
def test_a_signals_exception_ends_the_read(long_read: Callable[..., None], mode: str) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            long_read(mode)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("mode", FORCED)
def test_signals_that_go_on_harm_nothing(made: Maker, mode: str) -> None:
    """EINTR: a timer at every millisecond while files are read."""
    there = torch.zeros(4 << 20)
    file, rows = rows_for(made, there)
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        with Reader([file], mode=mode) as reader:
            for _ in range(5):
                there.zero_()
                reader.read(rows)
                assert bool((there == 1).all())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_memory_that_may_not_be_pinned_is_read_into_all_the_same(made: Maker) -> None:
    file, rows = rows_for(made, torch.ones(1000))
    file.chmod(0o644)
    in_child(limited_reads.unpinned_reads, file, rows[0][1], rows[0][2])


def test_a_load_says_that_its_memory_is_not_pinned(made: Maker) -> None:
    checkpoint = made({"x": torch.from_numpy(limited_reads.NUMBERS)})
    checkpoint.files[0].chmod(0o644)  # the child reads it as nobody
    checkpoint.files[0].parent.chmod(0o755)
    in_child(limited_reads.unpinned_load, checkpoint.files[0])


def test_io_uring_that_a_container_refuses(made: Maker) -> None:
    """EPERM is what Docker's seccomp profile answers. `auto` needs none; what is asked for by name is refused."""
    checkpoint = made({"x": torch.from_numpy(limited_reads.NUMBERS)})
    in_child(limited_reads.without_io_uring, checkpoint.files[0])


def test_io_uring_that_takes_no_reads_is_an_error(made: Maker) -> None:
    checkpoint = made({"x": torch.from_numpy(limited_reads.NUMBERS)})
    in_child(limited_reads.without_reads_by_io_uring, checkpoint.files[0])


def test_io_uring_that_is_refused_is_said(made: Maker) -> None:
    checkpoint = made({"x": torch.from_numpy(limited_reads.NUMBERS)})
    in_child(limited_reads.without_descriptors, checkpoint.files[0])


def test_a_file_system_without_o_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """procfs and sysfs have none; their files are regular, of a size that says nothing."""
    with FileSet(["/proc/self/status"]) as files:
        assert files.open_direct(0) == 0


def test_a_wrong_setting_warns_and_is_auto(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert chosen_mode(None, {"MX_READ_MODE": "warp"}) == "auto"
    assert "MX_READ_MODE='warp' is refused" in caplog.text
    assert chosen_mode(None, {"MX_READ_MODE": " Direct "}) == "direct"
    assert chosen_mode(None, {}) == "auto"
    assert chosen_mode(None, {"MX_READ_MODE": "engine"}) == "auto"


def test_the_environment_forces_a_way(made: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MX_READ_MODE", "uring")
    checkpoint = made({"x": torch.ones(10)})
    assert set(load(checkpoint, {"x": torch.zeros(10)}).bytes_by_way) == {"uring"}


@pytest.mark.parametrize("how", ["replaced", "written to"])
@pytest.mark.parametrize("mode", MODES)
def test_a_file_whose_size_and_time_stay_is_another_one(made: Maker, mode: str, how: str) -> None:
    """What packers that give all files one time leave, and `touch -r` (findings, row 27)."""
    tensors = {"a": torch.ones(1000), "b": torch.ones(1000)}
    checkpoint = made(tensors)
    (file,) = checkpoint.files
    os.utime(file, ns=(0, 1_000_000_000))
    checkpoint = open_checkpoint(file)
    if how == "replaced":
        (other,) = made({"a": torch.zeros(1000), "b": torch.zeros(1000)}).files
        os.utime(other, ns=(0, 1_000_000_000))
        other.replace(file)
    else:
        with file.open("r+b") as opened:
            opened.seek(-4, os.SEEK_END)
            opened.write(b"\0\0\0\0")
        os.utime(file, ns=(0, 1_000_000_000))
    with pytest.raises(FileChanged, match="since its header was read"):
        load(checkpoint, {"a": torch.zeros(1000)}, mode=mode)


def test_links_modes_and_names_are_no_matter(made: Maker) -> None:
    checkpoint = made({"a": torch.ones(1000)})
    (file,) = checkpoint.files
    there = torch.zeros(1000)
    with Reader(checkpoint.files, stamps=checkpoint.stamps) as reader:
        file.with_name("other").hardlink_to(file)
        rows = list(parts_of(checkpoint, Want("a", there)))
        reader.read(rows)
        file.chmod(0o600)
        reader.read(rows)
        file.unlink()
        reader.read(rows)
    assert bool((there == 1).all())
