"""Opens and reads checkpoints wherever they lie."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

from mxcore.errors import ModeUnavailable, SignatureError
from mxcore.memory import HostBuffer
from mxcore.storage.access.remote_checkpoint import RemoteCheckpoint, open_at
from mxcore.storage.checkpoint import Checkpoint, Framework, TensorViews, chosen_framework, refuse_unknown
from mxcore.storage.checkpoint import open_checkpoint as open_local
from mxcore.storage.load import LoadReport
from mxcore.storage.load import load as load_local
from mxcore.storage.load import load_file as load_local_file
from mxcore.storage.load import stream as stream_local
from mxcore.storage.plan import Progress, Want, merged, parts_of

__all__ = ["Place", "load", "load_file", "open_checkpoint", "stream"]

Place: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A .safetensors file, a list of them, an index, a directory, or a URI: s3://, gs://, az:// or file:// and a folder."""

_ALIGNED_BYTES = 64


def open_checkpoint(place: Place) -> Checkpoint:
    """Reads the headers of a checkpoint; of a directory or prefix, those of the files that an engine reads.

    Of an object store it is a `RemoteCheckpoint`, which lists the prefix once; credentials and endpoint are those of
    the store's own variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …). Safe from any thread.

    Raises StorageError (ObjectStoreError and its kin for a store), a SafetensorsError for a broken header,
    CheckpointError for files that are not one checkpoint, SettingError for a URI that is none; SignatureError where
    MX_MODEL_SIGNATURE=require: engines' loads alone verify signatures.
    """
    _refuse_unverified(place)
    if not isinstance(place, str) or "://" not in place:
        return open_local(place)
    from mxcore.storage.remote import parse_model_uri

    uri = parse_model_uri(place, "the checkpoint's URI")
    return open_local(uri.folder) if uri.is_local else open_at(uri)


def load(
    checkpoint: Checkpoint | Place,
    wants: Mapping[str, Any] | Iterable[Want],
    *,
    mode: str | None = None,
    progress: Progress | None = None,
) -> LoadReport:
    """Reads tensors, or boxes of them, into the memory of torch or numpy tensors; returns when all is there.

    `wants` maps names to destinations in host memory of the tensor's shape and dtype, or is a sequence of `Want(name,
    destination, box)`; a box has (first, end) for each dimension, and only its bytes are read. `mode` forces a way to
    read local files (docs/explanation/storage.md). `progress` is called with (bytes done, bytes in all).

    Raises KeyError, IndexError, DestinationMismatch before anything is read; StorageError and its kin: what the
    destinations hold is undefined then, and nothing writes to them any more.
    """
    with _Opened(checkpoint) as opened:
        if not isinstance(opened, RemoteCheckpoint):
            return load_local(opened, wants, mode=mode, progress=progress)
        if mode is not None:
            raise ModeUnavailable(f"mode={mode!r} is for local files; {opened.folder.name} is read by ranges")
        listed = [Want(name, to) for name, to in wants.items()] if isinstance(wants, Mapping) else list(wants)
        return opened.read(merged(row for want in listed for row in parts_of(opened, want)), progress)


def stream(
    checkpoint: Checkpoint | Place,
    names: Collection[str] | None = None,
    *,
    framework: Framework | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yields (name, tensor) in file order through a bounded ring; `names` picks some.

    `framework`: torch where it is installed, else numpy, which gets types that it lacks (bfloat16, fp8) as bytes. A
    tensor that is kept keeps its memory. Raises as `load`. One thread at a time.
    """
    made_by = chosen_framework(framework)
    with _Opened(checkpoint) as opened:
        if isinstance(opened, RemoteCheckpoint):
            from mxcore.storage.remote import stream_remote

            yield from stream_remote(opened.folder, opened, names, framework=made_by, progress=progress)
        else:
            yield from stream_local(opened, names, framework=made_by, progress=progress)


def load_file(place: Place, *, framework: Framework | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """All tensors of a checkpoint by name, in file order, on one stretch of memory that lives as long as any of them.

    `framework` as for `stream`. Raises as `open_checkpoint` and `load`.
    """
    made_by = chosen_framework(framework)
    _refuse_unverified(place)
    if not isinstance(place, str) or "://" not in place:
        return load_local_file(place, framework=made_by, progress=progress)
    with _Opened(place) as opened:
        if not isinstance(opened, RemoteCheckpoint):
            return load_local_file(opened.files, framework=made_by, progress=progress)
        refuse_unknown(opened.tensors.values(), made_by)
        begins, at = [], 0
        for info in opened.tensors.values():
            begins.append(at)
            at += -(-info.size_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
        infos = list(zip(opened.tensors.values(), begins, strict=True))
        buffer = HostBuffer(max(at, 1))
        try:
            address = buffer.address
            rows = [(info.file, info.offset, info.size_bytes, 0, 1, address + at, 0) for info, at in infos]
            opened.read([row for row in rows if row[2]], progress)
            views = TensorViews(buffer, made_by)
            return {info.name: views.tensor(info, at) for info, at in infos}
        finally:
            buffer.close_after_exports()


def _refuse_unverified(place: Place) -> None:
    """Where signatures are required nothing is read that nobody verifies. Whatever is not `off` requires them."""
    if os.environ.get("MX_MODEL_SIGNATURE", "off").strip().lower() != "off":
        raise SignatureError(
            f"{place} is not opened: MX_MODEL_SIGNATURE requires signatures, which an engine's load verifies and these "
            "functions do not; verify it by `model_signing verify`, and unset that for this process"
        )


class _Opened:
    """Within it, the checkpoint of a place, closed at the end; one that is open already stays so."""

    def __init__(self, checkpoint: Checkpoint | Place) -> None:
        self._given = isinstance(checkpoint, Checkpoint)
        self._checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)

    def __enter__(self) -> Checkpoint:
        return self._checkpoint

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._given and isinstance(self._checkpoint, RemoteCheckpoint):
            self._checkpoint.close()
