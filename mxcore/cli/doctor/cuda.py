"""`mx doctor`: CUDA, checked in another process, because a driver may hang or crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from mxcore.cli.doctor.findings import Finding

_SECONDS = 120.0  # a first context on a machine with many GPUs takes a while
_PINNED_BYTES = 64 * 1024 * 1024
_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def all_findings() -> list[Finding]:
    """Driver and devices, pinned memory, what a worker would prove, cuda_ipc, GPUDirect Storage."""
    command = [sys.executable, "-m", "mxcore.cli.doctor.cuda"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return [
            Finding("cuda", "warn", f"the driver gave no answer within {_SECONDS:g} s", "look at nvidia-smi, dmesg")
        ]
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or [f"the probe ended with {ran.returncode}"])[-1]
        return [Finding("cuda", "warn", last, "look at nvidia-smi, dmesg")]
    return [Finding(**found) for found in json.loads(ran.stdout)]


def look() -> list[Finding]:
    """The findings, made in this process."""
    from mxcore.cuda import driver as cuda_driver
    from mxcore.errors import CudaError, CudaMissing

    try:
        library, count = cuda_driver.load_driver(), cuda_driver.device_count()
    except CudaMissing as error:
        there = "cuInit failed" in str(error)
        do = "on a GPU machine: install the driver, and give the container the GPU (nvidia-container-toolkit)"
        fact = str(error) if there else "no CUDA driver (libcuda.so.1): weights stay in host memory"
        return [Finding("cuda", "warn" if there else "note", fact, "look at nvidia-smi" if there else do)]
    except CudaError as error:
        return [Finding("cuda", "warn", str(error), "look at nvidia-smi")]
    version = ".".join(map(str, cuda_driver.driver_version()))
    if count == 0:
        do = "check CUDA_VISIBLE_DEVICES and the pod's GPU limits"
        return [Finding("cuda", "warn", f"no device, driver for CUDA {version}", do)]
    names = ", ".join(sorted({cuda_driver.Device(index).name for index in range(count)}))
    found = [Finding("cuda", "ok", f"{count} devices ({names}), driver for CUDA {version}, {library}")]
    proofs = [_proof(index) for index in range(count)]
    return [*found, _pinned(), *proofs, _between_processes(_holder_command()), _direct_storage()]


def _pinned() -> Finding:
    from mxcore.cuda import PinnedBuffer, Registration, context_of
    from mxcore.errors import CudaError
    from mxcore.memory import HostBuffer

    size = f"{_PINNED_BYTES >> 20} MiB"
    try:
        PinnedBuffer(context_of(0), _PINNED_BYTES).close()
        with HostBuffer(_PINNED_BYTES) as buffer:
            Registration(context_of(0), buffer).close()
    except CudaError as error:
        do = "ulimit -l unlimited, or the capability IPC_LOCK in the pod's securityContext; without, loads are slower"
        return Finding("pinned memory", "warn", f"{size} cannot be pinned: {error}", do)
    return Finding("pinned memory", "ok", f"{size} can be pinned")


def _proof(index: int) -> Finding:
    from mxcore.errors import LayoutUnsupported
    from mxcore.transfer.layout import Placement
    from mxcore.transfer.route import proven_device, release_devices

    name = f"device {index}"
    try:
        proven_device(Placement((0,), (index,), "cuda"))
    except LayoutUnsupported as error:
        do = "workers on it load from storage; with NIXL: its UCX needs CUDA (nixl-cu12 or nixl-cu13 as the driver is)"
        return Finding(name, "warn", str(error), do)
    finally:
        release_devices()
    return Finding(name, "ok", "digests are right, and NIXL moves its memory")


def _holder_command() -> list[str]:
    return [sys.executable, "-c", "from mxcore.transfer.route.same_device import hold; hold(0)"]


def _between_processes(command: list[str]) -> Finding:
    """Whether one process can read device memory of another one (started by `command`), as two workers do."""
    from mxcore.transfer.route import cannot_read
    from mxserver.wire.proto import mx_pb2

    name, do = "cuda_ipc", "nothing, if one worker runs here: others on this machine send to it over TCP"
    mapped = [name for name in _ALLOCATOR_SETTINGS if "expandable_segments:true" in os.environ.get(name, "").lower()]
    if mapped:
        fact = f"{mapped[0]} has expandable_segments: such memory is not read by other processes"
        return Finding(name, "note", fact, f"{do}; leave expandable_segments out to have it")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None  # noqa: S101 - both are pipes
        assert holder.stdout is not None  # noqa: S101
        line = holder.stdout.readline().strip()
        because = cannot_read(mx_pb2.DeviceProbe.FromString(bytes.fromhex(line)), 0) if line else "none can be exported"
        holder.stdin.close()
        holder.wait(_SECONDS)
    if because:
        return Finding(name, "warn", f"one process does not read another's device memory: {because}", do)
    return Finding(name, "ok", "processes of this PID namespace read each other's device memory")


def _direct_storage() -> Finding:
    """Whether GPUDirect Storage can be tried. Whether it works for a file is tried by the load that reads the file."""
    from mxcore.storage.load import chosen, probe, trial

    name, found = "gpudirect storage", probe()
    if chosen(None) == "off":
        return Finding(name, "note", "not used: MX_GPUDIRECT_STORAGE=off")
    if because := found.not_used_because or trial(None):
        do = (
            "nothing: files are read into pinned memory, and copied from there. For it: nvidia-fs on the machine, "
            "/dev/nvidia-fs* and /run/udev in the container, cuFile 1.14 or later"
        )
        return Finding(name, "note", f"not used: {because}", do)
    return Finding(name, "ok", f"cuFile {found.version} opens; a load tries it on its own files before it reads by it")


if __name__ == "__main__":
    print(json.dumps([finding.as_json() for finding in look()]))  # noqa: T201
