"""Weights in device memory: proven before they are moved, their digests, the regions that are registered.

Nothing is moved to or from a device on which checking does not work. So the first use of a device makes digests of
known bytes and of the same with a flipped bit, on the device, and moves some through NIXL; whatever of that fails is
told by name, and the weights come from storage.
"""

from __future__ import annotations

import atexit
import threading
import time
from array import array
from collections.abc import Sequence
from itertools import pairwise

from mxcore.cuda import driver as cuda_driver
from mxcore.cuda.context import Context, context_of
from mxcore.cuda.digest import PLAN_BYTES, DeviceDigest
from mxcore.cuda.memory import DeviceBuffer, PinnedBuffer, copy_to_device, copy_to_host
from mxcore.cuda.stream import Stream
from mxcore.digest.digest import mixsum_64_many, xxh3_64_segments
from mxcore.errors import CudaError, HostMemoryError, LayoutUnsupported, NixlError
from mxcore.memory.host_buffer import HostBuffer
from mxcore.nixl.agent import NixlAgent
from mxcore.storage.plan.memory_limit import budget
from mxcore.transfer.layout.digests import DIGEST_BYTES, MIXSUM
from mxcore.transfer.layout.layout import Placement
from mxcore.transfer.layout.regions import Regions, merge_regions
from mxcore.transfer.route.routes import UcxPolicy, ucx_environment

__all__ = ["ProvenDevice", "allocation_regions", "nixl_device", "proven_device", "release_devices"]

_TEST_BYTES = 150_001  # several tiles, and a part of a word
_TEST_STARTS = array("Q", [0, 3, 4])
_LOOPBACK_SECONDS = 20.0


class DeviceDigester:
    """Digests of one device's memory. All work that was given to the device is waited for before. Thread-safe."""

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


class ProvenDevice:
    """A device whose digests and transfers were tried, and its digester."""

    def __init__(self, index: int) -> None:
        """Raises LayoutUnsupported with what does not work."""
        self.index = index
        step = "the CUDA driver"
        try:
            self.context = context_of(index)
            step = "the digest kernels"
            self.digester = DeviceDigester(self.context)
            try:
                with _bytes_on_device(self.context) as (source, target):
                    step = "digests of known bytes"
                    _try_digests(self.digester, source)
                    step = "a transfer through NIXL"
                    _try_nixl(self.digester, source, target)
            except BaseException:
                self.digester.close()
                raise
        except (CudaError, NixlError, HostMemoryError) as error:
            raise LayoutUnsupported(f"device {index}: {step} failed: {error}. Load from storage") from error


class _bytes_on_device:  # noqa: N801 - a context manager
    """Two stretches of device memory, the first one filled with bytes that differ."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._buffers: list[DeviceBuffer] = []

    def __enter__(self) -> tuple[DeviceBuffer, DeviceBuffer]:
        self._buffers.append(DeviceBuffer(self._context, _TEST_BYTES))
        self._buffers.append(DeviceBuffer(self._context, _TEST_BYTES))
        _fill(self._buffers[0], _known_bytes())
        return self._buffers[0], self._buffers[1]

    def __exit__(self, *_: object) -> None:
        for buffer in self._buffers:
            buffer.close()


def _known_bytes() -> bytes:
    return bytes((7 * index + index // 251) % 256 for index in range(_TEST_BYTES))


def _fill(buffer: DeviceBuffer, data: bytes) -> None:
    pinned = HostBuffer(len(data))
    try:
        with memoryview(pinned) as view:
            view[: len(data)] = data
        stream = Stream(buffer.context)
        copy_to_device(buffer.address, pinned.address, len(data), stream)
        stream.synchronize()
    finally:
        pinned.close()


def _segments(base: int) -> tuple[array[int], array[int]]:
    """The test's bytes in four segments that begin at odd places."""
    cuts = [0, 1, 70_001, 140_006, _TEST_BYTES]
    return (
        array("Q", (base + begin for begin in cuts[:-1])),
        array("Q", (end - begin for begin, end in pairwise(cuts))),
    )


def _expected(data: bytes) -> bytes:
    with HostBuffer(len(data)) as buffer:
        with memoryview(buffer) as view:
            view[: len(data)] = data
        return mixsum_64_many(*_segments(buffer.address), _TEST_STARTS)


def _try_digests(digester: DeviceDigester, source: DeviceBuffer) -> None:
    """Right bytes have the host's digests, one wrong bit has not. Raises CudaError."""
    right = _known_bytes()
    wrong = bytearray(right)
    wrong[140_000] ^= 0x10
    for data in (bytes(wrong), right):
        _fill(source, data)
        found = digester.many(MIXSUM, *_segments(source.address), _TEST_STARTS)
        if found != _expected(data) or (found == _expected(right)) != (data == right):
            raise CudaError(f"the device's digests are {found.hex()}, the host's are {_expected(data).hex()}")


def nixl_device(index: int) -> dict[str, int | bool]:
    """How NIXL is told of a device's memory; the tests' stand-in has host memory for it."""
    return {"device_index": 0 if cuda_driver.is_stand_in() else index, "device_memory": not cuda_driver.is_stand_in()}


def _try_nixl(digester: DeviceDigester, source: DeviceBuffer, target: DeviceBuffer) -> None:
    """A WRITE from one agent of this process to another one, device to device. Raises NixlError, CudaError."""
    device = nixl_device(source.context.index)
    kind = {
        f"{side}_{name}": device[name] for side in ("local", "remote") for name in ("device_index", "device_memory")
    }
    with ucx_environment(UcxPolicy.from_environment("auto").device_fenceable):
        agents = [NixlAgent(f"mx-proof-{side}-{time.monotonic_ns()}") for side in ("source", "target")]
    try:
        size = array("Q", [_TEST_BYTES])
        for agent, buffer in zip(agents, (source, target), strict=True):
            agent.register(array("Q", [buffer.address]), size, **device)  # type: ignore[arg-type]
        peer = agents[0].load_remote(agents[1].metadata())
        there, here = array("Q", [target.address]), array("Q", [source.address])
        transfer = agents[0].transfer("write", here, there, size, peer, **kind)  # type: ignore[arg-type]
        give_up, done = time.monotonic() + _LOOPBACK_SECONDS, transfer.post()
        while not done and time.monotonic() < give_up:
            time.sleep(0.001)
            done = transfer.done()
        transfer.release()
        if not done:
            raise NixlError(f"{_TEST_BYTES} bytes did not arrive within {_LOOPBACK_SECONDS:g} s")
    finally:
        for agent in agents:
            agent.destroy()
    found = digester.many(MIXSUM, *_segments(target.address), _TEST_STARTS)
    if found != _expected(_known_bytes()):
        raise NixlError("other bytes arrived than were sent")


_proven: dict[int, ProvenDevice | str] = {}
_lock = threading.Lock()


def proven_device(placement: Placement) -> ProvenDevice:
    """The device that all of a placement is on, tried once a process.

    Raises LayoutUnsupported: another kind of memory, several devices, or a device that failed its trial (also when
    it failed before: nothing is tried twice).
    """
    if placement.device_type != "cuda":
        raise LayoutUnsupported(
            f"all {len(placement.addresses)} extents are in {placement.device_type} memory: nobody here can check "
            "digests of it, and nothing is moved unchecked. Load from storage"
        )
    devices = sorted(set(placement.device_indices))
    if len(devices) != 1:
        raise LayoutUnsupported(f"the weights of one worker are on devices {devices}: one is supported")
    with _lock:
        found = _proven.get(devices[0])
        if found is None:
            try:
                found = ProvenDevice(devices[0])
            except LayoutUnsupported as error:
                found = str(error)
            _proven[devices[0]] = found
    if isinstance(found, str):
        raise LayoutUnsupported(found)
    return found


def release_devices() -> None:
    """Forgets what was proven, and frees what digests hold. Nobody may be at work."""
    with _lock:
        for found in _proven.values():
            if isinstance(found, ProvenDevice):
                found.digester.close()
        _proven.clear()


atexit.register(release_devices)


def allocation_regions(placement: Placement, extent_bytes: Sequence[int]) -> list[Regions]:
    """As `merge_regions`, for device memory: a region never goes beyond the allocation that its extents lie in.

    Within one allocation all is one region, from the first extent to the end of the last. Raises CudaError for an
    extent that is in no allocation, or in several.
    """
    stretches: dict[tuple[int, int], tuple[int, int]] = {}
    for device, address, length in sorted(
        zip(placement.device_indices, placement.addresses, extent_bytes, strict=True)
    ):
        base, size = cuda_driver.address_range(address)
        if address + length > base + size:
            raise CudaError(f"{length} bytes at {address:#x} go beyond their allocation of {size} bytes at {base:#x}")
        first, end = stretches.get((device, base), (address, address))
        stretches[device, base] = (min(first, address), max(end, address + length))
    apart = [
        Regions(device, array("Q", [first]), array("Q", [end - first]))
        for (device, _), (first, end) in sorted(stretches.items())
    ]
    return apart or merge_regions(placement, extent_bytes)
