"""Device memory by DLPack, read by the letter of the protocol: no consumer of CUDA memory runs without a GPU."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import pytest

from mxcore.cuda import DeviceBuffer, context_of
from mxcore.cuda.memory import live_device_bytes
from mxcore.errors import HostBufferBusy
from tests.cuda.stand_in import StandIn

SIZE = 100_000
DL_CUDA, DL_UINT = 2, 1
# A capsule does not copy its name: these outlive all of them.
USED = {b"dltensor": b"used_dltensor", b"dltensor_versioned": b"used_dltensor_versioned"}


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class Legacy(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", Deleter)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", Deleter), ("flags", ctypes.c_uint64), ("tensor", DLTensor),
    ]  # fmt: skip


class Consumer:
    """Takes a capsule over, as a framework does: renames it, and calls its deleter once, at the end."""

    def __init__(self, exporter: Any, max_version: tuple[int, int] | None = (1, 1), stream: int | None = None) -> None:
        capsule = exporter.__dlpack__(stream=stream, max_version=max_version)
        api = ctypes.pythonapi
        api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
        api.PyCapsule_GetPointer.restype = ctypes.c_void_p
        api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
        api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
        name = api.PyCapsule_GetName(capsule)
        self.versioned = name == b"dltensor_versioned"
        self._pointer = api.PyCapsule_GetPointer(capsule, name)
        api.PyCapsule_SetName(capsule, USED[name])
        self._capsule = capsule
        self.managed = (Versioned if self.versioned else Legacy).from_address(self._pointer)
        self.tensor: DLTensor = self.managed.tensor

    def delete(self) -> None:
        self.managed.deleter(self._pointer)


@pytest.mark.parametrize("max_version", [None, (0, 8), (1, 0), (1, 1), (2, 0)])
def test_every_field_is_as_the_protocol_says(driver: StandIn, max_version: tuple[int, int] | None) -> None:
    memory = DeviceBuffer(context_of(1), SIZE)
    assert memory.__dlpack_device__() == (DL_CUDA, 1)
    found = Consumer(memory, max_version)
    assert found.versioned == (max_version is not None and max_version[0] >= 1)
    tensor = found.tensor
    assert (tensor.data, tensor.device_type, tensor.device_id) == (memory.address, DL_CUDA, 1)
    assert (tensor.ndim, tensor.code, tensor.bits, tensor.lanes, tensor.byte_offset) == (1, DL_UINT, 8, 1, 0)
    assert (tensor.shape[0], tensor.strides[0]) == (SIZE, 1)
    assert memory.address % 256 == 0, "as DLPack wants data of a device"
    if found.versioned:
        assert (found.managed.major, found.managed.flags) == (1, 0), "writable, and no copy"
    assert memory.exports == 1
    with pytest.raises(HostBufferBusy, match="1 exports"):
        memory.close()
    found.delete()
    assert memory.exports == 0
    memory.close()


def test_the_memory_lives_as_long_as_its_consumer(driver: StandIn) -> None:
    memory = DeviceBuffer(context_of(0), SIZE)
    found, other = Consumer(memory), Consumer(memory, None)
    del memory
    gc.collect()
    assert live_device_bytes() == SIZE
    ctypes.memset(found.tensor.data, 7, SIZE)  # still there
    found.delete()
    assert live_device_bytes() == SIZE
    other.delete()
    assert live_device_bytes() == 0
    assert driver.counts().device_allocations == 0


@pytest.mark.parametrize("max_version", [None, (1, 1)])
def test_a_capsule_that_nobody_takes_gives_itself_back(driver: StandIn, max_version: tuple[int, int] | None) -> None:
    memory = DeviceBuffer(context_of(0), SIZE)
    capsule = memory.__dlpack__(max_version=max_version)
    assert memory.exports == 1
    del capsule
    assert memory.exports == 0
    memory.close()


@pytest.mark.parametrize("stream", [None, -1, 1, 2, 0x7F0000001000])
def test_streams_that_a_consumer_may_name(driver: StandIn, stream: int | None) -> None:
    memory = DeviceBuffer(context_of(0), SIZE)
    Consumer(memory, stream=stream).delete()
    memory.close()


def test_what_cannot_be_exported_as_asked_for_is_refused(driver: StandIn) -> None:
    memory = DeviceBuffer(context_of(0), SIZE)
    wrong: list[dict[str, Any]] = [
        {"copy": True}, {"dl_device": (1, 0)}, {"dl_device": (2, 1)}, {"stream": 0}, {"stream": -2}, {"stream": "1"},
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(BufferError):
            memory.__dlpack__(**arguments)
    right = memory.__dlpack__(dl_device=(2, 0), copy=False, max_version=(1, 0))
    del right
    assert memory.exports == 0
    memory.close()
