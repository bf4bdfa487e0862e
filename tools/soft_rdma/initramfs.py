"""The guest's first file system as a cpio archive ("newc", what the kernel unpacks)."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

__all__ = ["Entry", "archive", "first_files"]

_END = "TRAILER!!!"
_APPLETS = ("sh", "cat", "chroot", "insmod", "mkdir", "mount", "poweroff")
_MOUNT_POINTS = ("proc", "sys", "dev", "host", "memory", "root")


@dataclass(frozen=True)
class Entry:
    """A file of the archive; `mode` as in stat, a device's numbers in `device`."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def archive(entries: Iterable[Entry]) -> bytes:
    """The entries as one archive; folders must come before what is in them."""
    records = [_record(number, entry) for number, entry in enumerate(entries, 1)]
    return b"".join([*records, _record(0, Entry(_END, 0))])


def first_files(busybox: bytes, init: bytes, job: bytes, modules: Sequence[tuple[str, bytes]]) -> list[Entry]:
    """What the guest begins with: busybox, our `/init`, its `/job`, and `/modules` with their order in `/order`."""
    folders = [Entry(name, stat.S_IFDIR | 0o755) for name in ("bin", "modules", *_MOUNT_POINTS)]
    links = [Entry(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in _APPLETS]
    order = [PurePosixPath(path).name for path, _ in modules]
    return [
        *folders,
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("bin/busybox", stat.S_IFREG | 0o755, busybox),
        *links,
        Entry("init", stat.S_IFREG | 0o755, init),
        Entry("job", stat.S_IFREG | 0o755, job),
        Entry("order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in order).encode()),
        *(Entry(f"modules/{name}", stat.S_IFREG | 0o644, data) for name, (_, data) in zip(order, modules, strict=True)),
    ]


def _record(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    head = b"070701" + "".join(f"{field:08X}" for field in fields).encode() + name
    return _padded(head) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
