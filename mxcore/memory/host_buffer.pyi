"""Aligned, reusable host memory, compiled."""

from types import TracebackType
from typing import Self, final

@final
class HostBuffer:
    """Host memory of one size, mapped once and used again and again: first touch is what costs (2 GB/s with 4 KiB
    pages, 5 to 7 GB/s with huge ones).

    The memory is zero at first and private to the process. It begins at a multiple of `alignment_bytes` (a power of
    two; at least a page). `huge_pages` asks the kernel for transparent huge pages (madvise) and aligns to 2 MiB; it
    has no effect below 2 MiB, and where the kernel refuses, `huge_pages` reads False and all else works.

    It is a writable buffer of unsigned bytes, and exports itself by DLPack (one dimension of uint8 on the CPU, without
    a copy; versioned or legacy capsule by `max_version`), to numpy and torch alike. While such exports are out, it
    cannot be closed, and they keep it alive. Attributes and methods may be used from any thread that holds the GIL;
    who writes the bytes when is the callers' business.

    Raises ValueError for a size or alignment that cannot be, HostMemoryError if there is no such memory. A buffer that
    is destroyed without `close()` frees its memory and warns (ResourceWarning) with the line that made it.
    """

    def __init__(self, size_bytes: int, *, alignment_bytes: int = 4096, huge_pages: bool = True) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview:
        """A writable view; HostBufferClosed after `close()`."""
    def __dlpack__(
        self,
        *,
        stream: None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A capsule as in the array API standard 2023.12; BufferError for another device, a stream, or copy=True."""
    def __dlpack_device__(self) -> tuple[int, int]:
        """(1, 0): the CPU."""
    def __len__(self) -> int: ...
    @property
    def address(self) -> int:
        """The first byte's address; HostBufferClosed after `close()`."""
    @property
    def size_bytes(self) -> int: ...
    @property
    def alignment_bytes(self) -> int:
        """What the address is a multiple of: what was asked for, a page, or 2 MiB, whichever is most."""
    @property
    def huge_pages(self) -> bool:
        """Whether the kernel agreed to use huge pages where it has some."""
    @property
    def exports(self) -> int:
        """Views and DLPack tensors of the memory that are out."""
    @property
    def closed(self) -> bool: ...
    def close(self) -> None:
        """Gives the memory back. HostBufferBusy while exports are out; without effect when closed already."""

    def close_after_exports(self) -> None:
        """Leaves the memory to its exports (views, tensors): it is given back, without a warning, with the last one."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

def live_host_buffers() -> int:
    """Host buffers of this process that hold memory: 0 when all are closed."""

def live_host_bytes() -> int:
    """The bytes that they hold."""
