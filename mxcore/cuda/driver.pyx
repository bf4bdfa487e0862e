"""The CUDA driver's functions, opened at first use; signatures and docs in driver.pyi.

The table is filled once, under a lock, and never changes: whoever has its address calls without asking again. The GIL
is given away around every call that may take a while, and never taken inside one.
"""

import threading
import warnings

from libc.stddef cimport size_t

from mxcore.errors import CudaError, CudaMissing, DeviceMemoryError

CANDIDATES = ("libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1", "/usr/local/nvidia/lib64/libcuda.so.1")

cdef mx_cuda_table functions
cdef object load_lock = threading.Lock()
cdef object library_path = None  # until it is loaded and initialised
cdef bint stand_in_loaded = False


cdef str error_text(int status):
    cdef const char* name = NULL
    cdef const char* text = NULL
    if functions.error_name == NULL or functions.error_name(status, &name) != MX_CUDA_SUCCESS or name == NULL:
        return f"status {status}"
    if functions.error_string(status, &text) != MX_CUDA_SUCCESS or text == NULL:
        return f"{name.decode()} ({status})"
    return f"{name.decode()} ({status}): {text.decode()}"


cdef int check(int status, str call, str what="") except -1:
    if status == MX_CUDA_SUCCESS:
        return 0
    detail = f"{call} failed with {error_text(status)}" + (f"; {what}" if what else "")
    if status == MX_CUDA_OUT_OF_MEMORY:
        raise DeviceMemoryError(detail, status=status)
    raise CudaError(detail, status=status)


cdef int warn_failed(int status, str call, str what) except? -1:
    # A driver that has ended with the process has freed everything; without `warnings` the interpreter is going down.
    if status not in (MX_CUDA_SUCCESS, MX_CUDA_DEINITIALIZED) and warnings is not None:
        warnings.warn(f"{call} failed with {error_text(status)}: {what} may have leaked", ResourceWarning)
    return 0


cdef int open_first(object candidates, bint stand_in) except -1:
    """Under the lock."""
    global library_path, stand_in_loaded
    cdef char reason[512]
    cdef int status
    attempts = []
    for path in candidates:
        encoded = path.encode()
        if mx_cuda_open(encoded, stand_in, &functions, reason, sizeof(reason)) != 0:
            attempts.append(reason.decode("utf-8", "replace"))
            continue
        with nogil:
            status = functions.init(0)
        if status == MX_CUDA_SUCCESS:
            library_path, stand_in_loaded = path, stand_in
            return 0
        attempts.append(f"{path}: cuInit failed with {error_text(status)}")
    raise CudaMissing(f"no usable CUDA driver ({'; '.join(attempts)}). On a GPU machine: install the driver, and give the "
                      "container the GPU (nvidia-container-toolkit)")


cdef const mx_cuda_table* cuda_table() except NULL:
    if library_path is None:
        load_driver()
    return &functions


def load_driver():
    with load_lock:
        if library_path is None:
            open_first(CANDIDATES, False)
        return library_path


def _load_stand_in(path):
    with load_lock:
        if library_path is not None:
            raise CudaError(f"{library_path} is loaded already")
        open_first([path], True)


def is_stand_in():
    return bool(stand_in_loaded)


def driver_version():
    cdef const mx_cuda_table* cuda = cuda_table()
    cdef int version = 0
    check(cuda.driver_version(&version), "cuDriverGetVersion")
    return version // 1000, version % 1000 // 10


def device_count():
    cdef const mx_cuda_table* cuda = cuda_table()
    cdef int count = 0
    check(cuda.device_count(&count), "cuDeviceGetCount")
    return count


cdef int handle_of(int index) except? -1:
    cdef int device = 0
    check(functions.device_get(&device, index), "cuDeviceGet", f"there is no device {index}")
    return device


cdef int attribute(int device, int which) except? -1:
    cdef int value = 0
    check(functions.device_attribute(&value, which, device), "cuDeviceGetAttribute", f"attribute {which}")
    return value


class Device:
    __slots__ = ("index", "name", "total_bytes", "pci_bus_id", "capability", "multiprocessors", "unified_addressing")

    def __init__(self, index):
        cdef const mx_cuda_table* cuda = cuda_table()
        cdef char text[256]
        cdef size_t total = 0
        cdef int device = handle_of(index)
        self.index = index
        check(cuda.device_name(text, sizeof(text), device), "cuDeviceGetName")
        self.name = text.decode("utf-8", "replace")
        check(cuda.device_total(&total, device), "cuDeviceTotalMem")
        self.total_bytes = total
        check(cuda.device_pci(text, sizeof(text), device), "cuDeviceGetPCIBusId")
        self.pci_bus_id = text.decode().lower()
        self.capability = (attribute(device, MX_DEVICE_CAPABILITY_MAJOR), attribute(device, MX_DEVICE_CAPABILITY_MINOR))
        self.multiprocessors = attribute(device, MX_DEVICE_MULTIPROCESSORS)
        self.unified_addressing = bool(attribute(device, MX_DEVICE_UNIFIED_ADDRESSING))

    def __repr__(self):
        return f"<Device {self.index}: {self.name}, {self.total_bytes} bytes, {self.pci_bus_id}>"


def device_of(address):
    """-1: no device memory that this driver knows."""
    cdef const mx_cuda_table* cuda = cuda_table()
    cdef unsigned int kind = 0
    cdef int ordinal = -1
    cdef mx_device_address place = address
    if cuda.pointer_attribute(&kind, MX_POINTER_MEMORY_TYPE, place) != MX_CUDA_SUCCESS or kind != MX_MEMORY_DEVICE:
        return -1
    check(cuda.pointer_attribute(&ordinal, MX_POINTER_DEVICE, place), "cuPointerGetAttribute", f"address {place:#x}")
    return ordinal


def address_range(address):
    cdef const mx_cuda_table* cuda = cuda_table()
    cdef mx_device_address place = address
    cdef mx_device_address base = 0
    cdef size_t size_bytes = 0
    if device_of(address) < 0:
        raise CudaError(f"{place:#x} lies in no allocation of this process on a device")
    check(cuda.pointer_attribute(&base, MX_POINTER_RANGE_START, place), "cuPointerGetAttribute", f"address {place:#x}")
    check(cuda.pointer_attribute(&size_bytes, MX_POINTER_RANGE_BYTES, place), "cuPointerGetAttribute",
          f"address {place:#x}")
    return base, size_bytes
