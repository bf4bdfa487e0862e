"""Removing single files below the cache's root, by descriptor: no symbolic link is followed on the way."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

_LOG = logging.getLogger(__name__)


def remove_file_below(root: Path, name: str) -> None:
    """Deletes a file or link by its name below `root`; nothing happens where it is missing or a link is on the way.

    Raises:
        OSError: as unlink does.
    """
    with _parent(root, name) as parent, suppress(FileNotFoundError):
        if parent is not None:
            os.unlink(PurePosixPath(name).name, dir_fd=parent)


def remove_link_below(root: Path, name: str, *, to: str) -> None:
    """Deletes a symbolic link if it leads to `to`, a name below `root`; any other file or link stays.

    Raises:
        OSError: as unlink does.
    """
    with _parent(root, name) as parent:
        if parent is None:
            return
        last = PurePosixPath(name).name
        try:
            target = os.readlink(last, dir_fd=parent)
        except OSError:  # it is no link, or not there
            return
        if os.path.normpath((root / name).parent / target) == os.path.normpath(root / to):
            os.unlink(last, dir_fd=parent)


def remove_empty_folders_below(root: Path, name: str, *, down_to: str) -> None:
    """Deletes the folders of `name` that are empty, the innermost first, `down_to` last."""
    folder = PurePosixPath(name).parent
    while folder.is_relative_to(down_to):
        with _parent(root, str(folder)) as parent:
            if parent is not None:
                try:
                    os.rmdir(folder.name, dir_fd=parent)
                except FileNotFoundError:
                    pass
                except OSError:  # it is not empty
                    return
        folder = folder.parent


@contextmanager
def _parent(root: Path, name: str) -> Iterator[int | None]:
    """The folder that has `name`, opened; None where it is missing or not below `root` without links."""
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found: int | None = at
        for part in PurePosixPath(name).parts[:-1]:
            try:
                if part == "..":
                    raise NotADirectoryError(f"{name} climbs")
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            except FileNotFoundError:
                found = None
                break
            except OSError as error:
                _LOG.warning("left where it is name=%s reason=%s", name, error)
                found = None
                break
            os.close(at)
            at = found = inner
        yield found
    finally:
        os.close(at)
