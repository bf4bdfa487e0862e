"""Reads the jobs of a list, in the way it is told, compiled; several threads, the GIL released."""

from array import array
from collections.abc import Callable

from mxcore.memory import HostBuffer
from mxcore.reading.cufile import FileHandles
from mxcore.reading.device_ring import DeviceRing
from mxcore.reading.read_jobs import JobList
from mxcore.reading.read_outcome import Outcome

BUFFERED: int
MAPPED: int
DIRECT: int
URING: int
MAX_THREADS: int
MAX_LANES: int
SLOT_PIECE_BYTES: int
"""The longest read past the page cache."""

def slot_bytes(jobs: JobList) -> int:
    """The room that one lane wants in `slots`."""

def read_jobs(
    jobs: JobList,
    order: array[int],
    *,
    way: int,
    other_way: int = -1,
    threads: int = 1,
    lanes: int = 1,
    read_ahead: int = 0,
    slots: HostBuffer | None = None,
    digests: array[int] | None = None,
    progress: Callable[[int], None] | None = None,
    device: DeviceRing | None = None,
    straight: FileHandles | None = None,
) -> Outcome:
    """Reads the jobs whose indices `order` has (int64), and returns when no thread is left.

    `other_way` (not with URING) is tried in turn with `way` for the first jobs; the faster one reads the rest.
    MAPPED wants all files mapped; DIRECT and URING want `slots` at a whole page with room for `lanes` lanes, and go
    through the page cache for a file without `open_direct`. DIRECT has one lane a thread. `read_ahead` is in jobs.
    `digests` (int64, one for each group) gets each group's XXH3-64. `progress` is called with the bytes done from this
    thread, about ten times a second, and ends the read by raising.

    With `device` the destinations are addresses of that device's memory, and all bytes pass its ring (BUFFERED or
    DIRECT, no `slots`); the jobs' pieces have to be the ring's. When this returns, all is on the device, also after an
    error of which nothing is under way any more. Raises CudaError then. With `straight` as well, long runs of files
    that are registered there come by cuFile, without the ring: the first failure ends that, and the outcome's `left`
    says which jobs are to be read again (after `straight` is closed, without it). Jobs with digests pass the ring.

    Destinations are the caller's to keep alive. Raises StorageError, TruncatedRead (also for a mapped file that is cut
    short meanwhile: SIGBUS is caught for our own threads), FileChanged, KeyboardInterrupt, ValueError for arguments
    that are not as said. After an error no thread writes any more.
    """

def uring_refused() -> int:
    """0 if this process may use io_uring, else the errno of io_uring_setup."""
