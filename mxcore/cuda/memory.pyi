"""Pinned host memory, device memory, and asynchronous copies between them, compiled.

All memory here is freed by `close` or by the destructor, which warns (ResourceWarning) instead of raising. Nobody waits
for copies that are still on their way: synchronise the stream first. Addresses are integers; a wrong one is an error of
the driver at best. Calls release the GIL and may be made from any thread.
"""

from typing import final

from mxcore.cuda.context import Context, ContextObject
from mxcore.cuda.stream import Stream
from mxcore.memory import HostBuffer

MAX_BYTES: int

class Memory(ContextObject):
    """The base of the three kinds below."""

    @property
    def size_bytes(self) -> int: ...

@final
class PinnedBuffer(Memory):
    """Host memory that the driver made (cuMemHostAlloc): portable, and readable by kernels at the same address.

    Raises ValueError for a size that cannot be, CudaError (DeviceMemoryError) where there is no such memory.
    """

    def __init__(self, context: Context, size_bytes: int) -> None: ...
    @property
    def address(self) -> int:
        """Of the first byte; HostBufferClosed after `close`."""

    def close(self) -> None: ...

@final
class Registration(Memory):
    """A HostBuffer that is pinned as long as this lives (cuMemHostRegister), and cannot be closed meanwhile.

    Raises CudaError where the driver pins no (more) memory, such as under a small RLIMIT_MEMLOCK.
    """

    def __init__(self, context: Context, buffer: HostBuffer) -> None: ...
    @property
    def device_address(self) -> int:
        """Where kernels find the buffer's first byte."""

    def close(self) -> None: ...

@final
class DeviceBuffer(Memory):
    """Device memory (cuMemAlloc), exported by DLPack as bytes to torch and others, without a copy.

    An export may be taken only after what fills the memory is done: it is not ordered with any stream, whichever the
    consumer names. While exports are out, the memory stays, and `close` raises HostBufferBusy. What cannot be exported
    as asked for (a copy, another device, stream 0) raises BufferError. Raises DeviceMemoryError where there is no
    memory left.
    """

    def __init__(self, context: Context, size_bytes: int) -> None: ...
    @property
    def address(self) -> int:
        """Of the first byte; HostBufferClosed after `close`."""

    @property
    def exports(self) -> int: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def close(self) -> None: ...

def copy_to_device(to: int, source: int, size_bytes: int, stream: Stream) -> None:
    """Starts a copy from host memory; it is asynchronous only from pinned memory. The memory has to stay until then."""

def copy_to_host(to: int, source: int, size_bytes: int, stream: Stream) -> None:
    """Starts a copy into host memory."""

def copy_on_device(to: int, source: int, size_bytes: int, stream: Stream) -> None:
    """Starts a copy between two places of device memory."""

def live_pinned_bytes() -> int:
    """Host memory that this process holds pinned by this module."""

def live_device_bytes() -> int:
    """Device memory that this process holds by this module."""
