"""mixsum-64 (docs/reference/digests.md) of device memory, by kernels that the driver compiles of the PTX beside it."""

from pathlib import Path
from typing import final

from mxcore.cuda.context import Context, ContextObject
from mxcore.memory import Uint64Buffer

PLAN_BYTES: int
"""Pinned host memory that a DeviceDigest holds."""
PTX_FILE: Path

@final
class Kernels(ContextObject):
    """The kernels on one device, loaded once as long as anybody uses them. For the compiled modules."""

    def __init__(self, context: Context) -> None: ...

@final
class DeviceDigest:
    """Makes digests on one device; any thread may call, one at a time is served.

    Holds PLAN_BYTES of pinned host memory and nothing on the device but the kernels. Raises CudaError where the driver
    takes no kernels (its compiler's words are in the message) or pins no memory.
    """

    def __init__(self, context: Context) -> None: ...
    @property
    def context(self) -> Context: ...
    def many(self, addresses: Uint64Buffer, lengths: Uint64Buffer, segment_starts: Uint64Buffer) -> bytes:
        """One digest a group of segments of the device's memory, as `mxcore.digest.mixsum_64_many`.

        Waits until it is done. What still writes there has to be waited for before: this stream waits for nobody.
        Raises ValueError for arrays that do not fit, CudaError for addresses that are not the device's: after such an
        error nothing works on the device any more, for torch neither.
        """

    def close(self) -> None:
        """Frees the pinned memory; `many` raises CudaError then. Idempotent."""
