"""What a disk does once in a while, at a chosen byte, in every way to read: never wrong bytes, never a crash."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mxcore.errors import ModeUnavailable, StorageError, TruncatedRead
from mxcore.memory import HostBuffer
from mxcore.reading import FileSet, JobList, checkpoint_reader
from mxcore.storage.checkpoint import open_checkpoint
from mxcore.storage.load import load, stream
from mxcore.storage.plan import Want, parts_of, row, ways
from tests.storage.conftest import MODES, same
from tests.storage.faulty_disk import cannot_run, faulty_disk

pytestmark = pytest.mark.skipif(bool(cannot_run()), reason=cannot_run())

SHAPE = (3000, 1000)  # 12 MB: two reads of up to 8 MiB
EIO = "Input/output error|the storage does not give what is mapped"  # a mapping has no errno


@pytest.fixture(scope="module")
def written() -> torch.Tensor:
    torch.manual_seed(8)
    return torch.randn(SHAPE)


@pytest.fixture
def file(written: torch.Tensor, tmp_path: Path) -> Path:
    save_file({"x": written}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.fixture(autouse=True)
def _reasons_are_told_again() -> Iterator[None]:
    ways._told.clear()
    yield
    ways._told.clear()


def read(file: Path, mode: str) -> torch.Tensor:
    """The tensor, by `load`; for io_uring, which `load` refuses on FUSE, by the compiled reader itself."""
    there = torch.full(SHAPE, 7.0)
    checkpoint = open_checkpoint(file)
    if mode != "uring":
        load(checkpoint, {"x": there}, mode=mode)
        return there
    with FileSet(checkpoint.files, checkpoint.stamps) as files, HostBuffer(36 << 20) as slots:
        files.open_direct(0)
        jobs = JobList(files, row(list(parts_of(checkpoint, Want("x", there)))))
        order = array("q", range(len(jobs)))
        checkpoint_reader.read_jobs(jobs, order, way=checkpoint_reader.URING, threads=1, lanes=4, slots=slots)
        files.check_unchanged()
    return there


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error_at", [5_000_000, 9_000_000])
def test_eio_is_an_error_that_says_where(file: Path, mode: str, error_at: int) -> None:
    with (
        faulty_disk(file, error_at=error_at) as path,
        pytest.raises(StorageError, match=f"bytes at .* cannot be read.*({EIO})") as caught,
    ):
        read(path, mode)
    assert caught.value.file == str(path)
    assert 0 <= caught.value.offset <= error_at + 4096 or caught.value.offset % (8 << 20) == 0


@pytest.mark.parametrize("mode", ["buffered", "direct"])
def test_a_file_that_its_server_forgot_is_opened_again_once(
    file: Path, written: torch.Tensor, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """ESTALE (findings, row 26)."""
    with faulty_disk(file, stale_at=5_000_000, cached=False) as path:
        assert same(read(path, mode), written)
    assert caplog.text.count("the files are opened again") == 1


def test_eio_before_the_header_ends(file: Path) -> None:
    with faulty_disk(file, error_at=0) as path, pytest.raises(StorageError, match="Input/output error"):
        open_checkpoint(path)


def test_eio_ends_a_stream(file: Path) -> None:
    with faulty_disk(file, error_at=5_000_000) as path, pytest.raises(StorageError, match=EIO):
        list(stream(open_checkpoint(path)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("missing_bytes", [7_000_000, 100])
def test_a_file_cut_by_another_machine_is_no_zeros(
    file: Path, written: torch.Tensor, mode: str, missing_bytes: int
) -> None:
    """The last page of it, of which a part is there, reads as zeros behind that."""
    ends_at = file.stat().st_size - missing_bytes
    with faulty_disk(file, ends_at=ends_at) as path, pytest.raises(StorageError) as caught:
        read(path, mode)
    assert isinstance(caught.value, TruncatedRead) or "the storage does not give" in str(caught.value)


@pytest.mark.parametrize("mode", ["auto", "buffered", "direct", "uring"])
@pytest.mark.parametrize("most_bytes", [50_001, 4096 * 7])
def test_short_reads_go_on(file: Path, written: torch.Tensor, mode: str, most_bytes: int) -> None:
    with faulty_disk(file, most_bytes=most_bytes, cached=False) as path:
        assert same(read(path, mode), written)


@pytest.mark.parametrize("mode", ["auto", "buffered", "direct", "uring"])
def test_interrupted_reads_go_on(file: Path, written: torch.Tensor, mode: str) -> None:
    with faulty_disk(file, interrupts=5, cached=False) as path:
        assert same(read(path, mode), written)


def test_io_uring_is_refused_where_it_reads_wrong_bytes(file: Path) -> None:
    """On FUSE without asynchronous direct reads the kernel repeats a short one's beginning (seen on Linux 6.18)."""
    with faulty_disk(file) as path, pytest.raises(ModeUnavailable, match=r"FUSE.*MX_READ_MODE=auto"):
        load(open_checkpoint(path), {"x": torch.zeros(SHAPE)}, mode="uring")


def test_what_cannot_be_mapped_is_read_buffered(
    file: Path, written: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with faulty_disk(file, cached=False) as path, caplog.at_level(logging.INFO):
        there = torch.zeros(SHAPE)
        assert load(open_checkpoint(path), {"x": there}).bytes_by_way == {"buffered": written.nbytes}
        assert same(there, written)
        assert "reading buffered" in caplog.text
        assert "cannot be mapped" in caplog.text
        with pytest.raises(StorageError, match="cannot be mapped"):
            load(open_checkpoint(path), {"x": there}, mode="mapped")


def test_o_direct_that_is_refused_when_opened(
    file: Path, written: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with faulty_disk(file, direct="at open") as path, caplog.at_level(logging.INFO):
        there = torch.zeros(SHAPE)
        assert load(open_checkpoint(path), {"x": there}).bytes_by_way == {"buffered": written.nbytes}
        assert same(there, written)
        assert "has no O_DIRECT" in caplog.text
        for mode in ("direct", "uring"):
            with pytest.raises(ModeUnavailable, match=f"no O_DIRECT, which {mode} wants: set MX_READ_MODE=auto"):
                load(open_checkpoint(path), {"x": there}, mode=mode)


@pytest.mark.parametrize("mode", ["auto", "direct", "uring"])
def test_o_direct_that_is_refused_when_read(
    file: Path, written: torch.Tensor, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    with faulty_disk(file, direct="at read") as path, caplog.at_level(logging.INFO):
        assert same(read(path, mode), written)
    assert mode == "uring" or "O_DIRECT was refused for some reads" in caplog.text
