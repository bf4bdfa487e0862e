"""Tensors of a checkpoint into device memory, the model's own.

Reads go into a small pinned ring, from there to the device on several streams, while the next reads run. With given
destinations nothing is allocated on the device; on the host it is the ring alone. Where GPUDirect Storage is proven,
long runs that the page cache does not have come from the disk straight into place (`device_direct`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from mxcore.cuda import driver as cuda_driver
from mxcore.errors import DestinationMismatch
from mxcore.storage.checkpoint import Checkpoint
from mxcore.storage.load.device_ring import ring_of
from mxcore.storage.load.host_load import LoadReport, Reader
from mxcore.storage.plan import MemoryBudget, Progress, Row, budget

__all__ = ["read_open_files", "read_rows_to_device"]


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
    """Reads parts whose addresses are of that CUDA device's memory; returns when all bytes are there.

    Copies start after what the stream `after` (a CUstream's number; 0: the default stream; None: wait for nothing) was
    given before the call: allocators hand out memory that earlier work of a stream still uses. Whatever is given to any
    stream after this returns sees the tensors. Loads to one device follow each other. `gpudirect_storage` is auto or
    off (default: MX_GPUDIRECT_STORAGE or auto).

    Raises as `mxcore.storage.load.load`, DestinationMismatch also for memory of another device, and CudaMissing,
    CudaError; what the destinations hold is undefined then, and nothing writes to them.
    """
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
