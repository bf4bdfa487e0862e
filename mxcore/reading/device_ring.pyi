"""A ring of pinned host memory with streams, through which `checkpoint_reader.read_jobs` reads to a device."""

from typing import final

from mxcore.cuda import Context, Stream
from mxcore.memory import HostBuffer

MAX_THREADS: int
MAX_SLOTS: int

def slot_bytes(piece_bytes: int) -> int:
    """What one slot takes for pieces of so many bytes."""

@final
class DeviceRing:
    """`threads` times `slots` slots on `buffer`, which stays the caller's to close, after this.

    Made once and used again; one read at a time. With `pinned` the buffer is registered with the driver; without,
    copies go from pageable memory, which is right and slow. Raises ValueError for sizes that do not fit, CudaError
    where the driver pins no memory or takes no kernels.
    """

    def __init__(
        self,
        context: Context,
        buffer: HostBuffer,
        *,
        piece_bytes: int,
        threads: int,
        slots: int = 2,
        pinned: bool = True,
    ) -> None: ...
    @property
    def context(self) -> Context: ...
    @property
    def buffer(self) -> HostBuffer: ...
    @property
    def piece_bytes(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def pinned(self) -> bool: ...
    @property
    def copies(self) -> int:
        """Copies that were started so far, over all reads."""

    @property
    def launches(self) -> int:
        """Kernels that copied many small runs, so far."""

    def start_after(self, stream: Stream | int | None) -> None:
        """The next reads' copies wait for what `stream` (or a CUstream of somebody else) has been given until now.

        None: they wait for nothing.
        """

    def wait(self) -> None:
        """Returns when what the next reads' copies wait for is done."""

    def close(self) -> None:
        """Unpins the buffer. No read may be under way. Idempotent."""
