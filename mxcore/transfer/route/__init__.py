"""Which ways bytes can take between two workers, each proven by use, and devices that are proven."""

from __future__ import annotations

from mxcore.transfer.route.device_memory import allocation_regions, digester_of, memory_digests, require_movable
from mxcore.transfer.route.device_proof import ProvenDevice, nixl_device, proven_device, release_devices
from mxcore.transfer.route.nic_pinning import choose_nic, pin_nic
from mxcore.transfer.route.rdma_devices import pinnable_bytes, pinning_advice, pins_too_little, rdma_ports, usable_ports
from mxcore.transfer.route.routes import Operation, Route, UcxPolicy, choose_route, ucx_settings
from mxcore.transfer.route.same_device import DeviceProbeTarget, cannot_read, device_offer
from mxcore.transfer.route.same_host import ProbeTarget, can_read, host_identity

__all__ = [
    "DeviceProbeTarget",
    "Operation",
    "ProbeTarget",
    "ProvenDevice",
    "Route",
    "UcxPolicy",
    "allocation_regions",
    "can_read",
    "cannot_read",
    "choose_nic",
    "choose_route",
    "device_offer",
    "digester_of",
    "host_identity",
    "memory_digests",
    "nixl_device",
    "pin_nic",
    "pinnable_bytes",
    "pinning_advice",
    "pins_too_little",
    "proven_device",
    "rdma_ports",
    "release_devices",
    "require_movable",
    "ucx_settings",
    "usable_ports",
]
