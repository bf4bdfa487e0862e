"""cuFile's driver, opened without compatibility mode; files registered, read, refused."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxcore.cuda import DeviceBuffer, context_of
from mxcore.errors import CuFileError
from mxcore.reading import BLOCK_BYTES, FileHandles, FileSet, cufile
from mxcore.reading.cufile_status import status_text
from tests.cuda.stand_in import StandIn

DATA = os.urandom(5 * BLOCK_BYTES + 77)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileSet]:
    (tmp_path / "a").write_bytes(DATA)
    (tmp_path / "b").write_bytes(DATA[::-1])
    with FileSet([tmp_path / "a", tmp_path / "b"]) as opened:
        yield opened


def on_device(buffer: DeviceBuffer) -> bytes:
    return ctypes.string_at(buffer.address, buffer.size_bytes)


def test_the_driver_is_open_while_somebody_has_handles(gpudirect: StandIn, files: FileSet) -> None:
    assert cufile.version() == (1, 14)
    first, second = FileHandles(files), FileHandles(files)
    assert (cufile.driver_is_open(), gpudirect.counts().cufile_drivers) == (True, 1)
    first.register(0)
    first.close()
    first.close()
    assert (cufile.driver_is_open(), gpudirect.counts().cufile_handles) == (True, 0)
    second.close()
    assert (cufile.driver_is_open(), gpudirect.counts().cufile_drivers) == (False, 0)
    with pytest.raises(ValueError, match="closed"):
        second.register(0)
    third = FileHandles(files)
    third.register(1)
    del third  # a destructor gives everything back
    assert gpudirect.counts().cufile_drivers == gpudirect.counts().cufile_handles == 0


def test_a_driver_that_does_not_open_is_not_tried_twice(gpudirect: StandIn, files: FileSet) -> None:
    gpudirect.fail("cuFileDriverOpen", 5001)
    for _ in range(2):  # it would open the second time
        with pytest.raises(CuFileError, match=r"CU_FILE_DRIVER_NOT_INITIALIZED \(5001\): nvidia-fs is not loaded"):
            FileHandles(files)
    assert not cufile.driver_is_open()


@pytest.mark.parametrize("says", ["cufile-host", "cuFileDriverGetProperties", "cuFileSetParameterBool"])
def test_compatibility_mode_is_no_way(gpudirect: StandIn, files: FileSet, says: str) -> None:
    (gpudirect.fail_later if says == "cufile-host" else gpudirect.fail)(says, 5030)
    expected = "compatibility mode" if says == "cufile-host" else rf"{says} failed with CU_FILE_INTERNAL_ERROR \(5030\)"
    with pytest.raises(CuFileError, match=expected):
        FileHandles(files)
    assert gpudirect.counts().cufile_drivers == 0


def test_a_driver_of_somebody_else_is_left_alone(gpudirect: StandIn, files: FileSet) -> None:
    gpudirect.fail("cuFileUseCount", 1)
    with pytest.raises(CuFileError, match="another library of this process"):
        FileHandles(files)


def test_a_driver_that_does_not_close_is_told_and_not_opened_again(gpudirect: StandIn, files: FileSet) -> None:
    handles = FileHandles(files)
    gpudirect.fail("cuFileDriverClose_v2", 5006)
    with pytest.raises(CuFileError, match=r"cuFileDriverClose failed with CU_FILE_DRIVER_CLOSING \(5006\)"):
        handles.close()
    with pytest.raises(CuFileError, match="CLOSING"):
        FileHandles(files)
    gpudirect.close_cufile()


def test_blocks_come_into_device_memory(gpudirect: StandIn, files: FileSet) -> None:
    context = context_of(1)
    buffer = DeviceBuffer(context, 4 * BLOCK_BYTES + 100)
    handles = FileHandles(files)
    handles.register(0)
    handles.register(0)
    handles.read(context, 0, buffer.address + 33, 3 * BLOCK_BYTES, 2 * BLOCK_BYTES)
    assert on_device(buffer)[33 : 33 + 3 * BLOCK_BYTES] == DATA[2 * BLOCK_BYTES : 5 * BLOCK_BYTES]
    assert set(on_device(buffer)[:33] + on_device(buffer)[33 + 3 * BLOCK_BYTES :]) == {0xA5}
    for address, size_bytes, offset in ((buffer.address, 100, 0), (buffer.address, BLOCK_BYTES, 100)):
        with pytest.raises(ValueError, match="no whole blocks"):
            handles.read(context, 0, address, size_bytes, offset)
    with pytest.raises(ValueError, match="not registered"):
        handles.read(context, 1, buffer.address, BLOCK_BYTES, 0)
    handles.deregister(0)
    assert not handles.registered(0)
    handles.close()
    buffer.close()


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("cuFileRead", errno.EIO, "failed: Input/output error"),
        ("cuFileRead", 5010, r"failed with CU_FILE_NVFS_DRIVER_ERROR \(5010\)"),
        ("cufile-short", 512, "of 8192 bytes at 4096 gave 512"),
    ],
)
def test_a_read_that_fails_says_how(gpudirect: StandIn, files: FileSet, fault: str, status: int, said: str) -> None:
    context = context_of(0)
    buffer = DeviceBuffer(context, 2 * BLOCK_BYTES)
    handles = FileHandles(files)
    handles.register(1)
    (gpudirect.fail_later if fault == "cufile-short" else gpudirect.fail)(fault, status)
    with pytest.raises(CuFileError, match=said) as caught:
        handles.read(context, 1, buffer.address, 2 * BLOCK_BYTES, BLOCK_BYTES)
    assert caught.value.status == (status if status > 5000 else 0)
    handles.close()
    buffer.close()


def test_a_file_that_is_not_taken(gpudirect: StandIn, files: FileSet) -> None:
    handles = FileHandles(files)
    gpudirect.fail("cuFileHandleRegister", 5008)
    with pytest.raises(CuFileError, match=r"CU_FILE_IO_NOT_SUPPORTED \(5008\): not for this file system or disk; .*/a"):
        handles.register(0)
    assert not handles.registered(0)
    handles.close()


def test_the_stand_in_sees_broken_rules(gpudirect: StandIn, files: FileSet) -> None:
    context = context_of(0)
    buffer, other = DeviceBuffer(context, BLOCK_BYTES), DeviceBuffer(context_of(1), BLOCK_BYTES)
    handles = FileHandles(files)
    handles.register(0)
    for address, offset, said in (
        (buffer.address + 8, 0, "go beyond their allocation"),
        (other.address, 0, "not the current device's"),
        (buffer.address, 5 * BLOCK_BYTES, "4096 bytes at 20480 of 20557"),
    ):
        with pytest.raises(CuFileError):
            handles.read(context, 0, address, BLOCK_BYTES, offset)
        assert said in gpudirect.violation()
    assert gpudirect.counts().violations == 3
    handles.close()
    buffer.close()
    other.close()
    gpudirect.reset()


def test_statuses_have_names() -> None:
    assert status_text(5015) == "CU_FILE_CUDA_CONTEXT_MISMATCH (5015)"
    assert status_text(5999) == "cuFile's status (5999)"
