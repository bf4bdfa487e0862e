"""Where a torch or numpy tensor's elements are, without importing either."""

from __future__ import annotations

from typing import Any, NamedTuple

from mxcore.errors import DestinationMismatch
from mxcore.storage.checkpoint.dtypes import DTYPES

__all__ = ["Memory", "memory_of"]

_OF_TORCH = {f"torch.{dtype.torch_name}": code for code, dtype in DTYPES.items() if dtype.torch_name}
_OF_NUMPY = {dtype.numpy_name: code for code, dtype in DTYPES.items() if dtype.numpy_name}
_OF_ML_DTYPES = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


class Memory(NamedTuple):
    """`address` is the first element's; `dtype` safetensors' code, or the framework's name where there is none."""

    address: int
    dtype: str
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    size_bytes: int  # of the elements
    device: str
    contiguous: bool


def memory_of(tensor: Any) -> Memory:
    """Of a dense torch tensor or a writable numpy array. The caller keeps it alive while the memory is used.

    Raises DestinationMismatch for anything else, and for strides under which elements would share memory.
    """
    if hasattr(tensor, "data_ptr") and hasattr(tensor, "stride"):
        memory = _of_torch(tensor)
    elif hasattr(tensor, "__array_interface__"):
        memory = _of_numpy(tensor)
    else:
        raise DestinationMismatch(f"a destination is a torch or numpy tensor, not {type(tensor).__name__}")
    if not memory.contiguous and _overlaps(memory):
        raise DestinationMismatch(f"shape {memory.shape} with strides of {memory.strides_bytes} bytes overlaps itself")
    return memory


def _of_torch(tensor: Any) -> Memory:
    itemsize = tensor.element_size()
    shape = tuple(tensor.shape)
    return Memory(
        tensor.data_ptr(),
        _OF_TORCH.get(str(tensor.dtype), str(tensor.dtype)),
        shape,
        tuple(step * itemsize for step in tensor.stride()),
        tensor.numel() * itemsize,
        tensor.device.type,
        tensor.is_contiguous(),
    )


def _of_numpy(tensor: Any) -> Memory:
    name = tensor.dtype.name if tensor.dtype.isnative else str(tensor.dtype)
    address, read_only = tensor.__array_interface__["data"]
    if read_only:
        raise DestinationMismatch("the destination is a read-only array")
    code = _OF_NUMPY.get(name) or _OF_ML_DTYPES.get(name, name)
    return Memory(address, code, tensor.shape, tensor.strides, tensor.nbytes, "cpu", tensor.flags.c_contiguous)


def _overlaps(memory: Memory) -> bool:
    """Whether two elements may share memory: each stride has to be past all that smaller strides reach."""
    reach = memory.size_bytes
    for size in memory.shape:
        reach //= max(size, 1)
    for step, size in sorted(zip(memory.strides_bytes, memory.shape, strict=True)):
        if size == 1:
            continue
        if step < reach:
            return True
        reach = step * (size - 1) + reach
    return False
