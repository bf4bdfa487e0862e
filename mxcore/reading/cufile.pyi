"""cuFile (GPUDirect Storage): its library, opened at first use, its driver, and files registered with it.

Importing this opens nothing. Safe from any thread; calls that may take a while release the GIL. libcufile has ended
processes that opened it where it did not fit, and has spun for ever (1.20, without a CUDA driver): `cufile_trial`
tries it in a process of its own first.
"""

from typing import final

from mxcore.cuda import Context
from mxcore.reading.file_set import FileSet

CANDIDATES: tuple[str, ...]
"""Where the library is looked for before the folders of installed wheels."""
BLOCK_BYTES: int
"""What `FileHandles.read` reads is a multiple of this, and begins at one in the file."""
LEAST_BYTES: int
"""Shorter stretches of a load go through the ring."""

def candidates() -> list[str]:
    """All places, in the order in which they are tried."""

def load_library() -> str:
    """Opens the library, once; returns what it was opened by. CuFileMissing says where it was looked for."""

def library_file() -> str:
    """The library's file, for another process to open; raises as `load_library`."""

def version() -> tuple[int, int]:
    """The library's, such as (1, 14). CuFileMissing, CuFileError."""

def driver_is_open() -> bool:
    """Whether `FileHandles` of this process hold the driver open."""

def _load_stand_in(path: str) -> None:
    """For tests alone: loads tests/cuda/driver's library, which `load_library` refuses. CuFileError if one is."""

def _forget_refusal() -> None:
    """For tests alone: a driver that failed to open is opened again."""

@final
class FileHandles:
    """Those files of a FileSet that cuFile reads; close it before the FileSet. One thread at a time.

    Making it opens cuFile's driver with its compatibility mode forbidden, the last one's `close` closes it, which gives
    back what cuFile holds of device memory. Raises CuFileMissing, and CuFileError where the driver does not open so, or
    failed to before in this process (it is not tried twice), or is open for somebody else.
    """

    def __init__(self, files: FileSet) -> None: ...
    @property
    def files(self) -> FileSet: ...
    def register(self, index: int) -> None:
        """Registers a file, opened with O_DIRECT. CuFileError if cuFile does not take it."""

    def deregister(self, index: int) -> None:
        """No read of that file by cuFile is under way any more, and none begins."""

    def registered(self, index: int) -> bool: ...
    def read(self, context: Context, index: int, address: int, size_bytes: int, offset: int) -> None:
        """Whole blocks of a registered file into device memory of that context; they are there when it returns.

        cuFile knows no streams: what was given to any for that memory has to be done before. CuFileError.
        """

    def failure(self) -> Exception | None:
        """What the last run of `checkpoint_reader.read_jobs` failed with, a CuFileError; None if with nothing."""

    def close(self) -> None:
        """Deregisters all, and closes the driver after the last user. CuFileError if that fails. Idempotent."""
