"""Buffers of device memory out of which readers on this host take chunks (cuda_ipc), so that nobody maps the weights.

CUDA has no handles that only read: who maps an allocation can write there. So what a reader maps has copies of chunks,
in an allocation that has nothing else.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from mxcore.cuda import Context, DeviceBuffer, Stream, context_of, copy_on_device, export_memory
from mxcore.errors import LeaseEnded
from mxcore.transfer.layout import Chunks, Placement
from mxserver.wire.proto import mx_pb2

__all__ = ["Staging"]

_SLOTS = 2  # the holder fills one while the reader empties the other
_UNIT_BYTES = 2 << 20  # of the driver's allocations: what is smaller shares one, and would be mapped with others


class _Buffer:
    """Slots for chunks in an allocation of their own."""

    def __init__(self, context: Context, slot_bytes: int) -> None:
        """Raises CudaError."""
        self._slot_bytes = slot_bytes
        self._memory = DeviceBuffer(context, -(-_SLOTS * slot_bytes // _UNIT_BYTES) * _UNIT_BYTES)
        try:
            self._handle, self._offset = export_memory(context, self._memory.address)
            self._stream = Stream(context)
        except BaseException:
            self._memory.close()
            raise

    def fill(self, slot: int, addresses: array[int], lengths: array[int]) -> None:
        """Copies these stretches into a slot, and waits for that. Raises CudaError."""
        to = self._memory.address + slot * self._slot_bytes
        for address, length in zip(addresses, lengths, strict=True):
            copy_on_device(to, address, length, self._stream)
            to += length
        self._stream.synchronize()

    def to_proto(self) -> mx_pb2.StagingBuffer:
        return mx_pb2.StagingBuffer(handle=self._handle, offset=self._offset, slot_bytes=self._slot_bytes, slots=_SLOTS)

    def close(self) -> None:
        self._memory.close()


@dataclass
class _Reader:
    buffer: _Buffer
    granted: set[int] = field(default_factory=set)  # and not staged yet
    turn: threading.Lock = field(default_factory=threading.Lock)  # held while a slot is filled
    filling: int = 0
    ended: bool = False


class Staging:
    """The buffers of a holder's leases, made when one is first asked for. Thread-safe.

    A buffer is freed at `close` alone, and serves one lease after the other: a reader may keep it mapped.
    """

    def __init__(self, chunks: Chunks, addresses: array[int], placement: Placement) -> None:
        self._chunks = chunks
        self._addresses = addresses
        self._devices = placement.device_indices
        self._changed = threading.Condition()
        self._readers: dict[str, _Reader] = {}
        self._free: list[_Buffer] = []
        self._made: list[_Buffer] = []
        self._filling = 0
        self._closed = False

    def open(self, lease_id: str) -> mx_pb2.StagingBuffer:
        """The buffer of a lease. Raises CudaError where there is no memory for it, LeaseEnded after `close`."""
        with self._changed:
            if self._closed:
                raise LeaseEnded("this worker has stopped serving")
            if lease_id not in self._readers:
                self._readers[lease_id] = _Reader(self._free.pop() if self._free else self._new())
            return self._readers[lease_id].buffer.to_proto()

    def _new(self) -> _Buffer:
        largest = max(map(self._chunks.bytes_of, range(len(self._chunks))))
        made = _Buffer(context_of(self._devices[0]), largest)
        self._made.append(made)
        return made

    def allow(self, lease_id: str, chunks: Iterable[int]) -> None:
        """What a lease was granted."""
        with self._changed:
            if lease_id in self._readers:
                self._readers[lease_id].granted.update(chunks)

    def forbid_all(self) -> None:
        """What was granted is not there any more."""
        with self._changed:
            for reader in self._readers.values():
                reader.granted.clear()

    def fill(self, lease_id: str, chunk: int, slot: int) -> None:
        """Copies a chunk into a slot. Raises LeaseEnded, CudaError; ValueError for what was not granted."""
        with self._changed:
            if (reader := self._readers.get(lease_id)) is None:
                raise LeaseEnded(f"lease {lease_id!r} has no buffer for chunks, or has ended")
            if not 0 <= slot < _SLOTS or chunk not in reader.granted:
                raise ValueError(f"chunk {chunk} for slot {slot}: it was not granted, or there is no such slot")
            reader.granted.remove(chunk)
            reader.filling += 1
            self._filling += 1
        try:
            with reader.turn:
                addresses, lengths = (
                    self._chunks.slice_of(values, chunk) for values in (self._addresses, self._chunks.lengths)
                )
                reader.buffer.fill(slot, addresses, lengths)
        finally:
            with self._changed:
                reader.filling -= 1
                self._filling -= 1
                self._reuse(reader)
                self._changed.notify_all()

    def end(self, lease_id: str) -> None:
        """A lease has ended; its buffer is another one's once nothing is copied there."""
        with self._changed:
            if (reader := self._readers.pop(lease_id, None)) is not None:
                reader.ended = True
                self._reuse(reader)

    def _reuse(self, reader: _Reader) -> None:
        if reader.ended and not reader.filling:
            self._free.append(reader.buffer)

    def close(self, seconds: float) -> bool:
        """Frees the buffers; False where a copy does not end within `seconds`: they are kept for ever. Idempotent."""
        with self._changed:
            self._closed = True
            for lease_id in list(self._readers):
                self.end(lease_id)
            if not self._changed.wait_for(lambda: not self._filling, seconds):
                return False
            made, self._made, self._free = self._made, [], []
        for buffer in made:
            buffer.close()
        return True
