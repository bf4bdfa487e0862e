"""Device memory of one process in another process of the same machine (cuIpc*), compiled.

The driver exports whole allocations of cuMemAlloc (cudaMalloc) so, to processes of the same PID namespace; not what
cuMemCreate made (torch's expandable segments, the allocator of vLLM's sleep mode). Calls release the GIL and may be
made from any thread.
"""

from typing import final

from mxcore.cuda.context import Context, ContextObject

HANDLE_BYTES: int

def export_memory(context: Context, address: int) -> tuple[bytes, int]:
    """(handle of the allocation that the address is in, the address' place in it in bytes).

    The memory has to stay as long as another process has it opened. Raises CudaError for memory that is not exported.
    """

@final
class OpenedMemory(ContextObject):
    """Another process' allocation, at an address of this one while this lives.

    What this process still reads there when it is closed has to be waited for before. Raises ValueError for a handle of
    another size, CudaError where the driver does not open it: another machine or PID namespace, a device that this
    process cannot see, memory of this process itself, a process that is gone.
    """

    def __init__(self, context: Context, handle: bytes) -> None: ...
    @property
    def address(self) -> int:
        """Of the allocation's first byte; 0 after `close`."""

    def close(self) -> None: ...
