"""Which RDMA ports this process could use: active ones of devices that it may open, where it may pin memory.

A container sees its host's devices in /sys whether or not it may use them; the verbs are reached through
/dev/infiniband. Memory for RDMA is pinned: UCX alone pins about 50 MB a port for its receive buffers, and where it may
not, it warns again and again and registers no weights, not even for TCP.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RdmaPort", "pinnable_bytes", "pinning_advice", "pins_too_little", "rdma_ports", "usable_ports"]

_ROOT = Path("/")
_LEAST_PINNABLE_BYTES = 1 << 30  # systems' defaults (64 KiB, 8 MiB) are below it
_CAP_IPC_LOCK = 14  # linux/capability.h


@dataclass(frozen=True)
class RdmaPort:
    """A port of an RDMA device; `name` as in UCX_NET_DEVICES (mlx5_0:1), `openable`: this user may open the verbs."""

    name: str
    state: str
    openable: bool

    @property
    def active(self) -> bool:
        """Whether the link is up."""
        return "ACTIVE" in self.state


def rdma_ports(root: Path = _ROOT) -> list[RdmaPort]:
    """All ports that the kernel knows, sorted by name."""
    openable = _openable_devices(root)
    return [
        RdmaPort(f"{device.name}:{port.name}", (port / "state").read_text().strip(), device.name in openable)
        for device in sorted((root / "sys/class/infiniband").glob("*"))
        for port in sorted((device / "ports").glob("*"))
    ]


def usable_ports(root: Path = _ROOT, environ: Mapping[str, str] | None = None) -> list[str]:
    """Names of active ports that can be opened and that UCX_NET_DEVICES, where it is set, does not leave out.

    Empty where hardly any memory may be pinned.
    """
    values = os.environ if environ is None else environ
    chosen = [part.strip() for part in values.get("UCX_NET_DEVICES", "all").split(",")]
    found = [port for port in rdma_ports(root) if port.active and port.openable and _is_chosen(port.name, chosen)]
    return [port.name for port in found] if found and not pins_too_little(root) else []


def pinnable_bytes(root: Path = _ROOT) -> int | None:
    """How much memory this process may pin; None without a limit."""
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = limit_bytes == resource.RLIM_INFINITY or _effective_capabilities(root) & (1 << _CAP_IPC_LOCK)
    return None if unlimited else limit_bytes


def pins_too_little(root: Path = _ROOT) -> bool:
    """Whether there is an RDMA device that UCX would open, and too little memory may be pinned to use it."""
    limit_bytes = pinnable_bytes(root)
    return limit_bytes is not None and limit_bytes < _LEAST_PINNABLE_BYTES and bool(_openable_devices(root))


def pinning_advice(needed_bytes: int = 0, root: Path = _ROOT) -> str:
    """What to do about memory that cannot be registered; empty unless an RDMA device and a limit are the reason."""
    limit_bytes = pinnable_bytes(root)
    if limit_bytes is None or not _openable_devices(root):
        return ""
    needed = f" ({needed_bytes} bytes)" if needed_bytes else ""
    return (
        f"; RDMA pins what is registered{needed}, RLIMIT_MEMLOCK allows {limit_bytes} bytes: set ulimit -l unlimited, "
        "or add the capability IPC_LOCK to the pod's securityContext, or MX_TRANSPORT=tcp"
    )


def _effective_capabilities(root: Path) -> int:
    for line in (root / "proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _is_chosen(name: str, chosen: list[str]) -> bool:
    if chosen[0].startswith("^"):
        return name not in (chosen[0][1:], *chosen[1:])
    return "all" in chosen or name in chosen or name.partition(":")[0] in chosen


def _openable_devices(root: Path) -> set[str]:
    """Names of devices whose character device this user may read and write."""
    verbs = root / "sys/class/infiniband_verbs"
    return {
        (entry / "ibdev").read_text().strip()
        for entry in verbs.glob("uverbs*")
        if os.access(root / "dev/infiniband" / entry.name, os.R_OK | os.W_OK)
    }
