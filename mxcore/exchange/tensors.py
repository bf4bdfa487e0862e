"""Tensors of torch or numpy, and arrays on CUDA devices, as a transfer sees them; and new ones in the form of somebody
else's. Imports neither torch nor numpy before it needs one."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeAlias

from mxcore.errors import LayoutMismatch, LayoutUnsupported
from mxcore.exchange.device_arrays import (
    described_array,
    dtype_name,
    fill_array,
    is_device_array,
    synchronize_all,
    why_not_moved,
)
from mxcore.memory import HostBuffer
from mxcore.storage.checkpoint import DTYPES, Framework
from mxcore.transfer.layout import Layout, LayoutTensor, LocalTensor, Placement

__all__ = ["NewTensors", "Tensors", "by_name", "copy_into", "described", "framework_of", "synchronize"]

Tensors: TypeAlias = Mapping[str, Any] | Any
"""Torch or numpy tensors by name, or arrays with `__cuda_array_interface__`; or an `nn.Module`: its `state_dict`."""

_ALIGNED_BYTES = 64
_DEVICES: Mapping[str, Literal["cpu", "cuda"]] = {"cpu": "cpu", "cuda": "cuda"}
_OF_ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
_OF_NUMPY = {
    **{dtype.numpy_name: dtype.torch_name for dtype in DTYPES.values() if dtype.numpy_name},
    **dict(zip(_OF_ML_DTYPES, _OF_ML_DTYPES, strict=True)),
}
_BY_NAME = {f"torch.{dtype.torch_name}": dtype for dtype in DTYPES.values() if dtype.torch_name}
_NAMED = 5


def by_name(tensors: Tensors) -> dict[str, Any]:
    """The tensors by name. Raises LayoutUnsupported for what is none, with the names."""
    if hasattr(tensors, "state_dict") and not isinstance(tensors, Mapping):
        tensors = tensors.state_dict()
    if not isinstance(tensors, Mapping):
        raise LayoutUnsupported(f"tensors are given as a dict by name or as an nn.Module, not as {_kind(tensors)}")
    found = dict(tensors)
    wrong = [f"{name!r} ({_kind(value)})" for name, value in found.items() if not _is_tensor(value)]
    wrong += [f"{name!r} (not a name)" for name in found if not isinstance(name, str) or not name]
    if wrong:
        raise LayoutUnsupported(f"these are no torch or numpy tensors, nor arrays on CUDA devices: {_some(wrong)}")
    if not found:
        raise LayoutUnsupported("there are no tensors")
    return found


def described(tensors: Mapping[str, Any], *, filled: bool = False) -> list[LocalTensor]:
    """As a layout is built of them. Raises LayoutUnsupported for what cannot be moved, with the names and reasons.

    Those that are to be `filled` must be writable; of others, those with gaps between their elements are refused: what
    lies there would travel too.
    """
    found, wrong = [], []
    for name, tensor in tensors.items():
        if reason := _why_not(tensor) or (_why_not_filled(tensor) if filled else ""):
            wrong.append(f"{name!r} ({reason})")
            continue
        local = _local(name, tensor)
        if not filled and local.span_bytes > math.prod(local.shape) * local.itemsize_bytes:
            wrong.append(f"{name!r} (there are gaps between its elements: make it contiguous)")
        found.append(local)
    if wrong:
        raise LayoutUnsupported(f"{len(wrong)} tensors cannot be moved: {_some(wrong)}")
    return found


def synchronize(tensors: Mapping[str, Any]) -> None:
    """Waits for what was queued on the devices that tensors are on."""
    synchronize_all(tensor for tensor in tensors.values() if _is_other_device_array(tensor))
    devices = {tensor.device for tensor in tensors.values() if _is_torch(tensor) and tensor.device.type == "cuda"}
    for device in devices:
        sys.modules["torch"].accelerator.synchronize(device)


def framework_of(tensors: Mapping[str, Any]) -> Framework:
    """That of these tensors: torch where any of them is one of torch; numpy for arrays on devices that are none."""
    return "torch" if any(map(_is_torch, tensors.values())) else "numpy"


class NewTensors:
    """New memory for the extents of a layout, and the tensors of the layout in it; it lives as long as any of them.

    `device` is torch's name of one. With `extents`, the others get no memory, and their tensors cannot be had. Memory
    that nothing is written to takes no room on the host. Numpy gets a type that it lacks (bfloat16, fp8) as bytes.

    Raises LayoutMismatch for a layout that contradicts itself or has types that are not known, HostMemoryError.
    """

    def __init__(
        self, layout: Layout, framework: Framework, device: str = "cpu", extents: Collection[int] | None = None
    ) -> None:
        self._layout = layout
        self._module: Any = importlib.import_module(framework)
        self._is_torch = framework == "torch"
        self.device = device
        _check(layout)
        sizes = layout.extent_bytes
        self._begins: dict[int, int] = {}
        at = 0
        for extent in sorted(range(len(sizes)) if extents is None else extents):
            self._begins[extent] = at
            at += -(-sizes[extent] // _ALIGNED_BYTES) * _ALIGNED_BYTES
        address, index = self._allocate(max(at, 1))
        self.placement = Placement(
            tuple(address + self._begins.get(extent, 0) for extent in range(len(sizes))),
            (index,) * len(sizes),
            "cpu" if device == "cpu" else "cuda",
        )

    def _allocate(self, size_bytes: int) -> tuple[int, int]:
        """Sets `_bytes`; returns its address and the index of its device."""
        if self.device != "cpu":
            self._bytes = self._module.empty(size_bytes, dtype=self._module.uint8, device=self.device)
            self._module.cuda.synchronize(self.device)  # what is queued may still write there
            return self._bytes.data_ptr(), self._bytes.device.index or 0
        buffer = HostBuffer(size_bytes)
        address = buffer.address
        try:
            self._bytes = self._module.from_dlpack(buffer) if self._is_torch else self._module.frombuffer(buffer, "u1")
        finally:
            buffer.close_after_exports()
        return address, 0

    def tensor(self, info: LayoutTensor, like: Any = None) -> Any:
        """A tensor on this memory; one that would be misaligned there is a copy.

        One that is to be copied into `like` has a type for that, also where numpy lacks its own.
        """
        dtype = _BY_NAME[info.dtype]
        name = dtype.torch_name if self._is_torch else dtype.numpy_name
        itemsize = dtype.bits // 8
        if info.extent is None:
            kind = getattr(self._module, name or "uint8", self._module.uint8)
            where = {"device": self.device} if self._is_torch else {}
            return self._module.empty(info.shape, dtype=kind, **where)
        begin = self._begins[info.extent] + info.offset_bytes
        stretch = self._bytes[begin : begin + _span(info) * itemsize]
        kind = getattr(self._module, name, None) if name is not None else None
        if like is not None and not self._is_torch:
            kind = self._module.dtype(f"u{itemsize}") if _is_other_device_array(like) else like.dtype
        if kind is None:  # numpy has no such type, or this torch is too old
            return stretch
        if begin % itemsize:
            stretch = stretch.clone() if self._is_torch else stretch.copy()
        values = stretch.view(kind)
        if self._is_torch:
            return values.as_strided(info.shape, info.stride)
        strides = tuple(step * itemsize for step in info.stride)
        return self._module.lib.stride_tricks.as_strided(values, info.shape, strides)


def copy_into(destination: Any, source: Any, name: str) -> None:
    """Copies one tensor's elements into another one: of the same framework, or a numpy array's to a device.

    Raises DestinationMismatch, CudaError.
    """
    if _is_torch(destination):
        destination.detach().copy_(source)
    elif _is_other_device_array(destination):
        fill_array(destination, source.copy(order="C"), name)
    else:
        destination[...] = source


def _span(info: LayoutTensor) -> int:
    """Elements from the first one to the last one, both included."""
    return 1 + sum((length - 1) * step for length, step in zip(info.shape, info.stride, strict=True))


def _check(layout: Layout) -> None:
    """What another process says of its tensors must be possible before any memory is made by it."""
    wrong = []
    for info in layout.tensors:
        dtype = _BY_NAME.get(info.dtype)
        if dtype is None:
            wrong.append(f"{info.name!r} has the unknown dtype {info.dtype!r}")
        elif len(info.shape) != len(info.stride) or any(step < 0 for step in info.stride):
            wrong.append(f"{info.name!r} has shape {info.shape} and stride {info.stride}")
        elif (
            info.extent is not None
            and info.offset_bytes + _span(info) * dtype.bits // 8 > layout.extent_bytes[info.extent]
        ):
            wrong.append(f"{info.name!r} goes beyond its memory")
    if wrong:
        raise LayoutMismatch(f"the holder's layout is of no use: {_some(wrong)}")


def _is_torch(value: Any) -> bool:
    return hasattr(value, "data_ptr") and hasattr(value, "untyped_storage")


def _is_other_device_array(value: Any) -> bool:
    return not _is_torch(value) and is_device_array(value)


def _is_tensor(value: Any) -> bool:
    if _is_torch(value) or is_device_array(value):
        return True
    return hasattr(value, "__array_interface__") and hasattr(value, "strides")


def _why_not(tensor: Any) -> str:
    """Why a tensor cannot be moved; empty if it can."""
    if _is_other_device_array(tensor):
        if (name := dtype_name(tensor)) not in _OF_NUMPY:
            return f"dtype {name or tensor.__cuda_array_interface__['typestr']}"
        return why_not_moved(tensor)
    if not _is_torch(tensor):
        if not tensor.dtype.isnative or tensor.dtype.name not in _OF_NUMPY:
            return f"dtype {tensor.dtype}"
        return "a negative stride" if any(step < 0 or step % tensor.itemsize for step in tensor.strides) else ""
    if tensor.is_meta:
        return "on the meta device: it has no values"
    if str(tensor.layout) != "torch.strided" or tensor.is_quantized or hasattr(tensor, "__tensor_flatten__"):
        return f"a {type(tensor).__name__} of layout {tensor.layout}: its memory is opaque"
    if tensor.is_conj() or tensor.is_neg():
        return "its memory is to be conjugated or negated: resolve that first"
    if tensor.device.type not in _DEVICES:
        return f"on {tensor.device}: host memory and CUDA devices are supported"
    return "" if str(tensor.dtype) in _BY_NAME else f"dtype {tensor.dtype}"


def _why_not_filled(tensor: Any) -> str:
    """Why nothing can be written there; empty if it can."""
    if _is_torch(tensor):
        return ""
    interface = getattr(tensor, "__cuda_array_interface__", None) or tensor.__array_interface__
    return "it is read-only" if interface["data"][1] else ""


def _local(name: str, tensor: Any) -> LocalTensor:
    if _is_torch(tensor):
        return _of_torch(name, tensor)
    if is_device_array(tensor):
        return described_array(name, tensor, f"torch.{_OF_NUMPY[dtype_name(tensor)]}")
    return _of_numpy(name, tensor)


def _of_torch(name: str, tensor: Any) -> LocalTensor:
    storage, itemsize = tensor.untyped_storage(), tensor.element_size()
    return LocalTensor(
        name,
        str(tensor.dtype),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        storage.data_ptr() + tensor.storage_offset() * itemsize,
        itemsize,
        storage.data_ptr(),
        storage.nbytes(),
        _DEVICES[tensor.device.type],
        tensor.device.index or 0,
    )


def _of_numpy(name: str, array: Any) -> LocalTensor:
    address, itemsize = array.__array_interface__["data"][0], array.itemsize
    strides = tuple(step // itemsize for step in array.strides)
    steps = zip(array.shape, strides, strict=True)
    span = 0 if 0 in array.shape else 1 + sum((length - 1) * step for length, step in steps)
    dtype = f"torch.{_OF_NUMPY[array.dtype.name]}"
    return LocalTensor(name, dtype, array.shape, strides, address, itemsize, address, span * itemsize, "cpu", 0)


def _kind(value: Any) -> str:
    return type(value).__name__


def _some(lines: list[str]) -> str:
    more = f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    return ", ".join(lines[:_NAMED]) + more
