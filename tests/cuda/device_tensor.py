"""A tensor in the stand-in's device memory, with as much of torch's manners as mxcore.storage.memory_of looks at."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from mxcore.cuda_context import Context
from mxcore.cuda_memory import DeviceBuffer


class _Device(NamedTuple):
    type: str
    index: int


class DeviceTensor:
    """Shape, strides and dtype of `like`, its elements in device memory of its own."""

    def __init__(self, context: Context, like: torch.Tensor) -> None:
        self._like = like
        self._storage_bytes = max(1, like.untyped_storage().nbytes())
        self.buffer = DeviceBuffer(context, self._storage_bytes)
        self.device = _Device("cuda", context.index)
        self.shape, self.dtype = like.shape, like.dtype

    def data_ptr(self) -> int:
        return self.buffer.address + self._like.storage_offset() * self._like.element_size()

    def stride(self) -> tuple[int, ...]:
        return self._like.stride()

    def element_size(self) -> int:
        return self._like.element_size()

    def numel(self) -> int:
        return self._like.numel()

    def is_contiguous(self) -> bool:
        return self._like.is_contiguous()

    def on_host(self) -> torch.Tensor:
        """The elements, copied: on the stand-in the host reaches device memory."""
        size = self._like.untyped_storage().nbytes()
        storage = torch.frombuffer(bytearray(ctypes.string_at(self.buffer.address, max(size, 1))), dtype=torch.uint8)
        whole = storage[:size].view(self.dtype) if size else torch.empty(0, dtype=self.dtype)
        return torch.as_strided(whole, self.shape, self.stride(), self._like.storage_offset())


def same_bits(one: torch.Tensor, other: Any) -> bool:
    """Every bit, NaN or not."""
    return one.contiguous().reshape(-1).view(torch.uint8).equal(other.contiguous().reshape(-1).view(torch.uint8))
