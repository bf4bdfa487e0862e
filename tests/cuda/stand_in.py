"""Builds and steers tests/cuda/driver, the driver without a GPU."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mxcore.cuda import driver as cuda_driver

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).parent / "driver"
FILES = ("control.c", "handles.c", "memory.c", "kernels.c", "cufile.c")


class Counts(NamedTuple):
    """What lives (up to what other processes exported), and what has happened since the last reset."""

    contexts: int
    streams: int
    events: int
    device_allocations: int
    host_allocations: int
    registrations: int
    modules: int
    opened: int
    cufile_drivers: int
    cufile_handles: int
    violations: int
    copies: int
    unpinned_copies: int
    launches: int
    cufile_reads: int

    @property
    def live(self) -> tuple[int, ...]:
        return tuple(self[:10])


def build(folder: Path) -> Path:
    """The library, compiled with the machine's cc (and CFLAGS, where a sanitizer's build sets it)."""
    library = folder / "libmx_cuda_stand_in.so"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    flags = [
        "-std=gnu11",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-pthread",
    ]
    sources = [str(SOURCES / name) for name in FILES]
    extra = shlex.split(os.environ.get("CFLAGS", ""))
    subprocess.run(
        [compiler, *flags, *extra, "-I", str(ROOT / "mxcore"), *sources, "-o", str(library)], check=True, timeout=300
    )
    return library


class StandIn:
    """The loaded stand-in. One a process: a driver cannot be exchanged."""

    def __init__(self, library: Path) -> None:
        cuda_driver._load_stand_in(str(library))
        self._library = ctypes.CDLL(str(library))
        self.path = library

    def counts(self) -> Counts:
        values = (ctypes.c_int64 * len(Counts._fields))()
        self._library.mx_stand_in_counts(values)
        return Counts(*values)

    def violation(self) -> str:
        """The last broken rule."""
        text = ctypes.create_string_buffer(512)
        self._library.mx_stand_in_violation(text, ctypes.c_size_t(len(text)))
        return text.value.decode()

    def fail(self, function: str, status: int, after: int = 0) -> None:
        """The call of `function` after `after` good ones returns `status`."""
        self._library.mx_stand_in_fail(function.encode(), ctypes.c_int64(after), status)

    def fail_later(self, what: str, status: int, after: int = 0) -> None:
        """A "copy" or "launch" fails when its stream comes to it; cuFile's faults are named in driver/cufile.c."""
        self._library.mx_stand_in_fail_later(what.encode(), ctypes.c_int64(after), status)

    def flip(self, after: int = 0) -> None:
        """The copy after `after` good ones writes one wrong bit."""
        self._library.mx_stand_in_flip(ctypes.c_int64(after))

    @contextmanager
    def holding(self) -> Iterator[None]:
        """No stream does anything meanwhile, and no read of cuFile's begins."""
        self._library.mx_stand_in_hold(1)
        try:
            yield
        finally:
            self._library.mx_stand_in_hold(0)

    def close_cufile(self) -> None:
        """As a process' end does, after a close that failed."""
        self._library.cuFileDriverClose_v2()

    def unmap(self, address: int) -> None:
        """As a process' end does, after a close that failed."""
        assert self._library.cuIpcCloseMemHandle(ctypes.c_uint64(address)) == 0

    def memory(self, size_bytes: int) -> None:
        """What each device has."""
        self._library.mx_stand_in_memory(ctypes.c_size_t(size_bytes))

    def share(self, share: bool = True) -> None:
        """Device memory that is made from now on can be exported, as cudaMalloc's; at first it cannot."""
        self._library.mx_stand_in_share(int(share))

    def devices(self, number: int) -> None:
        """How many devices can be seen (up to 2)."""
        self._library.mx_stand_in_devices(number)

    def reset(self) -> None:
        """No faults, no errors, no complaints."""
        self._library.mx_stand_in_reset()
