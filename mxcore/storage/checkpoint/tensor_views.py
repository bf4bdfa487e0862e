"""Tensors of torch or numpy on a host buffer's memory, without a copy where the alignment allows it."""

from __future__ import annotations

import importlib
from typing import Any, Literal

from mxcore.memory import HostBuffer
from mxcore.storage.checkpoint.checkpoint import TensorInfo
from mxcore.storage.checkpoint.dtypes import DTYPES

__all__ = ["Framework", "TensorViews"]

Framework = Literal["torch", "numpy"]


class TensorViews:
    """Makes tensors on one buffer; one that is misaligned there is a copy.

    A type that the framework does not have (the sub-byte ones; for numpy bfloat16 and the fp8 types) comes as bytes,
    uint8 of one dimension. The framework is imported when the first object is made. One thread at a time.
    """

    def __init__(self, buffer: HostBuffer, framework: Framework) -> None:
        self._module: Any = importlib.import_module(framework)
        self._framework = framework
        if framework == "torch":
            self._bytes = self._module.from_dlpack(buffer)
        else:
            self._bytes = self._module.frombuffer(buffer, dtype=self._module.uint8)

    def tensor(self, info: TensorInfo, begin: int) -> Any:
        """The tensor whose bytes begin at that byte of the buffer. It keeps the buffer alive."""
        dtype = DTYPES[info.dtype]
        name = dtype.torch_name if self._framework == "torch" else dtype.numpy_name
        stretch = self._bytes[begin : begin + info.size_bytes]
        if name is None:
            return stretch
        if begin % max(1, dtype.bits // 8 // (2 if name.startswith("complex") else 1)):
            stretch = stretch.clone() if self._framework == "torch" else stretch.copy()
        return stretch.view(getattr(self._module, name)).reshape(info.shape)
