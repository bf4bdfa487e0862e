"""Memory of large messages goes back to the system at once, where the C library is glibc.

It would keep it for later, in pieces: after messages of 100 MiB, a process of 70 MiB had 400.
"""

from __future__ import annotations

import ctypes

LARGE_BYTES = 8 * 1024 * 1024

_M_MMAP_THRESHOLD = -3  # malloc.h
_MAPPED_FROM_BYTES = 64 * 1024

_LIBC = ctypes.CDLL(None)


def give_large_parts_back() -> None:
    """What is freed from 64 KiB on goes back at once, from now on, in the whole process."""
    if hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)


def give_back() -> None:
    """Gives back what was freed until now. Takes milliseconds."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
