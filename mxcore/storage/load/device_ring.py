"""The pinned ring of each device: made at the first load, sized by what a copy to the device takes, used ever after."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator

from mxcore.cuda import Context, Event, PinnedBuffer, Stream, context_of, copy_to_device
from mxcore.cuda import driver as cuda_driver
from mxcore.errors import CudaError
from mxcore.memory import HostBuffer
from mxcore.reading import DeviceRing, slot_bytes
from mxcore.storage.load.near_device import node_of, prefer_node
from mxcore.storage.load.ring_proof import prove
from mxcore.storage.plan import MemoryBudget

__all__ = ["release_rings", "ring_of"]

_log = logging.getLogger(__name__)

LEAST_PIECE_BYTES = 1024 * 1024
MOST_PIECE_BYTES = 16 * 1024 * 1024
_SLOTS = 2  # of a thread: one is read into while the other one is copied
_MOST_THREADS = 16
_LATENCIES = 8  # a piece takes so many times what starting a copy takes: what is lost between copies stays small
_PROBE_BYTES = 4 * 1024 * 1024
_PROBES = 4


class _Kept:
    """One device's ring and its bookkeeping."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while a load uses the ring
        self.ring: DeviceRing | None = None
        self.memory: MemoryBudget | None = None
        self.refused = ""  # why there will be none

    def close(self) -> None:
        if self.ring is not None:
            buffer = self.ring.buffer
            self.ring.close()
            self.ring = None
            buffer.close()
            if self.memory is not None:
                self.memory.give_back(buffer.size_bytes)


_rings: dict[int, _Kept] = {}
_rings_lock = threading.Lock()


@contextlib.contextmanager
def ring_of(
    device_index: int, target: tuple[int, int], after: int | None, memory: MemoryBudget
) -> Iterator[DeviceRing]:
    """The device's ring, for one load at a time; others wait.

    `target`: (address, bytes) of device memory that is going to be overwritten by the load; a new ring measures copies
    there, and is tried on known bytes (`ring_proof`). `after`: see DeviceRing.start_after. The ring counts against
    `memory` from its making on. Raises HostMemoryLimit, HostMemoryError, CudaError; the last also at every later call
    for a ring that failed its trial.
    """
    with _rings_lock:
        kept = _rings.setdefault(device_index, _Kept())
    with kept.lock:
        if kept.refused:
            raise CudaError(kept.refused)
        if kept.ring is None:
            kept.ring, kept.memory = _made(context_of(device_index), target, after, memory), memory
            try:
                prove(kept.ring, target)
            except BaseException as error:
                kept.close()
                if isinstance(error, CudaError):
                    kept.refused = error.args[0]
                raise
        kept.ring.start_after(after)
        yield kept.ring


def release_rings() -> None:
    """Frees all rings, after the loads that use them; the next load makes new ones."""
    with _rings_lock:
        for kept in _rings.values():
            with kept.lock:
                kept.close()
        _rings.clear()


atexit.register(release_rings)


def _made(context: Context, target: tuple[int, int], after: int | None, memory: MemoryBudget) -> DeviceRing:
    threads = max(1, min(len(os.sched_getaffinity(0)), _MOST_THREADS))
    piece_bytes = _piece_bytes(context, target, after)
    while piece_bytes > LEAST_PIECE_BYTES and 2 * threads * _SLOTS * slot_bytes(piece_bytes) > memory.free_bytes:
        piece_bytes //= 2
    while threads > 1 and threads * _SLOTS * slot_bytes(piece_bytes) > memory.free_bytes:
        threads //= 2
    size_bytes = threads * _SLOTS * slot_bytes(piece_bytes)
    memory.take(size_bytes, f"the ring between storage and device {context.index}")
    try:
        buffer = HostBuffer(size_bytes)
    except BaseException:
        memory.give_back(size_bytes)
        raise
    try:
        return _on(context, buffer, piece_bytes, threads)
    except BaseException:
        buffer.close()
        memory.give_back(size_bytes)
        raise


def _on(context: Context, buffer: HostBuffer, piece_bytes: int, threads: int) -> DeviceRing:
    node = node_of(cuda_driver.Device(context.index).pci_bus_id)
    if node is not None and not prefer_node(buffer.address, buffer.size_bytes, node):
        _log.info("memory near device %d (node %d) cannot be asked for", context.index, node)
    try:
        return DeviceRing(context, buffer, piece_bytes=piece_bytes, threads=threads, slots=_SLOTS)
    except CudaError as error:
        _log.warning(
            "loads to device %d go through memory that is not pinned, which is slower: %s. "
            "A larger RLIMIT_MEMLOCK (ulimit -l), or the capability IPC_LOCK, may lift it",
            context.index,
            str(error),  # the error itself would keep what was half made
        )
    return DeviceRing(context, buffer, piece_bytes=piece_bytes, threads=threads, slots=_SLOTS, pinned=False)


def _piece_bytes(context: Context, target: tuple[int, int], after: int | None) -> int:
    """What travels in `_LATENCIES` times the latency of a copy, by copies to `target`; a power of two."""
    address, size_bytes = target
    probe_bytes = min(_PROBE_BYTES, size_bytes)
    stream = Stream(context)
    if after is not None:
        event = Event(context)
        event.record(after)
        event.synchronize()
    pinned = PinnedBuffer(context, probe_bytes)
    try:
        latency = min(_seconds(address, pinned, min(4096, probe_bytes), stream) for _ in range(2 * _PROBES))
        seconds = min(_seconds(address, pinned, probe_bytes, stream) for _ in range(_PROBES))
    finally:
        pinned.close()
    wanted = _LATENCIES * latency * probe_bytes / max(seconds - latency / 2, 1e-9)
    piece_bytes = LEAST_PIECE_BYTES
    while piece_bytes < wanted and piece_bytes < MOST_PIECE_BYTES:
        piece_bytes *= 2
    return piece_bytes


def _seconds(address: int, pinned: PinnedBuffer, size_bytes: int, stream: Stream) -> float:
    started = time.perf_counter()
    copy_to_device(address, pinned.address, size_bytes, stream)
    stream.synchronize()
    return time.perf_counter() - started
