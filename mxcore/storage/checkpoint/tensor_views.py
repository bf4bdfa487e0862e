"""Tensors of torch or numpy on a host buffer's memory, without a copy where the alignment allows it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from typing import Any, Literal

from mxcore.errors import CheckpointError
from mxcore.memory import HostBuffer
from mxcore.storage.checkpoint.checkpoint import TensorInfo
from mxcore.storage.checkpoint.dtypes import DTYPES
from mxserver.wire import SettingError

__all__ = ["Framework", "TensorViews", "chosen_framework", "refuse_unknown"]

Framework = Literal["torch", "numpy"]


def chosen_framework(framework: Framework | None) -> Framework:
    """The one that is asked for, else torch where it is installed, else numpy. Raises SettingError without either."""
    for name in ("torch", "numpy") if framework is None else (framework,):
        if name in sys.modules or importlib.util.find_spec(name) is not None:
            return name
    raise SettingError(f"{framework or 'neither torch nor numpy'} is not installed: pip install {framework or 'numpy'}")


def refuse_unknown(tensors: Iterable[TensorInfo], framework: Framework) -> None:
    """Raises CheckpointError for a tensor of a type that no torch has, as safetensors and vLLM refuse it."""
    for info in tensors:
        if framework == "torch" and DTYPES[info.dtype].torch_name is None:
            raise CheckpointError(f"{info.name!r} is {info.dtype} {list(info.shape)}: torch has no such type")


class TensorViews:
    """Makes tensors on one buffer; one that is misaligned there is a copy.

    A type that numpy does not have (bfloat16, fp8, F4, F6) comes as bytes, uint8 of one dimension; so does one that
    only a later torch has. F6, which no torch has, is refused there (`refuse_unknown`). The framework is imported when
    the first object is made. One thread at a time.
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
        kind = getattr(self._module, name, None) if name is not None else None
        if name is None or kind is None:
            return stretch
        if begin % max(1, dtype.bits // 8 // (2 if name.startswith("complex") else 1)):
            stretch = stretch.clone() if self._framework == "torch" else stretch.copy()
        return stretch.view(kind).reshape(info.shape)
