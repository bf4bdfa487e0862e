"""MX_RDMA_NIC_PIN: which port of which network card serves a device.

UCX chooses for each process alone: where a host has several cards, all its ranks may come to the same one, or to one
behind another processor (https://github.com/openucx/ucx/issues/11259). Here each rank makes the same assignment of all
devices of the host to all usable ports, out of /sys, and takes its own part of it: no port serves more devices than it
has to, and near ones go together. A device and a card are the nearer, the more bridges and switches their paths in /sys
share; then a common NUMA node counts.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from mxcore.transfer.route.rdma_devices import usable_ports

__all__ = ["NicChoice", "choose_nic", "net_devices", "pin_nic"]

AUTO = "auto"
_ROOT = Path("/")
_DEVICE_CLASSES = ("0x0300", "0x0302", "0x1200")  # display, 3D, accelerator (PCI Code and ID Assignment)
_DEVICE_VENDORS = ("0x10de", "0x1002")  # NVIDIA, AMD
_RATE = re.compile(r"\s*([\d.]+) Gb/sec")
_lock = threading.Lock()
_pinned: list[str] = []


@dataclass(frozen=True)
class NicChoice:
    """A port as UCX names it (`mlx5_0:1`), and why it, or why none (empty)."""

    port: str
    because: str


@dataclass(frozen=True)
class _Place:
    path: tuple[str, ...]  # in /sys/devices, from the root complex on
    node: str  # NUMA


def choose_nic(pci_bus_id: str, told: str, *, least_gbps: float | None = None, root: Path = _ROOT) -> NicChoice:
    """The port for the device at this address (`0000:1b:00.0`).

    `told` is `auto`, or names of cards or ports: the first is for the device with the lowest address, and so on, again
    from the first where there are more devices. With `auto` ports below `least_gbps` (Gb/s) are left out; unless it is
    given, those that are slower than the fastest.
    """
    devices = _devices(root)
    own = pci_bus_id.lower()
    if own not in devices:
        return NicChoice("", f"{own} is not among the devices of this host in /sys ({', '.join(devices) or 'none'})")
    usable = usable_ports(root, {})
    if told != AUTO:
        return _told(own, sorted(devices), [part.strip() for part in told.split(",") if part.strip()], usable)
    rates = {port: _rate_gbps(port, root) for port in usable}
    least = max(rates.values(), default=0.0) if least_gbps is None else least_gbps
    ports = [port for port, rate in rates.items() if rate >= least]
    if not ports:
        return NicChoice("", f"no usable RDMA port has {least:g} Gb/s or more ({rates or 'there is none'})")
    chosen = _assigned(devices, {port: _place(_card(port, root)) for port in ports})[own]
    return NicChoice(chosen, f"of {len(ports)} ports with {least:g} Gb/s or more, for {len(devices)} devices")


def pin_nic(port: str) -> None:
    """All agents of this process that are made from now on use this RDMA port; the user's UCX_NET_DEVICES wins."""
    with _lock:
        _pinned[:] = [port]


def net_devices(root: Path = _ROOT) -> str | None:
    """What UCX_NET_DEVICES is to be: the pinned port, and all interfaces, for TCP. None: nothing is pinned."""
    with _lock:
        pinned = list(_pinned)
    if not pinned:
        return None
    interfaces = sorted(path.name for path in (root / "sys/class/net").glob("*") if path.is_dir())
    return ",".join(pinned + interfaces)


def _told(own: str, devices: Sequence[str], names: Sequence[str], usable: Sequence[str]) -> NicChoice:
    name = names[devices.index(own) % len(names)] if names else ""
    port = name if ":" in name else f"{name}:1"
    if port not in usable:
        return NicChoice("", f"{port} is no RDMA port that can be used here ({', '.join(usable) or 'there is none'})")
    return NicChoice(port, "as MX_RDMA_NIC_PIN says")


def _assigned(devices: dict[str, _Place], ports: dict[str, _Place]) -> dict[str, str]:
    """A port for each device: the nearest pairs first, and no port for more devices than it has to."""
    most = -(-len(devices) // len(ports))
    pairs = sorted(
        (-_shared(place, near), place.node != near.node, device, port)
        for device, place in devices.items()
        for port, near in ports.items()
    )
    assigned: dict[str, str] = {}
    used: Counter[str] = Counter()
    for _, _, device, port in pairs:
        if device not in assigned and used[port] < most:
            assigned[device] = port
            used[port] += 1
    return assigned


def _shared(one: _Place, other: _Place) -> int:
    """How many bridges and switches lie above both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one.path, other.path, strict=False)))


def _devices(root: Path) -> dict[str, _Place]:
    """All devices of the host by address, whether this process may use them or not."""
    found = {}
    for entry in sorted((root / "sys/bus/pci/devices").glob("*")):
        kind, vendor = ((entry / name).read_text().strip() for name in ("class", "vendor"))
        if kind.startswith(_DEVICE_CLASSES) and vendor in _DEVICE_VENDORS:
            found[entry.name.lower()] = _place(entry)
    return found


def _place(entry: Path) -> _Place:
    node = entry / "numa_node"
    return _Place(entry.resolve().parts, node.read_text().strip() if node.is_file() else "")


def _card(port: str, root: Path) -> Path:
    return root / "sys/class/infiniband" / port.partition(":")[0] / "device"


def _rate_gbps(port: str, root: Path) -> float:
    name, _, number = port.partition(":")
    file = root / "sys/class/infiniband" / name / "ports" / number / "rate"
    found = _RATE.match(file.read_text()) if file.is_file() else None
    return float(found[1]) if found else 0.0
