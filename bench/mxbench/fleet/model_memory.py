"""The memory of a made-up model, of the host or of a CUDA device, and what has to be in it."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from mxcore.memory import HostBuffer
from mxcore.transfer.layout import LocalTensor

__all__ = ["DeviceMemory", "HostMemory", "ModelMemory", "content_pieces", "tensors_of", "written_file"]

CONTENT_BYTES = (8 << 20) - 13  # repeated: never at the same place of a chunk
_STAGE_BYTES = 8 << 20


class ModelMemory(Protocol):
    """One allocation. `device` is its type and index, as placements have them."""

    address: int
    size_bytes: int
    device: tuple[str, int]

    def write(self, at: int, data: bytes) -> None:
        """Puts bytes there."""

    def read(self, at: int, count: int) -> bytes:
        """What is there."""

    def close(self) -> None:
        """Gives it back."""


class HostMemory:
    """Host memory, touched once: first touch is slow."""

    def __init__(self, size_bytes: int) -> None:
        self._buffer = HostBuffer(size_bytes)
        self._view = memoryview(self._buffer)
        self.address, self.size_bytes = self._buffer.address, size_bytes
        self.device = ("cpu", 0)

    @property
    def view(self) -> memoryview:
        """All of it."""
        return self._view

    def write(self, at: int, data: bytes) -> None:
        """See ModelMemory."""
        self._view[at : at + len(data)] = data

    def read(self, at: int, count: int) -> bytes:
        """See ModelMemory."""
        return bytes(self._view[at : at + count])

    def close(self) -> None:
        """See ModelMemory."""
        self._view.release()
        self._buffer.close_after_exports()


class DeviceMemory:
    """Memory of a CUDA device. Raises CudaError where there is none."""

    def __init__(self, size_bytes: int, index: int) -> None:
        from mxcore.cuda import DeviceBuffer, PinnedBuffer, Stream, context_of

        context = context_of(index)
        self._buffer = DeviceBuffer(context, size_bytes)
        self._stage = PinnedBuffer(context, _STAGE_BYTES)
        self._stream = Stream(context)
        self.address, self.size_bytes = self._buffer.address, size_bytes
        self.device = ("cuda", index)

    def write(self, at: int, data: bytes) -> None:
        """See ModelMemory; at most 8 MiB."""
        from mxcore.cuda import copy_to_device

        ctypes.memmove(self._stage.address, data, len(data))
        copy_to_device(self.address + at, self._stage.address, len(data), self._stream)
        self._stream.synchronize()

    def read(self, at: int, count: int) -> bytes:
        """See ModelMemory; at most 8 MiB."""
        from mxcore.cuda import copy_to_host

        copy_to_host(self._stage.address, self.address + at, count, self._stream)
        self._stream.synchronize()
        return ctypes.string_at(self._stage.address, count)

    def close(self) -> None:
        """See ModelMemory."""
        self._stage.close()
        self._buffer.close()


def content_pieces(content: int, size_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Where each piece begins, and its bytes: random ones, the same on every machine for one `content`."""
    some = random.Random(content).randbytes(CONTENT_BYTES)
    for at in range(0, size_bytes, CONTENT_BYTES):
        yield at, some[: size_bytes - at]


def written_file(folder: Path, content: int, size_bytes: int) -> Path:
    """A file with that content: what `storage` is to a worker."""
    file = folder / f"mx-bench-model-{content}"
    with file.open("wb") as out:
        for _, piece in content_pieces(content, size_bytes):
            out.write(piece)
    return file


def tensors_of(memory: ModelMemory, stretches: list[tuple[int, int]]) -> list[LocalTensor]:
    """Each stretch of the memory as a tensor of bytes."""
    kind, index = memory.device
    return [
        LocalTensor(
            f"t{number:05}",
            "torch.uint8",
            (end - begin,),
            (1,),
            memory.address + begin,
            1,
            memory.address,
            memory.size_bytes,
            kind,  # type: ignore[arg-type]
            index,
        )
        for number, (begin, end) in enumerate(stretches)
    ]
