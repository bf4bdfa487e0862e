"""How much this process' TCP connections have received, as the kernel counts: whether a READ went over TCP.

UCX does not tell over which transport bytes came. A READ by cross-memory attach is complete when it is posted; one by
cuda_ipc is not, nor is one over TCP. But the latter comes through a socket.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

__all__ = ["TcpByteCounter", "tcp_received"]

_DESCRIPTORS = Path("/proc/self/fd")
_TCP_INFO_BYTES = 136
_BYTES_RECEIVED_AT = 128  # tcpi_bytes_received of linux/tcp.h's struct tcp_info


_libc = ctypes.CDLL(None)
_libc.getsockopt.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def tcp_received() -> dict[int, int]:
    """Bytes received so far by each TCP connection of this process, by its socket's inode.

    Others' descriptors are neither copied nor closed: closing a copy would drop all of the process' POSIX locks on its
    file. One that is closed and opened anew meanwhile may be counted as another.
    """
    counts: dict[int, int] = {}
    for entry in os.scandir(_DESCRIPTORS):
        try:
            kind, _, inode = str(Path(entry.path).readlink()).partition(":")
        except OSError:  # closed meanwhile
            continue
        if kind != "socket":
            continue
        info = _tcp_info(int(entry.name))
        if len(info) == _TCP_INFO_BYTES:
            counts[int(inode.strip("[]"))] = struct.unpack_from("=Q", info, _BYTES_RECEIVED_AT)[0]
    return counts


def _tcp_info(descriptor: int) -> bytes:
    """The kernel's tcp_info as far as it has it; empty for what is no TCP socket.

    By getsockopt itself: a `socket.socket` of a foreign descriptor makes it non-blocking, for its owner too, when
    somebody has called `socket.setdefaulttimeout`.
    """
    info, size = ctypes.create_string_buffer(_TCP_INFO_BYTES), ctypes.c_uint32(_TCP_INFO_BYTES)
    refused = _libc.getsockopt(descriptor, socket.IPPROTO_TCP, socket.TCP_INFO, ctypes.byref(info), ctypes.byref(size))
    return b"" if refused else info.raw[: size.value]


class TcpByteCounter:
    """Bytes received since `reset` by connections made after this object, whoever made them: it may count too many."""

    def __init__(self) -> None:
        self._others = tcp_received().keys()
        self._before: Mapping[int, int] = {}

    def reset(self) -> None:
        """Counts from now on."""
        self._before = tcp_received()

    def bytes(self) -> int:
        """Bytes since `reset`; those of connections that are closed by now are not counted."""
        now = tcp_received()
        return sum(count - self._before.get(inode, 0) for inode, count in now.items() if inode not in self._others)
