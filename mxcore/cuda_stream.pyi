"""Contexts, streams and events of the CUDA driver, compiled.

A handle that exists is valid: making one that cannot be raises (CudaError, CudaMissing), and whoever depends on another
holds it. Destructors never raise; what they could not free is a ResourceWarning. All calls release the GIL; objects may
be used from any thread, and every thread finds its own current context unchanged after each call.
"""

from typing import final

@final
class Context:
    """A device's primary context, which torch uses too: retained, never made beside it, given back with the object.

    Take it by `context_of`, which hands out one object a device.
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

def context_of(index: int) -> Context:
    """The context of a device; the same object as long as anybody holds it."""

def current_context() -> int:
    """The handle of the context that this thread has current; 0: none."""

@final
class Stream:
    """A stream that does not wait for the default one. Destroying it lets what was given to it come to its end."""

    def __init__(self, context: Context) -> None: ...
    @property
    def context(self) -> Context: ...
    @property
    def address(self) -> int:
        """The driver's handle (CUstream)."""

    def synchronize(self) -> None:
        """Waits until all that it was given is done. Raises the CudaError of what failed."""

    def done(self) -> bool:
        """Whether all that it was given is done. Raises the CudaError of what failed."""

    def wait(self, event: Event) -> None:
        """What is given to it from now on starts after the event."""

@final
class Event:
    """A point in a stream. Waiting for it sleeps instead of spinning; only with `timing` it keeps the time."""

    def __init__(self, context: Context, *, timing: bool = False) -> None: ...
    @property
    def context(self) -> Context: ...
    @property
    def address(self) -> int:
        """The driver's handle (CUevent)."""

    def record(self, stream: Stream | int) -> None:
        """Marks the end of what `stream` (or that CUstream of somebody else; 0 is the default stream) was given."""

    def synchronize(self) -> None: ...
    def done(self) -> bool: ...
    def seconds_since(self, earlier: Event) -> float:
        """Time on the device between two events made with `timing`."""
