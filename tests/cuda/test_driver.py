"""Opening the driver: found, refused, missing; the table's types; devices and addresses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mxcore.cuda import DeviceBuffer, PinnedBuffer, context_of
from mxcore.cuda import driver as cuda_driver
from mxcore.errors import CudaError
from tests.cuda.stand_in import ROOT, SOURCES, StandIn

HEADERS = [Path("/usr/local/cuda/include"), Path("/usr/include")]


def run(code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: a driver, once loaded, stays."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_importing_opens_nothing() -> None:
    code = """
import sys, mxcore
assert not any(name.startswith("mxcore.cuda") for name in sys.modules)
import mxcore.cuda.driver, mxcore.cuda.context, mxcore.cuda.stream, mxcore.cuda.memory
assert "libcuda" not in open("/proc/self/maps").read()
"""
    ran = run(code)
    assert ran.returncode == 0, ran.stderr


def test_a_missing_driver_says_where_it_was_looked_for() -> None:
    code = """
import mxcore.cuda.driver as driver
from mxcore.errors import CudaMissing
driver.CANDIDATES = ("libcuda_of_nobody.so.1", "/nowhere/libcuda.so.1")
for call in (driver.load_driver, driver.device_count, lambda: driver.device_of(4096), lambda: driver.Device(0)):
    try:
        call()
    except CudaMissing as error:
        assert error.code == "MX_CUDA_MISSING"
        assert "libcuda_of_nobody.so.1" in str(error) and "/nowhere/libcuda.so.1" in str(error), error
        assert "nvidia-container-toolkit" in str(error)
    else:
        raise AssertionError(call)
assert not driver.is_stand_in()
"""
    ran = run(code)
    assert ran.returncode == 0, ran.stderr


def test_the_stand_in_is_never_taken_for_a_driver(loaded: StandIn) -> None:
    code = f"""
import mxcore.cuda.driver as driver
from mxcore.errors import CudaMissing
driver.CANDIDATES = ({str(loaded.path)!r},)
try:
    driver.load_driver()
except CudaMissing as error:
    assert "stand-in, not a driver" in str(error), error
else:
    raise AssertionError
"""
    ran = run(code)
    assert ran.returncode == 0, ran.stderr


def test_a_driver_is_never_taken_for_the_stand_in() -> None:
    ran = run("""
import mxcore.cuda.driver as driver
from mxcore.errors import CudaMissing
try:
    driver._load_stand_in("libm.so.6")
except CudaMissing as error:
    assert "is no stand-in" in str(error), error
else:
    raise AssertionError
""")
    assert ran.returncode == 0, ran.stderr


def test_a_missing_symbol_is_named(tmp_path: Path) -> None:
    source, library = tmp_path / "old.c", tmp_path / "libcuda.so.1"
    source.write_text("int cuInit(unsigned flags) { return (int)flags; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    ran = run(f"""
import mxcore.cuda.driver as driver
from mxcore.errors import CudaMissing
driver.CANDIDATES = ({str(library)!r},)
try:
    driver.load_driver()
except CudaMissing as error:
    assert "cuDriverGetVersion" in str(error) and "too old" in str(error), error
else:
    raise AssertionError
""")
    assert ran.returncode == 0, ran.stderr


def test_a_driver_that_does_not_start_is_missing(loaded: StandIn) -> None:
    ran = run(f"""
import ctypes
import mxcore.cuda.driver as driver
from mxcore.errors import CudaMissing
ctypes.CDLL({str(loaded.path)!r}).mx_stand_in_fail(b"cuInit", ctypes.c_int64(0), 100)
try:
    driver._load_stand_in({str(loaded.path)!r})
except CudaMissing as error:
    assert "CUDA_ERROR_NO_DEVICE (100)" in str(error), error
else:
    raise AssertionError
driver._load_stand_in({str(loaded.path)!r})
assert driver.device_count() == 2
""")
    assert ran.returncode == 0, ran.stderr


def test_every_function_has_the_type_that_cuda_h_says() -> None:
    folder = next((folder for folder in HEADERS if (folder / "cuda.h").is_file()), None)
    compiler = shutil.which("cc")
    if folder is None or compiler is None:
        pytest.skip("no cuda.h on this machine: the table's types are compared where CUDA's headers are")
    command = [compiler, "-std=gnu11", "-fsyntax-only", "-I", str(ROOT / "mxcore"), "-I", str(folder)]
    ran = subprocess.run([*command, str(SOURCES / "table_matches.c")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_what_a_device_is(driver: StandIn) -> None:
    assert cuda_driver.is_stand_in()
    assert cuda_driver.driver_version() == (12, 8)
    assert cuda_driver.device_count() == 2
    device = cuda_driver.Device(1)
    assert (device.index, device.name, device.capability) == (1, "stand-in 1 (no GPU)", (9, 0))
    assert device.total_bytes == 1 << 32
    assert device.pci_bus_id == "ffff:01:00.0"
    assert device.unified_addressing
    with pytest.raises(CudaError, match="there is no device 2"):
        cuda_driver.Device(2)
    driver.devices(0)
    assert cuda_driver.device_count() == 0


def test_whose_memory_an_address_is(driver: StandIn) -> None:
    context = context_of(1)
    memory, pinned = DeviceBuffer(context, 1000), PinnedBuffer(context, 4096)
    assert cuda_driver.device_of(memory.address) == 1
    assert cuda_driver.device_of(memory.address + 999) == 1
    assert cuda_driver.device_of(pinned.address) == -1
    assert cuda_driver.device_of(64) == -1
    assert cuda_driver.address_range(memory.address + 500) == (memory.address, 1000)
    with pytest.raises(CudaError, match="lies in no allocation"):
        cuda_driver.address_range(pinned.address)
    memory.close()
    pinned.close()
