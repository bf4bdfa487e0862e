"""GPUDirect Storage (libcufile.so.0): looked for and told, not used.

Reads from a disk straight into device memory need the nvidia-fs kernel module, a file system and a disk that it knows,
and are slower than host memory in compatibility mode. What is written here without such a machine could only be assumed
to work, so it says what is there and why bytes pass the pinned ring all the same.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

__all__ = ["DirectStorage", "probe"]

LIBRARY = "libcufile.so.0"


class DirectStorage(NamedTuple):
    """What there is of it. `not_used_because` is never empty in this version."""

    library: bool
    kernel_module: bool
    version: str  # of the library, "" where it does not tell
    not_used_because: str


def probe(root: Path = Path("/"), library: str = LIBRARY) -> DirectStorage:
    """Looks for library and kernel module; opens no driver of it, reads nothing. Never raises."""
    module = (root / "proc/driver/nvidia-fs").is_dir() or (root / "sys/module/nvidia_fs").is_dir()
    try:
        opened = ctypes.CDLL(library)
    except OSError:
        return DirectStorage(False, module, "", f"{library} is not there")
    version = _version(opened)
    if not module:
        return DirectStorage(
            True, False, version, "the nvidia-fs kernel module is not loaded: it would only copy itself"
        )
    return DirectStorage(True, True, version, "this version reads by way of pinned host memory alone")


def _version(opened: ctypes.CDLL) -> str:
    number = ctypes.c_int()
    try:
        failed = opened.cuFileGetVersion(ctypes.byref(number))
    except AttributeError:  # only in newer ones
        return ""
    # CUfileError_t has two fields of 4 bytes, the first one 0 for success; ctypes takes the first from the register.
    return "" if failed else f"{number.value // 1000}.{number.value % 1000 // 10}"
