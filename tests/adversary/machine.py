"""What fails around a server: its disk, and the wall clock."""

from __future__ import annotations

import errno
import shutil
import struct
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CLOCK_LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


class FaultyDisk:
    """A disk for one process, healthy at first. `environ` starts the process on it."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        """`folder` is what lies on the disk; `scratch` lies elsewhere."""
        compiler = shutil.which("cc")
        assert compiler is not None, "a C compiler is missing; the tests have one where the core was built"
        library, self._control = scratch / "disk_faults.so", scratch / "disk_faults"
        source = str(HERE / "disk_faults.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), source, "-ldl"], check=True)
        self._control.write_bytes(bytes(8))
        self.environ = {
            "LD_PRELOAD": str(library),
            "FAULT_FOLDER": str(folder.resolve()),
            "FAULT_CONTROL": str(self._control),
        }

    def _set(self, number: int, sync_ms: int) -> None:
        with self._control.open("r+b") as file:  # in place: the process has it mapped
            file.write(struct.pack("=ii", number, sync_ms))

    def works(self) -> None:
        self._set(0, 0)

    def is_slow(self, seconds: float) -> None:
        """Every sync takes so long."""
        self._set(0, round(seconds * 1000))

    def is_full(self) -> None:
        self._set(errno.ENOSPC, 0)

    def is_read_only(self) -> None:
        self._set(errno.EROFS, 0)


class WallClock:
    """A wall clock for one process, right at first; the monotonic one stays right. `environ` starts a process by it."""

    def __init__(self, scratch: Path) -> None:
        assert CLOCK_LIBRARIES, "libfaketime is missing: install Debian's package faketime"
        self._file = scratch / "wall_clock"
        self.shift(0)
        self.environ = {
            "LD_PRELOAD": str(CLOCK_LIBRARIES[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",  # seconds; without it each look at a clock reads the file
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def shift(self, seconds: int) -> None:
        """So far from the machine's time."""
        self._file.write_text(f"{seconds:+d}\n")
