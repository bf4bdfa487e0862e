"""A device's primary context, compiled.

All calls release the GIL; objects may be used from any thread, and every thread finds its own current context unchanged
after each call. Destructors never raise; what they could not free is a ResourceWarning.
"""

from typing import final

@final
class Context:
    """A device's primary context, which torch uses too: retained, never made beside it, given back with the object.

    Take it by `context_of`, which hands out one object a device. Raises CudaError, CudaMissing.
    """

    def __init__(self, index: int) -> None: ...
    @property
    def index(self) -> int:
        """The device, as CUDA counts in this process."""

    @property
    def address(self) -> int:
        """The driver's handle (CUcontext)."""

    def synchronize(self) -> None:
        """Waits for everything that was given to the device in this context, by whomever. Raises CudaError."""

    def memory_info(self) -> tuple[int, int]:
        """(free, all) bytes of the device's memory."""

class ContextObject:
    """What lives in a context: a stream, an event, memory, kernels. The base of those; makes nothing by itself.

    One that exists is valid: making one that cannot be raises (CudaError, CudaMissing). It holds its context.
    """

    @property
    def context(self) -> Context: ...

def context_of(index: int) -> Context:
    """The context of a device; the same object as long as anybody holds it."""

def current_context() -> int:
    """The handle of the context that this thread has current; 0: none."""
