"""CUDA through its driver, opened at first use: contexts, streams, memory, IPC handles, digests on the device."""

from __future__ import annotations

from mxcore.cuda import driver
from mxcore.cuda.context import Context, context_of
from mxcore.cuda.digest import PLAN_BYTES, DeviceDigest
from mxcore.cuda.driver import address_range
from mxcore.cuda.ipc import OpenedMemory, export_memory
from mxcore.cuda.memory import DeviceBuffer, PinnedBuffer, Registration, copy_on_device, copy_to_device, copy_to_host
from mxcore.cuda.stream import Event, Stream

__all__ = [
    "PLAN_BYTES",
    "Context",
    "DeviceBuffer",
    "DeviceDigest",
    "Event",
    "OpenedMemory",
    "PinnedBuffer",
    "Registration",
    "Stream",
    "address_range",
    "context_of",
    "copy_on_device",
    "copy_to_device",
    "copy_to_host",
    "driver",
    "export_memory",
]
