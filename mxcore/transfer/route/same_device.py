"""Proof that one process can map device memory of another one on this machine (cuda_ipc).

The holder shows random bytes in an allocation of their own, and the receiver maps it and finds them there, before any
chunk is to come that way.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable

from mxcore.cuda import (
    Context,
    DeviceBuffer,
    OpenedMemory,
    Stream,
    address_range,
    context_of,
    copy_to_device,
    copy_to_host,
    export_memory,
)
from mxcore.errors import CudaError
from mxcore.memory import HostBuffer
from mxcore.transfer.layout import Placement
from mxcore.transfer.route.same_host import host_identity
from mxserver.wire.proto import mx_pb2

__all__ = ["DeviceProbeTarget", "cannot_read", "device_offer"]

NONCE_BYTES = 32
# The driver's unit of allocation: a smaller one shares it with others, which would be opened as well.
PROBE_BYTES = 2 * 1024 * 1024


class DeviceProbeTarget:
    """Random bytes in device memory of this process that another one may try to read, until `close`."""

    def __init__(self, context: Context) -> None:
        """Raises CudaError where the driver exports no memory."""
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self._buffer = DeviceBuffer(context, PROBE_BYTES)
        try:
            _moved(copy_to_device, self._buffer.address, self.nonce, context)
            self._handle, self._offset = export_memory(context, self._buffer.address)
        except BaseException:
            self._buffer.close()
            raise

    def to_proto(self) -> mx_pb2.DeviceProbe:
        """Where they are; empty without /proc."""
        try:
            boot_id, namespace = host_identity()
        except OSError:
            return mx_pb2.DeviceProbe()
        return mx_pb2.DeviceProbe(
            boot_id=boot_id,
            pid_namespace=namespace,
            handle=self._handle,
            offset=self._offset,
            nonce=self.nonce,
        )

    def close(self) -> None:
        """Frees the memory. Idempotent."""
        self._buffer.close()


def device_offer(placement: Placement) -> tuple[DeviceProbeTarget | None, str]:
    """The probe for other processes of this machine that have device memory, or None and why there is none."""
    try:
        return DeviceProbeTarget(context_of(placement.device_indices[0])), ""
    except CudaError as error:
        return None, str(error)


def cannot_read(probe: mx_pb2.DeviceProbe, device_index: int) -> str:
    """Why this process cannot read the probe's bytes out of the other process' device memory; empty if it can."""
    if len(probe.nonce) != NONCE_BYTES:
        return "it shows no bytes to try it on"
    try:
        ours = host_identity()
    except OSError as error:
        return f"this process does not know where it runs: {error}"
    if ours != (probe.boot_id, probe.pid_namespace):
        return "it runs on another machine" if ours[0] != probe.boot_id else "it runs in another PID namespace"
    try:
        return "" if _read(probe, context_of(device_index)) == probe.nonce else "other bytes are there than it shows"
    except (CudaError, ValueError) as error:
        return str(error)


def _read(probe: mx_pb2.DeviceProbe, context: Context) -> bytes:
    opened = OpenedMemory(context, probe.handle)
    try:
        base, size_bytes = address_range(opened.address)
        first = opened.address + probe.offset
        if first + NONCE_BYTES > base + size_bytes:
            raise ValueError(f"its bytes begin at {probe.offset} of {size_bytes}")
        return _moved(copy_to_host, first, bytes(NONCE_BYTES), context)
    finally:
        opened.close()


def _moved(copy: Callable[[int, int, int, Stream], None], address: int, data: bytes, context: Context) -> bytes:
    """Device memory from or to a host buffer with `data`; what the buffer has when that is done."""
    with HostBuffer(NONCE_BYTES) as buffer:
        with memoryview(buffer) as view:
            view[:] = data
        stream = Stream(context)
        to_host = copy is copy_to_host
        copy(*((buffer.address, address) if to_host else (address, buffer.address)), NONCE_BYTES, stream)
        stream.synchronize()
        with memoryview(buffer) as view:
            return bytes(view)


def hold(device_index: int) -> None:
    """The other side of a trial, for `mx doctor`: a line with the probe in hex, and the memory until stdin ends."""
    target = DeviceProbeTarget(context_of(device_index))
    print(target.to_proto().SerializeToString().hex(), flush=True)  # noqa: T201
    sys.stdin.read()
    target.close()
