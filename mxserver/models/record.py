"""The cache's record of a model: a JSON file beside the data, written in one step."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from mxserver.models.names import ModelKey, model_name
from mxserver.wire import MxError, path_problem, unique_beside
from mxserver.wire.proto import model_pb2

VERSION = 1
LONGEST_PLACE_BYTES = 3072  # a name as long as any, below the folders of its model


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: its name in the model, its bytes, its digest (`xxh3-64:HEX`), and its place in the cache folder."""

    path: str
    size: int
    digest: str
    place: str


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One revision of a model, as far as it was downloaded.

    `listed` are all names that the provider lists; None where it was never asked (records of earlier servers, and of
    models that were found in the folder while HF_HUB_OFFLINE was set).
    """

    key: ModelKey
    files: tuple[FileRecord, ...]
    has_weights: bool  # False: it was downloaded with ignore_weights only
    created_ms: int
    listed: tuple[str, ...] | None = None

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def to_json(self) -> str:
        return json.dumps(
            {
                "version": VERSION,
                "provider": self.key.model.provider_name,
                "name": self.key.model.name,
                "revision": self.key.revision,
                "has_weights": self.has_weights,
                "created_ms": self.created_ms,
                "listed": self.listed,
                "files": [asdict(file) for file in self.files],
            },
            indent=1,
        )


class BadRecord(ValueError):
    """An invalid record, not written by us; the message says what is wrong."""


def record_from_json(text: str) -> ModelRecord:
    """Raises BadRecord, so that a damaged record does not misdirect a stream or a removal."""
    try:
        fields = json.loads(text)
        if fields["version"] != VERSION:
            raise BadRecord(f"version {fields['version']!r} is not {VERSION}")
        model = model_name(model_pb2.ModelProvider.Value(fields["provider"]), fields["name"])
        files = tuple(FileRecord(**file) for file in fields["files"])
        listed = fields.get("listed")
        record = ModelRecord(
            ModelKey(model, str(fields["revision"])),
            files,
            bool(fields["has_weights"]),
            int(fields["created_ms"]),
            None if listed is None else tuple(map(str, listed)),
        )
        problems = [problem for file in files if (problem := path_problem(file.path))]
        problems += [problem for file in files if (problem := path_problem(file.place, LONGEST_PLACE_BYTES))]
        if (problem := path_problem(record.key.revision)) or "/" in record.key.revision:
            problems.append(f"revision {record.key.revision[:100]!r} is refused: {problem or 'it has a slash'}")
        problems += [f"size {file.size!r}" for file in files if type(file.size) is not int or file.size < 0]
    except (KeyError, TypeError, ValueError, MxError) as error:
        raise BadRecord(f"{type(error).__name__}: {error}") from error
    if problems:
        raise BadRecord(problems[0])
    return record


def write_in_one_step(path: Path, text: str, scratch: Path) -> None:
    """Writes a file in `scratch` (same file system) and renames it: it is never incomplete, also after power loss.

    Raises OSError; FileNotFoundError if `scratch` was moved away, by which a fenced writer notices that.
    """
    beside = unique_beside(scratch / path.name)
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with os.fdopen(handle, "wb") as opened:
        opened.write(text.encode())
        opened.flush()
        os.fsync(handle)
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames into a folder survive a power loss."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
