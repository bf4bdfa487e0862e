"""A fork that may limit itself: less memory to pin, fewer descriptors, system calls that are refused."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Callable

import pytest

IO_URING_SETUP, IO_URING_ENTER, IO_URING_REGISTER = 425, 426, 427  # the same on every architecture


def in_child(work: Callable[[], None]) -> None:
    """Runs it in a fork, which may limit itself; fails with what that raised, or says nothing for two minutes.

    Skipped under sanitizers: a fork of them has been seen to wait for ever for a lock that no thread of it holds.
    """
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("forks of a process under AddressSanitizer may hang")
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(120)
        try:
            work()
            os.write(theirs, b"done")
        except BaseException as error:  # noqa: BLE001 - the parent fails with it
            os.write(theirs, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    said = os.read(ours, 65536)
    os.close(ours)
    assert said == b"done", said.decode()


def refuse(system_call: int, number: int) -> None:
    """From now on this process' system call fails with that errno, as under a container's seccomp profile."""
    load_number, jump_if_equal, answer = 0x20, 0x15, 0x06
    fail, allow = 0x00050000 | number, 0x7FFF0000
    program = b"".join(
        struct.pack("<HBBI", *line)
        for line in (
            (load_number, 0, 0, 0),
            (jump_if_equal, 0, 1, system_call),
            (answer, 0, 0, fail),
            (answer, 0, 0, allow),
        )
    )
    lines = ctypes.create_string_buffer(program)
    described = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(lines)))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_filter, filter_mode = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_filter, filter_mode, described, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")
