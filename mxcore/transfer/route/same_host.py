"""Proof that one process may read another's memory on this host.

UCX moves bytes between processes of one host by cross-memory attach (CMA, process_vm_readv) where the kernel allows
it, and silently over TCP otherwise. A READ is one-sided only in the first case, and only a real read proves it: a
holder publishes random bytes with their address, and a receiver reads them there.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from pathlib import Path

from mxcore.process import read_attached
from mxserver.wire.proto import mx_pb2

__all__ = ["ProbeTarget", "can_read", "host_identity"]

_NONCE_BYTES = 32
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


class ProbeTarget:
    """Random bytes in this process that another one may try to read; they stay as long as this object does."""

    def __init__(self) -> None:
        self.nonce = secrets.token_bytes(_NONCE_BYTES)
        self._memory = ctypes.create_string_buffer(self.nonce, _NONCE_BYTES)

    def to_proto(self) -> mx_pb2.SameHostProbe:
        """Where they are; empty without /proc."""
        try:
            boot_id, namespace = host_identity()
        except OSError:
            return mx_pb2.SameHostProbe()
        return mx_pb2.SameHostProbe(
            boot_id=boot_id,
            pid_namespace=namespace,
            pid=os.getpid(),
            address=ctypes.addressof(self._memory),
            nonce=self.nonce,
        )


def can_read(probe: mx_pb2.SameHostProbe) -> bool:
    """Whether this process can read the probe's bytes out of the other process' memory."""
    if len(probe.nonce) != _NONCE_BYTES or probe.pid == 0:
        return False
    try:
        if host_identity() != (probe.boot_id, probe.pid_namespace):
            return False
        return _read_memory(probe.pid, probe.address, _NONCE_BYTES) == probe.nonce
    except OSError:
        return False


def host_identity() -> tuple[str, int]:
    """Which boot of which machine, and the PID namespace of this process. Raises OSError without /proc."""
    return _BOOT_ID.read_text(encoding="ascii").strip(), _PID_NAMESPACE.stat().st_ino


def _read_memory(pid: int, address: int, length: int) -> bytes:
    buffer = ctypes.create_string_buffer(length)
    read_attached(pid, [ctypes.addressof(buffer)], [address], [length], hashed=False)
    return buffer.raw
