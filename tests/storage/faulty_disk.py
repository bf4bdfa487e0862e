"""A file system of one file whose disk fails on demand: a FUSE server that speaks /dev/fuse's protocol itself.

    with faulty_disk(file, error_at=5_000_000) as path: ...

What a real disk does once in a while, the kernel does here at the byte that is asked for, by every way to read: EIO
(SIGBUS for who mapped it), short reads, EINTR, a file that is shorter than its size. The server is a process with a
mount namespace of its own, so that no mount outlives it; the file is reached through that process' root in /proc.

Protocol: linux/fuse.h, libfuse's documentation. Needs root and /dev/fuse: `cannot_run` says why it does not work here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT_NODE, FILE_NODE = 1, 2
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT = 1, 2, 3, 14, 15, 17, 18, 25, 26
INTERRUPT, BATCH_FORGET = 36, 42
DIRECT_IO = 1  # FOPEN_DIRECT_IO: nothing is cached, no shared mappings, short reads are passed on
CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_NODEV, MS_NOSUID = 0x20000, 0x4000, 1 << 18, 4, 2
NAME = "x.safetensors"


def cannot_run() -> str:
    """Why there is no faulty disk here; "" where there is one."""
    if os.geteuid() != 0:
        return "a FUSE mount in a namespace of its own needs root"
    if not Path("/dev/fuse").exists():
        return "there is no /dev/fuse"
    return ""


@contextlib.contextmanager
def faulty_disk(
    file: Path,
    *,
    error_at: int | None = None,
    stale_at: int | None = None,
    ends_at: int | None = None,
    most_bytes: int | None = None,
    interrupts: int = 0,
    direct: str = "",
    cached: bool = True,
) -> Iterator[Path]:
    """The path of a file with the content of `file`.

    Reads that reach byte `error_at` fail with EIO, those of more than a page that reach `stale_at` with ESTALE until
    the file is opened again. Nothing is there from byte `ends_at` on, as when another machine has cut the file: its
    size says so only once a read has come that far. No read gives more than `most_bytes`. Every
    second read fails with EINTR, `interrupts` times. `direct` says whether O_DIRECT is refused, "at open" or "at read".
    `cached` False: each read goes to the disk, as with network file systems that cache nothing, and the file cannot be
    mapped.
    """
    how = {
        "error_at": error_at,
        "stale_at": stale_at,
        "ends_at": ends_at,
        "most_bytes": most_bytes,
        "interrupts": interrupts,
    }
    words = json.dumps({**how, "direct": direct, "cached": cached})
    command = [sys.executable, "-m", "tests.storage.faulty_disk", str(file), words]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline().strip()
            if not said.startswith("mounted "):
                raise RuntimeError(f"the faulty disk did not start: {said!r}")
            yield Path(f"/proc/{server.pid}/root{said.removeprefix('mounted ')}") / NAME
        finally:
            server.kill()


def _mount(place: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)

    def checked(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive a test run that is killed
    checked(libc.unshare(CLONE_NEWNS))
    checked(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    checked(libc.mount(b"faulty", place.encode(), b"fuse", MS_NODEV | MS_NOSUID, options.encode()))
    return device


class _Server:
    def __init__(self, device: int, data: bytes, how: dict[str, Any]) -> None:
        self._device = device
        self._data = data
        self._how = how
        self._size = len(data)
        self._reads = 0
        self._interrupts = how["interrupts"]
        self._is_stale = False

    def run(self) -> None:
        """Answers until the mount is gone."""
        while True:
            try:
                request = os.read(self._device, 2 << 20)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):  # ENOENT: a request that was taken back
                    continue
                return
            _, code, unique, node = struct.unpack_from("<IIQQ", request)
            if code in (FORGET, BATCH_FORGET, INTERRUPT):
                continue
            number, answer = self._answer(code, node, request[40:])
            with contextlib.suppress(FileNotFoundError):  # who asked has given up
                os.write(self._device, struct.pack("<IiQ", 16 + len(answer), -number, unique) + answer)

    def _answer(self, code: int, node: int, body: bytes) -> tuple[int, bytes]:
        if code == INIT:
            flags = 1 | 1 << 15 | 1 << 22  # FUSE_ASYNC_READ, FUSE_ASYNC_DIO, FUSE_MAX_PAGES
            return 0, struct.pack("<IIIIHHIIHH8I", 7, 31, 1 << 20, flags, 16, 12, 1 << 20, 1, 256, 0, *[0] * 8)
        if code == LOOKUP:
            if body.rstrip(b"\0") != NAME.encode():
                return errno.ENOENT, b""
            return 0, struct.pack("<QQQQII", FILE_NODE, 0, 60, 60, 0, 0) + self._attributes(FILE_NODE)
        if code == GETATTR:
            return 0, struct.pack("<QII", 60, 0, 0) + self._attributes(node)
        if code == OPEN:
            if self._how["direct"] == "at open" and struct.unpack_from("<I", body)[0] & os.O_DIRECT:
                return errno.EINVAL, b""
            if self._is_stale:
                self._how["stale_at"] = None
            return 0, struct.pack("<QII", 0, 0 if self._how["cached"] else DIRECT_IO, 0)
        if code == READ:
            _, offset, size, _, _, flags = struct.unpack_from("<QQIIQI", body)
            if self._how["direct"] == "at read" and flags & os.O_DIRECT:
                return errno.EINVAL, b""
            return self._read(offset, size)
        if code == STATFS:
            return 0, struct.pack("<5Q10I", 1 << 20, 0, 0, 2, 0, 4096, 255, 4096, *[0] * 7)
        return (0, b"") if code in (FLUSH, RELEASE) else (errno.ENOSYS, b"")

    def _attributes(self, node: int) -> bytes:
        size = self._size if node == FILE_NODE else 0
        mode = stat.S_IFREG | 0o644 if node == FILE_NODE else stat.S_IFDIR | 0o755
        return struct.pack("<6Q10I", node, size, -(-size // 512), 1, 1, 1, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _read(self, offset: int, size: int) -> tuple[int, bytes]:
        self._reads += 1
        error_at = self._how["error_at"]
        if self._interrupts and self._reads % 2 == 0:
            self._interrupts -= 1
            return errno.EINTR, b""
        stale_at = self._how["stale_at"]
        if stale_at is not None and offset + size > stale_at and size > 4096:
            self._is_stale = True
            return errno.ESTALE, b""
        if error_at is not None and offset + size > error_at:
            return errno.EIO, b""
        ends_at = len(self._data) if self._how["ends_at"] is None else self._how["ends_at"]
        if offset + size > ends_at:
            self._size = ends_at
        end = min(offset + min(size, self._how["most_bytes"] or size), ends_at)
        return 0, self._data[offset : max(offset, end)]


def main() -> None:
    """Serves until killed."""
    file, how = Path(sys.argv[1]), json.loads(sys.argv[2])
    place = str(file.parent)  # covered by the mount in this namespace alone
    data = file.read_bytes()
    device = _mount(place)
    sys.stdout.write(f"mounted {place}\n")
    sys.stdout.flush()
    _Server(device, data, how).run()


if __name__ == "__main__":
    main()
