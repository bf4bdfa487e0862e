"""What a checkpoint has, without reading its data: names, dtypes, shapes, and where each tensor lies."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from mxcore.errors import CheckpointError, StorageError
from mxcore.process import collection_paused
from mxcore.safetensors import FileStamp, Header, read_header
from mxserver.wire import INDEX_SUFFIX, WeightFiles, weight_files_in

__all__ = ["INDEX_SUFFIX", "Checkpoint", "TensorInfo", "assembled", "open_checkpoint", "weight_map_of"]

_HEADER_THREADS = 8  # it is latency that is shared
_log = logging.getLogger(__name__)
PathLike = str | os.PathLike[str]


class TensorInfo(NamedTuple):
    """One tensor: `dtype` is safetensors' code, `offset` and `size_bytes` are bytes in `files[file]`.

    The last dimension of F4 counts pairs, as in torch: [4, 8] of the file is [4, 4] of float4_e2m1fn_x2.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    size_bytes: int


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint by name, in file order (files as given, tensors by their place). Immutable.

    It holds no open file: reading opens them, and refuses one that is not what it was when its header was read; of that
    `stamps` has each file's `Header.stamp`, None if unknown.
    """

    def __init__(
        self, files: Sequence[Path], tensors: Mapping[str, TensorInfo], stamps: Sequence[FileStamp | None] = ()
    ) -> None:
        self.files: tuple[Path, ...] = tuple(files)
        self.stamps: tuple[FileStamp | None, ...] = tuple(stamps) or (None,) * len(self.files)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def total_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    def __repr__(self) -> str:
        return f"<Checkpoint of {len(self.files)} files, {len(self)} tensors, {self.total_bytes} bytes>"


def open_checkpoint(path: PathLike | Sequence[PathLike]) -> Checkpoint:
    """Reads the headers of a file, of several, of an index's files, or of a directory's. Safe from any thread.

    `path` is a .safetensors file, a list of them, a *.safetensors.index.json, or a directory; of a
    directory those are taken that the engine reads (`weight_files`), as its index lists them if there is one.

    Raises StorageError for what cannot be opened, a SafetensorsError for a broken header, and CheckpointError for an
    index that is none, one that names what the files do not have, a name that two files have, or no files at all.
    """
    if not isinstance(path, str | os.PathLike):
        return _with_files([Path(file) for file in path], None, ", ".join(str(file) for file in path))
    place = Path(path)
    if place.is_dir():
        chosen = _chosen(place)
        if chosen.index_file is None:
            return _with_files([place / name for name in chosen.files], None, str(place))
        place /= chosen.index_file
    if place.name.endswith(".json"):
        weight_map = _read_index(place)
        names = sorted(set(weight_map.values()))
        return _with_files([_beside(place, name) for name in names], weight_map, str(place))
    return _with_files([place], None, str(place))


def _chosen(folder: Path) -> WeightFiles:
    """What the engine would read, of which safetensors are ours."""
    try:
        chosen = weight_files_in(folder)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read: {error.strerror}", file=str(folder)) from error
    if chosen.files and not chosen.files[0].endswith(".safetensors"):
        return WeightFiles()
    return chosen


def _with_files(files: list[Path], weight_map: Mapping[str, str] | None, what: str) -> Checkpoint:
    if not files:
        raise CheckpointError(f"{what}: no *.safetensors there: is the download complete?")
    with ThreadPoolExecutor(min(_HEADER_THREADS, len(files))) as pool:
        headers = list(pool.map(read_header, files))
    return assembled(files, headers, weight_map, what)


def assembled(
    files: Sequence[Path], headers: Sequence[Header], weight_map: Mapping[str, str] | None, what: str
) -> Checkpoint:
    """One checkpoint of files with these headers; `weight_map` is an index's, `what` names it all in errors.

    Of a tensor that several files have, the one that the index names is taken. What the index does not name at all
    belongs to the checkpoint too, as for vLLM: quantisation writes scales that no index lists.

    Raises CheckpointError for a name that two files have and no index decides on, for an index that names what the
    files do not have, and for a tensor of F4 whose last dimension is odd.
    """
    tensors: dict[str, TensorInfo] = {}
    copies: list[str] = []
    with collection_paused():
        for file, header in enumerate(headers):
            copies += _add(tensors, file, files, header, weight_map or {})
    if copies:
        _log.warning("%s: another file has these by the index, the copies are left out: %s", what, _some(copies))
    if weight_map is not None:
        _check_index(tensors, files, weight_map, what)
    return Checkpoint(files, tensors, [header.stamp for header in headers])


def _add(
    tensors: dict[str, TensorInfo], file: int, files: Sequence[Path], header: Header, weight_map: Mapping[str, str]
) -> Iterator[str]:
    """Yields the names that the index gives to another file: these are left out."""
    data_offset, own_name = header.data_offset, files[file].name
    for entry in header.tensors:
        if weight_map.get(entry.name, own_name) != own_name:
            yield entry.name
            continue
        if entry.name in tensors:
            raise CheckpointError(
                f"{files[tensors[entry.name].file]} and {files[file]} both have {entry.name!r}, and no index says "
                "which one counts: no one checkpoint"
            )
        shape = entry.shape if entry.dtype != "F4" else _shape_in_pairs(entry.shape, entry.name, files[file])
        tensors[entry.name] = TensorInfo(
            entry.name, entry.dtype, shape, file, data_offset + entry.begin, entry.size_bytes
        )


def _shape_in_pairs(shape: tuple[int, ...], name: str, file: Path) -> tuple[int, ...]:
    if not shape or shape[-1] % 2:
        raise CheckpointError(
            f"{file}: {name!r} is F4 {list(shape)}: its last dimension is odd, and elements come in pairs"
        )
    return (*shape[:-1], shape[-1] // 2)


def _read_index(index: Path) -> dict[str, str]:
    try:
        return weight_map_of(index.read_bytes(), str(index))
    except OSError as error:
        raise StorageError(f"{index}: cannot be read: {error.strerror}", file=str(index)) from error


def weight_map_of(data: bytes, index: str) -> dict[str, str]:
    """The map from tensor names to file names of an index; raises CheckpointError for what is none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: no JSON: {error}") from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f'{index}: no "weight_map" from tensor names to file names')
    return weight_map


def _beside(index: Path, name: str) -> Path:
    """Files of an index lie beside it: a name that leads elsewhere is refused."""
    if not name or name != Path(name).name or name in {".", ".."} or "\0" in name or "\\" in name:
        raise CheckpointError(f"{index}: {name!r} is no name of a file beside it")
    return index.parent / name


def _check_index(
    tensors: Mapping[str, TensorInfo], files: Sequence[Path], weight_map: Mapping[str, str], index: str
) -> None:
    """Those that the index names must be where it says."""
    lost = [name for name, file in weight_map.items() if name not in tensors or files[tensors[name].file].name != file]
    if lost:
        raise CheckpointError(f"{index}: {len(lost)} of its tensors are not in the files it names: {_some(lost)}")


def _some(names: Iterator[str] | Sequence[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
