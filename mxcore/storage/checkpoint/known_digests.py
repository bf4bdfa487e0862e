"""Checkpoint digests that were made before: the samples of a checkpoint are read once a node, not once a process.

A digest is kept under a name that says which files it is of, and what they were. By the first rank's telling it, ranks
would have to wait for one another; a file needs nobody, and serves the engine that starts next as well.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from mxserver.wire import remove_leftovers, unique_beside

__all__ = ["DIGEST_FORMAT", "SampledFile", "is_settled", "known_by_versions", "known_or_made"]

DIGEST_FORMAT = "checkpoint-digest-2"
NODE_FOLDER = Path("/dev/shm")  # noqa: S108 - in a folder of this user's own; it ends with the machine or the container
SETTLED_SECONDS = 2.0  # a file that was written to just now may be written to again within one tick of its times
WAIT_SECONDS = 20.0  # for another process of this node; then this one reads for itself
KEPT = 128
_PAUSE_SECONDS = 0.02
_HUB_FOLDER = ".mx-digests"
_HUB_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # git's SHA-1 of a small file, the SHA-256 of a large one
_DIGEST = re.compile("[0-9a-f]{16}")

_log = logging.getLogger(__name__)


class SampledFile(NamedTuple):
    """A file of a checkpoint: its name there, and what `stat` says of it."""

    name: str
    path: Path
    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, name: str, path: Path) -> SampledFile:
        """As it is now. Raises OSError."""
        found = path.stat()
        return cls(name, path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def known_or_made(what: str, files: Sequence[SampledFile], make: Callable[[], str]) -> str:
    """The digest of these files: one that is kept, or what `make` gives; `what` names the way in which it is made.

    It is kept for this user's processes on this node, by path, device, inode, size and times. Where all files are blobs
    of the hub's cache it is kept beside these, by name, size, mtime and the hub's own hash: then nothing is read where
    any process, on any node that has that cache or a copy of it, has read it once.

    Of processes that ask at the same time one makes it, the others wait for that, at most 20 s. Nothing is kept of
    files that changed meanwhile, or less than 2 s ago: their times might not tell the next change. Raises what `make`
    raises. Safe from any thread.
    """
    hub = _hub_repository(files)
    named = [_of_hub(file) for file in files] if hub is not None else [tuple(map(str, file)) for file in files]
    settled = is_settled(files)
    return _known_or_made([what, named], hub, make, lambda: settled and _are_as_they_were(files))


def is_settled(files: Sequence[SampledFile]) -> bool:
    """Whether the times of these files would tell a change that is made from now on."""
    newest = max(max(file.mtime_ns, file.ctime_ns) for file in files)
    return time.time_ns() - newest > SETTLED_SECONDS * 1e9


def known_by_versions(what: str, files: Sequence[tuple[str, int, str]], make: Callable[[], str]) -> str:
    """As `known_or_made`, for files that lie elsewhere: name, size, and a version that changes with the content.

    `what` names the place too. Where a file has no version, nothing is known or kept.
    """
    if not all(version for _, _, version in files):
        return make()
    return _known_or_made([what, *map(tuple, files)], None, make, lambda: True)


def _known_or_made(
    named: Sequence[object], beside: Path | None, make: Callable[[], str], may: Callable[[], bool]
) -> str:
    key = hashlib.sha256(repr([DIGEST_FORMAT, *named]).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    node = _own_folder()
    folders = [folder for folder in (beside, node) if folder is not None]
    if known := _read(folders, key):
        return known
    with _turn(node, key):
        if known := _read(folders, key):
            return known
        made = make()
        if may():
            for folder in folders:
                _keep(folder, key, made)
        return made


def _are_as_they_were(files: Sequence[SampledFile]) -> bool:
    with suppress(OSError):
        return all(SampledFile.of(file.name, file.path) == file for file in files)
    return False


def _hub_repository(files: Sequence[SampledFile]) -> Path | None:
    """Where digests are kept beside the hub's blobs, if all files are links to blobs of one repository."""
    blobs = set()
    for file in files:
        with suppress(OSError):
            blob = Path(os.path.realpath(file.path)) if file.path.is_symlink() else file.path
            blobs.add(blob.parent if _HUB_HASH.fullmatch(blob.name) else None)
    found = blobs.pop() if len(blobs) == 1 else None
    return found.parent / _HUB_FOLDER if found is not None and found.name == "blobs" else None


def _of_hub(file: SampledFile) -> tuple[str, ...]:
    return file.name, str(file.size_bytes), str(file.mtime_ns), os.path.basename(os.path.realpath(file.path))  # noqa: PTH119


def _own_folder() -> Path | None:
    """This user's folder on this node, which nobody else may write to; None where there is none."""
    folder = NODE_FOLDER / f"mx-digests-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if state.st_uid != os.getuid() or state.st_mode & 0o170077 != 0o040000:
            raise PermissionError(f"{folder} is not a folder of this user alone")
    except OSError as error:
        _log.warning("each process reads the checkpoint's samples for itself: %s", error)
        return None
    return folder


def _read(folders: Sequence[Path], key: str) -> str:
    for folder in folders:
        with suppress(OSError, ValueError):
            text = (folder / key).read_text("ascii")
            if _DIGEST.fullmatch(text):
                return text
    return ""


def _keep(folder: Path, key: str, digest: str) -> None:
    """Best effort: a folder that cannot be written to costs the next process its own reading."""
    beside = unique_beside(folder / key)
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
        try:
            beside.write_text(digest, "ascii")
            beside.replace(folder / key)
        finally:
            beside.unlink(missing_ok=True)
        kept = sorted((entry.stat().st_mtime, entry.name) for entry in os.scandir(folder) if "." not in entry.name)
        for _, old in kept[:-KEPT]:
            (folder / old).unlink(missing_ok=True)


@contextmanager
def _turn(folder: Path | None, key: str) -> Iterator[None]:
    """Within it this process is the only one of the node, or has waited for long enough."""
    from filelock import FileLock  # a tenth of a second: where a digest has to be made

    with ExitStack() as held:
        if folder is not None:
            place = folder / f"{key[0]}.lock"  # it stays: there are 16 at most
            try:
                held.enter_context(FileLock(place, WAIT_SECONDS, poll_interval=_PAUSE_SECONDS))
            except OSError as error:  # a timeout is one
                _log.debug("no lock at %s: %s", place, error)
        yield
