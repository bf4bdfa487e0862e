"""The digests of device memory: mixsum-64 by kernels on the device, xxh3-64 of a copy in host memory."""

from __future__ import annotations

import threading
from array import array
from itertools import pairwise

from mxcore.cuda import PLAN_BYTES, Context, DeviceDigest, PinnedBuffer, Stream, copy_to_host
from mxcore.digest import xxh3_64_segments
from mxcore.storage.plan import budget
from mxcore.transfer.layout import DIGEST_BYTES, MIXSUM

__all__ = ["DeviceDigester"]


class DeviceDigester:
    """Digests of one device's memory, made when all earlier work of the device is done. Thread-safe."""

    kind = MIXSUM

    def __init__(self, context: Context) -> None:
        """Raises HostMemoryLimit, CudaError."""
        self.context = context
        budget().take(PLAN_BYTES, f"the digests of device {context.index}")
        try:
            self._digest = DeviceDigest(context)
        except BaseException:
            budget().give_back(PLAN_BYTES)
            raise
        self._lock = threading.Lock()
        self._closed = False

    def many(
        self, kind: str, addresses: array[int], lengths: array[int], starts: array[int], *, threads: int = 1
    ) -> bytes:
        """See mxcore.transfer.layout.Digester. mixsum-64 is made on the device, xxh3-64 of a copy in host memory."""
        self.context.synchronize()
        if kind == MIXSUM:
            return self._digest.many(addresses, lengths, starts)
        with self._lock:
            return b"".join(
                self._on_host(addresses[first:last], lengths[first:last]) for first, last in pairwise(starts)
            )

    def _on_host(self, addresses: array[int], lengths: array[int]) -> bytes:
        size_bytes = sum(lengths)
        with budget().held(size_bytes, "a chunk's copy for its digest"):
            pinned = PinnedBuffer(self.context, max(1, size_bytes))
            try:
                stream, at = Stream(self.context), pinned.address
                for address, length in zip(addresses, lengths, strict=True):
                    if length:
                        copy_to_host(at, address, length, stream)
                        at += length
                stream.synchronize()
                return xxh3_64_segments([pinned.address], [size_bytes]).to_bytes(DIGEST_BYTES, "little")
            finally:
                pinned.close()

    def close(self) -> None:
        """Frees what it holds; idempotent."""
        if not self._closed:
            self._closed = True
            self._digest.close()
            budget().give_back(PLAN_BYTES)
