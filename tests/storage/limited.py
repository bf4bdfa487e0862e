"""A process of its own that limits itself: less memory to pin, fewer descriptors, system calls that are refused."""

from __future__ import annotations

import ctypes
import multiprocessing
import struct
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

IO_URING_SETUP, IO_URING_ENTER, IO_URING_REGISTER = 425, 426, 427  # the same on every architecture
_CHILD_SECONDS = 300.0
_SPAWN = multiprocessing.get_context("spawn")  # a fork has this process' locks, and none of its threads


def in_child(work: Callable[..., None], *arguments: Any) -> None:
    """Runs a module's function in a new process, which may limit itself; fails with what that raised."""
    ours, theirs = _SPAWN.Pipe(duplex=False)
    child = _SPAWN.Process(target=_told, args=(theirs, work, arguments))
    child.start()
    theirs.close()
    try:
        said = ours.recv() if ours.poll(_CHILD_SECONDS) else f"no answer within {_CHILD_SECONDS:g} s"
    except EOFError:
        said = "it ended without a word"
    finally:
        ours.close()
        child.join(10)
        child.kill()
        child.join()
    assert said == "done", f"{said} (exit code {child.exitcode})"


def _told(answers: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        work(*arguments)
    except BaseException as error:  # noqa: BLE001 - the parent fails with it
        answers.send(f"{type(error).__name__}: {error}")
    else:
        answers.send("done")


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
