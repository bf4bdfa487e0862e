"""Streams and events of the CUDA driver, compiled.

A handle that exists is valid: making one that cannot be raises (CudaError, CudaMissing). Destructors never raise; what
they could not free is a ResourceWarning. All calls release the GIL; objects may be used from any thread.
"""

from typing import final

from mxcore.cuda.context import Context, ContextObject

@final
class Stream(ContextObject):
    """A stream that does not wait for the default one. Destroying it lets what was given to it come to its end."""

    def __init__(self, context: Context) -> None: ...
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
class Event(ContextObject):
    """A point in a stream. Waiting for it sleeps instead of spinning; only with `timing` it keeps the time."""

    def __init__(self, context: Context, *, timing: bool = False) -> None: ...
    @property
    def address(self) -> int:
        """The driver's handle (CUevent)."""

    def record(self, stream: Stream | int) -> None:
        """Marks the end of what `stream` (or that CUstream of somebody else; 0 is the default stream) was given."""

    def synchronize(self) -> None: ...
    def done(self) -> bool: ...
    def seconds_since(self, earlier: Event) -> float:
        """Time on the device between two events made with `timing`."""
