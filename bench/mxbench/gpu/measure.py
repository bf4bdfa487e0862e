"""One device's limits, and what ours makes of them: copies, loads, digests; the best of several rounds."""

from __future__ import annotations

import resource
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mxcore.cuda import Context, DeviceBuffer, DeviceDigest, PinnedBuffer, Stream, copy_on_device, copy_to_device
from mxcore.digest import mixsum_64_many
from mxcore.storage.checkpoint import Checkpoint
from mxcore.storage.load import STRAIGHT, Reader, read_open_files, read_rows_to_device, why_not
from mxcore.storage.plan import Row, merged

CHUNK_BYTES = 16 * 1024 * 1024
PINNED_BYTES = 64 * 1024 * 1024
ALIGNMENT_BYTES = 256


def best(rounds: int, run: Callable[[], Any]) -> float:
    """The seconds of the fastest of the rounds."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return min(taken)


def pinned_copy(context: Context, target: DeviceBuffer, rounds: int) -> float:
    """Bytes a second from pinned memory to all of the target: the limit of any load through the host."""
    pinned = PinnedBuffer(context, min(PINNED_BYTES, target.size_bytes))
    stream = Stream(context)

    def run() -> None:
        for begin in range(0, target.size_bytes, pinned.size_bytes):
            size = min(pinned.size_bytes, target.size_bytes - begin)
            copy_to_device(target.address + begin, pinned.address, size, stream)
        stream.synchronize()

    seconds = best(rounds, run)
    pinned.close()
    return target.size_bytes / seconds


def device_copy(context: Context, target: DeviceBuffer, rounds: int) -> float:
    """Bytes a second from one half of the target to the other one."""
    half, stream = target.size_bytes // 2, Stream(context)

    def run() -> None:
        copy_on_device(target.address + half, target.address, half, stream)
        stream.synchronize()

    return half / best(rounds, run)


def digest(made: DeviceDigest, target: DeviceBuffer, rounds: int) -> float:
    """Bytes a second of chunk digests over all of the target."""
    starts = range(0, target.size_bytes, CHUNK_BYTES)
    addresses = array("Q", (target.address + begin for begin in starts))
    lengths = array("Q", (min(CHUNK_BYTES, target.size_bytes - begin) for begin in starts))
    groups = array("Q", range(len(lengths) + 1))
    return target.size_bytes / best(rounds, lambda: made.many(addresses, lengths, groups))


def arena_rows(checkpoint: Checkpoint, address: int) -> tuple[list[Row], dict[str, int], int]:
    """Where every tensor goes in an arena at `address`: parts, places by name, bytes."""
    rows, places, at = [], {}, 0
    for name, info in checkpoint.tensors.items():
        places[name] = at
        rows.append((info.file, info.offset, info.size_bytes, 0, 1, address + at, 0))
        at += -(-info.size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return merged(rows), places, at


def load(checkpoint: Checkpoint, target: DeviceBuffer, rounds: int) -> dict[str, float]:
    """tmpfs (or page cache) → the target: bytes a second, and what was held beside it."""
    context = target.context
    rows, _, _ = arena_rows(checkpoint, target.address)
    total = sum(info.size_bytes for info in checkpoint.tensors.values())

    def run() -> Any:
        return read_rows_to_device(checkpoint, rows, device_index=context.index, mode="buffered")

    first = run()  # pays for the ring
    before_free, before_peak = context.memory_info()[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = best(rounds, run)
    return {
        "bytes_per_second": total / seconds,
        "first_seconds": first.seconds,
        "ring_bytes": first.ring_bytes,
        "extra_device_bytes": before_free - context.memory_info()[0],
        "extra_host_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_peak),
    }


def gpudirect(checkpoint: Checkpoint, target: DeviceBuffer, rounds: int) -> dict[str, float]:
    """Disk → the target past the page cache, by GPUDirect Storage and through the ring: bytes a second of each.

    Raises ValueError with the reason where it is not used, ModeUnavailable without O_DIRECT.
    """
    rows, _, _ = arena_rows(checkpoint, target.address)
    total = sum(info.size_bytes for info in checkpoint.tensors.values())
    index, files = target.context.index, checkpoint.files
    seconds, straight = {}, 0
    for choice in ("off", "auto"):
        with Reader(files, mode="direct", stamps=checkpoint.stamps, gpudirect_storage=choice) as reader:
            reports = [read_open_files(reader, files, rows, device_index=index) for _ in range(rounds + 1)]
        seconds[choice] = min(report.seconds for report in reports[1:])  # the first one pays for proofs
        straight = min(report.bytes_by_way.get(STRAIGHT, 0) for report in reports)
    if straight == 0:
        raise ValueError(f"GPUDirect Storage is not used: {why_not(files[0], index)}")
    return {"bytes_per_second": total / seconds["auto"], "ring": total / seconds["off"], "share": straight / total}


def check(checkpoint: Checkpoint, made: DeviceDigest, target: DeviceBuffer) -> None:
    """Every tensor on the device has the digest of its bytes in the file. Raises ValueError."""
    _, places, _ = arena_rows(checkpoint, target.address)
    infos = [checkpoint[name] for name in places]
    lengths = array("Q", (info.size_bytes for info in infos))
    groups = array("Q", range(len(infos) + 1))
    on_device = made.many(array("Q", (target.address + places[info.name] for info in infos)), lengths, groups)
    for index, info in enumerate(infos):
        with Path(checkpoint.files[info.file]).open("rb") as opened:
            opened.seek(info.offset)
            data = array("B", opened.read(info.size_bytes))
        expected = mixsum_64_many(array("Q", [data.buffer_info()[0]]), lengths[index : index + 1], array("Q", [0, 1]))
        if on_device[8 * index : 8 * index + 8] != expected:
            raise ValueError(f"{info.name} on the device is not what the file has")
