"""The trial of a device before weights are moved to or from it: its digests, and a transfer through NIXL.

The first use of a device makes digests of known bytes and of the same with a flipped bit, on the device, and moves
some through NIXL. If any of that fails, the error names it, and the weights come from storage.
"""

from __future__ import annotations

import atexit
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise

from mxcore.cuda import Context, DeviceBuffer, Stream, context_of, copy_to_device
from mxcore.cuda import driver as cuda_driver
from mxcore.digest import mixsum_64_many
from mxcore.errors import CudaError, HostMemoryError, LayoutUnsupported, NixlError
from mxcore.memory import HostBuffer
from mxcore.nixl import NixlAgent
from mxcore.transfer.layout import MIXSUM, Placement
from mxcore.transfer.route.device_digests import DeviceDigester
from mxcore.transfer.route.routes import UcxPolicy, ucx_settings

__all__ = ["ProvenDevice", "nixl_device", "proven_device", "release_devices"]

_TEST_BYTES = 150_001  # several tiles, and a part of a word
_TEST_STARTS = array("Q", [0, 3, 4])
_LOOPBACK_SECONDS = 20.0


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
                with _test_buffers(self.context) as (source, target):
                    step = "digests of known bytes"
                    _try_digests(self.digester, source)
                    step = "a transfer through NIXL"
                    _try_nixl(self.digester, source, target)
            except BaseException:
                self.digester.close()
                raise
        except (CudaError, NixlError, HostMemoryError) as error:
            raise LayoutUnsupported(f"device {index}: {step} failed: {error}. Load from storage") from error


@contextmanager
def _test_buffers(context: Context) -> Iterator[tuple[DeviceBuffer, DeviceBuffer]]:
    """Two buffers in device memory, the first one with the known bytes."""
    with ExitStack() as stack:
        source, target = (stack.enter_context(closing(DeviceBuffer(context, _TEST_BYTES))) for _ in range(2))
        _fill(source, _known_bytes())
        yield source, target


def _known_bytes() -> bytes:
    return bytes((7 * index + index // 251) % 256 for index in range(_TEST_BYTES))


def _fill(buffer: DeviceBuffer, data: bytes) -> None:
    with HostBuffer(len(data)) as host:
        with memoryview(host) as view:
            view[: len(data)] = data
        stream = Stream(buffer.context)
        copy_to_device(buffer.address, host.address, len(data), stream)
        stream.synchronize()


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
    """Right bytes have the host's digests, a wrong bit changes them. Raises CudaError."""
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
    with ucx_settings(UcxPolicy.from_environment("auto").device_fenceable) as parameters:
        agents = [
            NixlAgent(f"mx-proof-{side}-{time.monotonic_ns()}", backend_params=parameters)
            for side in ("source", "target")
        ]
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

    Raises LayoutUnsupported: another kind of memory, several devices, or a device that failed its trial, now or before
    (it is not tried twice).
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
    """Forgets all trials, and frees what digests hold. No transfer or digest may be running."""
    with _lock:
        for found in _proven.values():
            if isinstance(found, ProvenDevice):
                found.digester.close()
        _proven.clear()


atexit.register(release_devices)
