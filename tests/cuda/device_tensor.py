"""A tensor in the stand-in's device memory, with what mxcore.storage.checkpoint.tensor_memory looks at in torch's; and
loading a checkpoint's tensors into such."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from mxcore.cuda import Context, DeviceBuffer
from mxcore.storage.checkpoint import Checkpoint
from mxcore.storage.load import LoadReport, read_rows_to_device
from mxcore.storage.plan import Want, merged, parts_of


class _Device(NamedTuple):
    type: str
    index: int


class DeviceTensor:
    """Shape, strides and dtype of `like`, its elements in device memory of its own. No tensor of torch's."""

    def __init__(self, context: Context, like: torch.Tensor) -> None:
        self._like = like
        self._storage_bytes = max(1, like.untyped_storage().nbytes())
        self.buffer = DeviceBuffer(context, self._storage_bytes)
        self.device = _Device("cuda", context.index)
        self.shape, self.dtype = like.shape, like.dtype
        self.copied: list[tuple[int, ...]] = []  # shapes of what `copy_` took

    def _view(self, like: torch.Tensor) -> DeviceTensor:
        made = DeviceTensor.__new__(DeviceTensor)
        made.__dict__ = {**self.__dict__, "_like": like, "shape": like.shape}
        return made

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

    def detach(self) -> DeviceTensor:
        return self

    def unsqueeze(self, dimension: int) -> DeviceTensor:
        return self._view(self._like.unsqueeze(dimension))

    def __getitem__(self, place: Any) -> DeviceTensor:
        return self._view(self._like[place])

    def copy_(self, tensor: torch.Tensor) -> None:
        """As torch copies from host memory: done when it returns."""
        self.copied.append(tuple(tensor.shape))
        self._on_device().copy_(tensor)

    def _on_device(self) -> torch.Tensor:
        size = self._like.untyped_storage().nbytes()
        array = (ctypes.c_uint8 * max(size, 1)).from_address(self.buffer.address)
        storage = torch.frombuffer(array, dtype=torch.uint8)
        whole = storage[:size].view(self.dtype) if size else torch.empty(0, dtype=self.dtype)
        return torch.as_strided(whole, self.shape, self.stride(), self._like.storage_offset())

    def on_host(self) -> torch.Tensor:
        """The elements, copied: on the stand-in the host reaches device memory."""
        return self._on_device().clone(memory_format=torch.preserve_format)


def load_to_device(checkpoint: Checkpoint, wants: Mapping[str, Any] | Iterable[Want], **more: Any) -> LoadReport:
    """Reads tensors, or boxes of them, into device memory, by the product's own `read_rows_to_device`."""
    listed = [Want(name, to) for name, to in wants.items()] if isinstance(wants, Mapping) else list(wants)
    rows = [part for want in listed for part in parts_of(checkpoint, want, on="cuda")]
    return read_rows_to_device(checkpoint, merged(rows), **more)


def same_bits(one: torch.Tensor, other: Any) -> bool:
    """Every bit, NaN or not."""
    return one.contiguous().reshape(-1).view(torch.uint8).equal(other.contiguous().reshape(-1).view(torch.uint8))
