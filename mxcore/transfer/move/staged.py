"""Chunks of device memory within one host: the holder copies them into a buffer that this process maps (cuda_ipc)."""

from __future__ import annotations

import logging
import threading
from array import array
from collections import deque
from collections.abc import Iterator, Sequence

from mxcore.cuda import Context, OpenedMemory, Stream, address_range, copy_on_device
from mxcore.errors import CudaError, FenceFailed, NotOneSided, TransferError
from mxcore.transfer.layout import Chunks
from mxcore.transfer.move.movers import Arrived, Awaited
from mxcore.transfer.move.source_client import PendingCall, SourceClient
from mxserver.wire.calls import Closing
from mxserver.wire.proto import mx_pb2

__all__ = ["StagedMover"]

_MOST_SLOTS = 16  # that are used

_logger = logging.getLogger(__name__)


class StagedMover(Closing):
    """Asks the holder to fill a slot, and copies the chunk from there. See Mover.

    Neither side maps the other's weights. Only this process writes to its memory, by a stream of its own: nothing
    arrives after `close`. Where the device fails, `arrived` raises NotOneSided: the holder can still WRITE.
    """

    def __init__(
        self,
        client: SourceClient,
        lease_id: str,
        staging: mx_pb2.StagingBuffer,
        context: Context,
        chunks: Chunks,
        local: array[int],
        *,
        stall_timeout_seconds: float,
    ) -> None:
        """Maps the buffer. Raises NotOneSided where that fails, or it is too small."""
        self._client = client
        self._lease_id = lease_id
        self._chunks = chunks
        self._local = local
        self._slot_bytes = staging.slot_bytes
        self._free = deque(range(min(staging.slots, _MOST_SLOTS)))
        self._asked: deque[int] = deque()
        self._calls: dict[int, tuple[int, PendingCall[mx_pb2.StageChunkResponse]]] = {}  # by slot, with its chunk
        self._awaited = Awaited(f"worker {client.source.worker_id} copied none of", stall_timeout_seconds)
        self._news = threading.Event()
        try:
            self._stream = Stream(context)
            self._memory = OpenedMemory(context, staging.handle)
            base, size_bytes = address_range(self._memory.address)
        except (CudaError, ValueError) as error:
            raise NotOneSided(f"the buffer of worker {client.source.worker_id} cannot be mapped: {error}") from error
        self._first = self._memory.address + staging.offset
        largest = max(map(chunks.bytes_of, range(len(chunks))))
        end = self._first - base + (staging.slots - 1) * self._slot_bytes + largest
        if not self._free or largest > self._slot_bytes or end > size_bytes:
            self._memory.close()
            raise NotOneSided(
                f"the buffer of worker {client.source.worker_id} has {staging.slots} slots of {self._slot_bytes} bytes "
                f"in {size_bytes}, for chunks of {largest}"
            )

    def close(self) -> None:
        """See Mover."""
        for _, call in self._calls.values():
            call.forget()
        self._calls.clear()
        try:
            self._stream.synchronize()
        except CudaError as error:
            raise FenceFailed(f"copies from worker {self._client.source.worker_id} do not end: {error}") from error
        try:
            self._memory.close()
        except CudaError as error:  # nothing arrives by it any more: what came is good
            _logger.warning(
                "the buffer of worker %s cannot be unmapped, and stays mapped until this process ends: %s",
                self._client.source.worker_id,
                error,
            )

    def wake(self) -> None:
        """See Mover."""
        self._news.set()

    def interrupt(self, error: TransferError) -> None:
        """See Mover."""
        self._awaited.interrupt(error)
        self.wake()

    @property
    def idle(self) -> bool:
        """See Mover."""
        return not self._awaited.chunks

    def ask(self, chunks: Sequence[int]) -> None:
        """See Mover."""
        self._awaited.add(chunks)
        self._asked.extend(chunks)
        self._begin()

    def arrived(self) -> Iterator[Arrived]:
        """See Mover."""
        if self._awaited.chunks and not self._awaited.interrupted:
            self._news.wait(self._awaited.seconds_left)
        self._news.clear()
        if self._awaited.interrupted:
            self._awaited.check()
        for slot in [slot for slot, (_, call) in self._calls.items() if call.done]:
            chunk, call = self._calls.pop(slot)
            call.result()
            self._copy(chunk, slot)
            self._free.append(slot)
            self._begin()
            self._awaited.remove(chunk)
            yield Arrived(chunk)
        self._awaited.check()

    def _begin(self) -> None:
        """A call for each free slot."""
        while self._free and self._asked:
            slot, chunk = self._free.popleft(), self._asked.popleft()
            call = self._client.stage_chunk(self._lease_id, chunk, slot)
            self._calls[slot] = chunk, call
            call.when_done(self._news.set)

    def _copy(self, chunk: int, slot: int) -> None:
        there = self._first + slot * self._slot_bytes
        local, lengths = (self._chunks.slice_of(values, chunk) for values in (self._local, self._chunks.lengths))
        try:
            for to, length in zip(local, lengths, strict=True):
                copy_on_device(to, there, length, self._stream)
                there += length
            self._stream.synchronize()
        except CudaError as error:
            raise NotOneSided(f"chunk {chunk} from worker {self._client.source.worker_id}: {error}") from error
