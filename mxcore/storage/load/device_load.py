"""Tensors of a checkpoint into device memory: the model's own, or one arena of ours.

Reads go into a small pinned ring, from there to the device on several streams, while the next reads run. With given
destinations nothing is allocated on the device; on the host it is the ring alone. Where GPUDirect Storage is proven,
long runs that the page cache does not have come from the disk straight into place (`device_direct`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mxcore.cuda import driver as cuda_driver
from mxcore.cuda.context import context_of
from mxcore.cuda.memory import DeviceBuffer
from mxcore.errors import DestinationMismatch
from mxcore.storage.checkpoint.checkpoint import Checkpoint
from mxcore.storage.load.device_ring import ring_of
from mxcore.storage.load.host_load import LoadReport, Reader
from mxcore.storage.plan.memory_limit import MemoryBudget, budget
from mxcore.storage.plan.progress import Progress
from mxcore.storage.plan.read_plan import Row, Want, merged, parts_of

__all__ = ["DeviceArena", "load_arena", "load_to_device", "read_open_files", "read_rows_to_device"]

ARENA_ALIGNMENT_BYTES = 256  # as cudaMalloc aligns


def load_to_device(
    checkpoint: Checkpoint,
    wants: Mapping[str, Any] | Iterable[Want],
    *,
    device_index: int,
    after: int | None = 0,
    mode: str | None = None,
    progress: Progress | None = None,
    memory: MemoryBudget | None = None,
    gpudirect_storage: str | None = None,
) -> LoadReport:
    """As `mxcore.storage.load.load`, into memory of one CUDA device; returns when all bytes are there.

    Copies start after what the stream `after` (a CUstream's number; 0: the default stream; None: wait for nothing) was
    given before the call: allocators hand out memory that earlier work of a stream still uses. Whatever is given to any
    stream after this returns sees the tensors. Loads to one device follow each other. `gpudirect_storage` is auto or
    off (default: MX_GPUDIRECT_STORAGE or auto).

    Raises as `load`, DestinationMismatch also for memory of another device, and CudaMissing, CudaError; what the
    destinations hold is undefined then, and nothing writes to them.
    """
    listed = [Want(name, to) for name, to in wants.items()] if isinstance(wants, Mapping) else list(wants)
    rows = [part for want in listed for part in parts_of(checkpoint, want, on="cuda")]
    return read_rows_to_device(
        checkpoint,
        merged(rows),
        device_index=device_index,
        after=after,
        mode=mode,
        progress=progress,
        memory=memory,
        gpudirect_storage=gpudirect_storage,
    )


def read_rows_to_device(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    *,
    device_index: int,
    after: int | None = 0,
    mode: str | None = None,
    progress: Progress | None = None,
    memory: MemoryBudget | None = None,
    gpudirect_storage: str | None = None,
) -> LoadReport:
    """Reads parts whose addresses are of that device's memory; see `load_to_device`."""
    used = sorted({row[0] for row in rows})
    place_of = {file: place for place, file in enumerate(used)}
    moved = [(place_of[row[0]], *row[1:]) for row in rows]
    files = [checkpoint.files[file] for file in used]
    stamps = [checkpoint.stamps[file] for file in used]
    _placed(files, moved, device_index)  # before a file is opened
    if not moved:
        return LoadReport()
    with Reader(files, mode=mode, memory=memory, stamps=stamps, gpudirect_storage=gpudirect_storage) as reader:
        return read_open_files(
            reader, files, moved, device_index=device_index, after=after, progress=progress, memory=memory
        )


def read_open_files(
    reader: Reader,
    files: Sequence[Path],
    rows: Sequence[Row],
    *,
    device_index: int,
    after: int | None = 0,
    progress: Progress | None = None,
    memory: MemoryBudget | None = None,
) -> LoadReport:
    """As `read_rows_to_device`, for a caller who reads often: `reader` has those `files` open."""
    started = time.perf_counter()
    rows = _placed(files, rows, device_index)
    if not rows:
        return LoadReport()
    largest = max(rows, key=lambda row: row[2])
    with ring_of(device_index, (largest[5], largest[2]), after, memory or budget()) as ring:
        report = reader.read(rows, progress=progress, device=ring)
    report.seconds = time.perf_counter() - started
    return report


def _placed(files: Sequence[Path], rows: Sequence[Row], device_index: int) -> list[Row]:
    """The rows, none of which goes beyond an allocation: those that `merged` made of neighbours in memory may, and no
    copy does. Raises DestinationMismatch for memory that is not the device's."""
    placed: list[Row] = []
    for row in rows:
        for address in (row[5], row[5] + (row[4] - 1) * row[6] + row[2] - 1):
            found = cuda_driver.device_of(address)
            if found != device_index:
                place = "no device memory" if found < 0 else f"memory of device {found}"
                raise DestinationMismatch(
                    f"{files[row[0]].name}, byte {row[1]}: its destination {address:#x} is {place}, "
                    f"not memory of device {device_index}"
                )
        file, offset, left, stride, count, to, to_stride = row
        while count == 1:
            base, size_bytes = cuda_driver.address_range(to)
            if to + left <= base + size_bytes:
                break
            take = base + size_bytes - to
            placed.append((file, offset, take, 0, 1, to, 0))
            offset, left, to = offset + take, left - take, to + take
        placed.append((file, offset, left, stride, count, to, to_stride))
    return placed


class DeviceArena:
    """Tensors of a checkpoint in one stretch of device memory. `places`: name → its first byte in there.

    `buffer` exports itself by DLPack; tensors that are made of it keep it alive.
    """

    def __init__(self, checkpoint: Checkpoint, buffer: DeviceBuffer, places: Mapping[str, int]) -> None:
        self.buffer = buffer
        self.places = places
        self.report = LoadReport()
        self._checkpoint = checkpoint
        self._views: Any = None

    def tensor(self, name: str) -> Any:
        """A torch tensor on the arena's memory. KeyError for a name that is not in it."""
        from mxcore.storage.checkpoint.tensor_views import TensorViews

        if self._views is None:
            self._views = TensorViews(self.buffer, "torch")
        return self._views.tensor(self._checkpoint[name], self.places[name])


def load_arena(
    checkpoint: Checkpoint,
    names: Iterable[str] | None = None,
    *,
    device_index: int,
    mode: str | None = None,
    progress: Progress | None = None,
    memory: MemoryBudget | None = None,
    gpudirect_storage: str | None = None,
) -> DeviceArena:
    """Reads tensors (all by default) into device memory of ours, each at a multiple of 256 bytes, in file order.

    Raises KeyError, DeviceMemoryError, and as `load_to_device`; then the memory is freed.
    """
    wanted = set(checkpoint.tensors if names is None else names)
    if unknown := sorted(wanted - checkpoint.tensors.keys()):
        raise KeyError(unknown[0])
    places: dict[str, int] = {}
    size_bytes = 0
    for name, info in checkpoint.tensors.items():
        if name in wanted:
            places[name] = size_bytes
            size_bytes += -(-info.size_bytes // ARENA_ALIGNMENT_BYTES) * ARENA_ALIGNMENT_BYTES
    buffer = DeviceBuffer(context_of(device_index), max(size_bytes, 1))
    arena = DeviceArena(checkpoint, buffer, places)
    infos = [(checkpoint[name], begin) for name, begin in places.items()]
    rows = [
        (info.file, info.offset, info.size_bytes, 0, 1, buffer.address + begin, 0)
        for info, begin in infos
        if info.size_bytes
    ]
    try:
        arena.report = read_rows_to_device(
            checkpoint,
            merged(rows),
            device_index=device_index,
            after=None,
            mode=mode,
            progress=progress,
            memory=memory,
            gpudirect_storage=gpudirect_storage,
        )
    except BaseException:
        buffer.close()
        raise
    return arena
