"""A worker's tensors on a device of the stand-in."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mxcore.cuda import DeviceBuffer, context_of
from tests.transfer.memory import HostTensors, Spec

MADE: list[DeviceTensors] = []  # freed after the test, when nobody serves them any more


class DeviceTensors(HostTensors):
    """As HostTensors, every storage an allocation on a device."""

    def __init__(self, specs: Sequence[Spec], seed: int | None, device: int = 0) -> None:
        super().__init__(specs, seed)
        self.device = device
        MADE.append(self)
        context = context_of(device)
        self.buffers = {name: DeviceBuffer(context, max(1, data.nbytes)) for name, data in self.storages.items()}
        for name, data in self.storages.items():
            ctypes.memmove(self.buffers[name].address, data.ctypes.data, data.nbytes)

    def address(self, storage: str) -> int:
        return self.buffers[storage].address if hasattr(self, "buffers") else super().address(storage)

    def local_tensors(self):  # type: ignore[no-untyped-def]
        tensors = super().local_tensors()
        return [replace(tensor, device_type="cuda", device_index=self.device) for tensor in tensors]

    def fetch(self) -> None:
        """Device → `storages`, for comparing."""
        for name, data in self.storages.items():
            data[:] = np.frombuffer(ctypes.string_at(self.buffers[name].address, data.nbytes), np.uint8)

    def close(self) -> None:
        for buffer in self.buffers.values():
            buffer.close()
