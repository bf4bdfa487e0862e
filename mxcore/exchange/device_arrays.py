"""Arrays in device memory that are none of torch's: those of cupy, numba and jax, by `__cuda_array_interface__`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from mxcore.cuda import Stream, context_of, copy_to_device, copy_to_host
from mxcore.cuda import driver as cuda_driver
from mxcore.errors import DestinationMismatch
from mxcore.transfer.layout import Layout, LocalTensor, Placement

__all__ = [
    "copy_extents_to_host",
    "described_array",
    "dtype_name",
    "fill_array",
    "is_device_array",
    "synchronize_all",
    "why_not_moved",
]

_KINDS = {"b": "bool", "i": "int", "u": "uint", "f": "float", "c": "complex"}


def is_device_array(value: Any) -> bool:
    """Whether it has the interface; torch's CUDA tensors have it too."""
    return hasattr(value, "__cuda_array_interface__")


def dtype_name(array: Any) -> str:
    """Its dtype as numpy, or ml_dtypes, names it; "" for none of theirs in the machine's byte order."""
    typestr: str = array.__cuda_array_interface__["typestr"]
    if typestr[0] not in "<|":
        return ""
    if (name := getattr(getattr(array, "dtype", None), "name", None)) is not None:
        return str(name)
    kind = _KINDS.get(typestr[1], "")
    return kind if kind in ("", "bool") else f"{kind}{8 * int(typestr[2:])}"


def why_not_moved(array: Any) -> str:
    """Why it cannot be moved, but for its dtype; empty if it can. Raises CudaMissing where there is no driver."""
    interface = array.__cuda_array_interface__
    if interface.get("mask") is not None:
        return "it has a mask"
    itemsize = int(interface["typestr"][2:])
    if any(step < 0 or step % itemsize for step in interface.get("strides") or ()):
        return "a negative stride"
    address = interface["data"][0]
    if math.prod(interface["shape"]) and cuda_driver.device_of(address) < 0:
        return f"{address:#x} is no device memory"
    return ""


def described_array(name: str, array: Any, dtype: str) -> LocalTensor:
    """As a layout is built of it."""
    interface = array.__cuda_array_interface__
    shape, address = tuple(interface["shape"]), interface["data"][0]
    itemsize = int(interface["typestr"][2:])
    steps = interface.get("strides")
    strides = _contiguous(shape) if steps is None else tuple(step // itemsize for step in steps)
    device = max(cuda_driver.device_of(address), 0) if math.prod(shape) else 0
    span = LocalTensor(name, dtype, shape, strides, address, itemsize, address, 0, "cuda", device).span_bytes
    return LocalTensor(name, dtype, shape, strides, address, itemsize, address, span, "cuda", device)


def synchronize_all(arrays: Iterable[Any]) -> None:
    """Waits for all that was queued on their devices, on whichever stream. Raises CudaError."""
    addresses = [array.__cuda_array_interface__["data"][0] for array in arrays]
    for device in {cuda_driver.device_of(address) for address in addresses if address} - {-1}:
        context_of(device).synchronize()


def copy_extents_to_host(layout: Layout, source: Placement, destination: Placement) -> None:
    """The bytes of device memory, once they are there. Raises CudaError."""
    streams: dict[int, Stream] = {}
    for device, address, to, size_bytes in zip(
        source.device_indices, source.addresses, destination.addresses, layout.extent_bytes, strict=True
    ):
        if size_bytes:
            stream = streams.get(device) or streams.setdefault(device, Stream(context_of(device)))
            copy_to_host(to, address, size_bytes, stream)
    for stream in streams.values():
        stream.synchronize()


def fill_array(destination: Any, source: Any, name: str) -> None:
    """Copies a contiguous numpy array's bytes into a device array. Raises DestinationMismatch, CudaError."""
    here = described_array(name, destination, "")
    steps = zip(here.shape, here.stride, _contiguous(here.shape), strict=True)
    if any(step != wanted for length, step, wanted in steps if length > 1):
        raise DestinationMismatch(
            f"{name}: it is published with other strides, and this device array is not contiguous: make it so"
        )
    if source.nbytes:
        stream = Stream(context_of(here.device_index))
        copy_to_device(here.address, source.__array_interface__["data"][0], source.nbytes, stream)
        stream.synchronize()


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements."""
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
