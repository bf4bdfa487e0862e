"""Host memory near a device: on the NUMA node that its PCI slot hangs from, where the kernel knows one."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

__all__ = ["node_of", "prefer_node"]

_MPOL_PREFERRED = 1  # linux/mempolicy.h: there if it can be, elsewhere if not
_SYS_MBIND = {"x86_64": 237, "aarch64": 235}
_MASK_BITS = 1024


def node_of(pci_bus_id: str, root: Path = Path("/")) -> int | None:
    """The NUMA node of a PCI device (`0000:1b:00.0`); None if the kernel knows none."""
    try:
        node = int((root / "sys/bus/pci/devices" / pci_bus_id.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def prefer_node(address: int, size_bytes: int, node: int) -> bool:
    """Asks that pages of that memory (whole pages) which nobody has touched come from the node; False if refused."""
    number = _SYS_MBIND.get(platform.machine())
    if number is None or not 0 <= node < _MASK_BITS:
        return False
    words = (ctypes.c_ulong * (_MASK_BITS // 64))()
    words[node // 64] = 1 << node % 64
    arguments = (ctypes.c_void_p(address), ctypes.c_ulong(size_bytes), ctypes.c_int(_MPOL_PREFERRED), words)
    return int(ctypes.CDLL(None).syscall(number, *arguments, ctypes.c_ulong(_MASK_BITS + 1), ctypes.c_uint(0))) == 0
