"""What is below a prefix: the objects that can be files. A key that can be none costs itself, and not the prefix."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

__all__ = ["StoredObject", "listed_objects"]

_LOG = logging.getLogger(__name__)

_AFTER_ODD_KEYS = "0"  # "", "." and ".." between slashes sort before it, and so do names that begin with a dot


class StoredObject(NamedTuple):
    """An object below a prefix: its path there, its bytes, and its ETag ("" without one)."""

    path: str
    size_bytes: int
    etag: str


def listed_objects(store: Any, prefix: str) -> list[StoredObject]:
    """The objects below a prefix ("" is the whole bucket), sorted by path. Raises what obstore raises.

    Left out are what consoles make for folders (0 bytes, at the name of a folder) and keys that are no paths ("a//b",
    "a/../b"), with a warning.
    """
    import obstore.exceptions

    try:
        found = list(_all(store, prefix))
    except obstore.exceptions.InvalidPathError as error:
        _LOG.warning("left out: %s", str(error).partition("\n")[0])
        found = list(_by_folders(store, prefix, is_top=True))
    begin = f"{prefix}/" if prefix else ""
    folders = {prefix, *_folders(item["path"] for item in found)}
    objects = (
        StoredObject(item["path"].removeprefix(begin), item["size"], item["e_tag"] or "")
        for item in found
        if (item["size"] or item["path"] not in folders) and item["path"].startswith(begin)
    )
    return sorted(one for one in objects if one.size_bytes or not _is_marker(store, begin + one.path))


def _all(store: Any, prefix: str, offset: str | None = None) -> Iterator[Any]:
    import obstore

    for batch in obstore.list(store, prefix or None, offset=offset):
        yield from batch


def _by_folders(store: Any, prefix: str, *, is_top: bool = False) -> Iterator[Any]:
    """Folder by folder, since obstore refuses a whole answer for one such key; raises where nothing is left."""
    import obstore
    import obstore.exceptions

    try:
        answer = obstore.list_with_delimiter(store, prefix or None)
    except obstore.exceptions.InvalidPathError:
        try:
            yield from _all(store, prefix, f"{prefix}/{_AFTER_ODD_KEYS}" if prefix else _AFTER_ODD_KEYS)
        except obstore.exceptions.InvalidPathError as error:
            if is_top:
                raise
            _LOG.warning("left out with its folder: %s", str(error).partition("\n")[0])
        return
    yield from answer["objects"]
    for folder in answer["common_prefixes"]:
        yield from _by_folders(store, folder)


def _folders(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        while "/" in path:
            path = path.rpartition("/")[0]
            yield path


def _is_marker(store: Any, path: str) -> bool:
    """Whether an object of 0 bytes is the mark of an empty folder: its key ends with a slash, and is no path here."""
    import obstore

    try:
        obstore.head(store, path)
    except FileNotFoundError:
        return True
    return False
