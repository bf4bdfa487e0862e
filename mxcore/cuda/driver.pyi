"""The CUDA driver's functions, opened at first use; importing this opens nothing.

Every function here opens the driver if nobody has, and raises CudaMissing where there is none (or none that starts);
the message says where it looked. Safe from any thread; calls that may take a while release the GIL.
"""

CANDIDATES: tuple[str, ...]
"""Where the driver is looked for, in this order."""

def load_driver() -> str:
    """Opens the driver and calls cuInit, once; returns the library's path."""

def is_stand_in() -> bool:
    """Whether the tests' stand-in is loaded, which is no GPU: its device memory is host memory."""

def driver_version() -> tuple[int, int]:
    """The CUDA version that the driver supports, such as (12, 8)."""

def device_count() -> int:
    """Devices that this process may see; CUDA_VISIBLE_DEVICES counts."""

class Device:
    """What one device is; made by its index as CUDA counts. CudaError where there is none. Immutable by custom."""

    index: int
    name: str
    total_bytes: int
    pci_bus_id: str
    capability: tuple[int, int]
    multiprocessors: int
    unified_addressing: bool

    def __init__(self, index: int) -> None: ...

def device_of(address: int) -> int:
    """The device whose memory that address is; -1 for anything else: host memory, pinned memory, no memory."""

def address_range(address: int) -> tuple[int, int]:
    """(first byte, bytes) of the allocation that an address of device memory lies in. CudaError for another address."""

def _load_stand_in(path: str) -> None:
    """For tests alone: loads tests/cuda/driver's library, which `load_driver` refuses. CudaError if one is loaded."""
