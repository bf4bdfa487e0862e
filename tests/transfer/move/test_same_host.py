"""How many threads read within a host, and what a receiver does about a read that does not end."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mxcore.errors import PeerLost, TransferStalled
from mxcore.process import AttachedReads
from mxcore.transfer.layout import Chunks, Layout
from mxcore.transfer.move import SameHostMover, threads_of
from mxcore.transfer.move import same_host as attached_pull
from tests.transfer.conftest import StartWorker
from tests.transfer.test_exchange import SEED, Target

_libc = ctypes.CDLL(None, use_errno=True)
_USERFAULTFD = {"x86_64": 323, "aarch64": 282}[platform.machine()]  # the system call
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00  # linux/userfaultfd.h


@pytest.mark.parametrize(
    ("cores", "unhashed", "hashed"),
    [
        (1, 1, 1),
        (2, 2, 2),  # no core is free
        (4, 4, 4),
        (5, 4, 5),
        (64, 4, 5),
    ],
)
def test_how_many_threads(cores: int, unhashed: int, hashed: int) -> None:
    assert threads_of(cores, hashed=False) == unhashed
    assert threads_of(cores, hashed=True) == hashed


@pytest.mark.parametrize("cores", [1, 3])
def test_a_receiver_reads_by_as_many_threads_as_cores_are_allowed(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    opened = []

    class Noted(AttachedReads):
        def __init__(self, pid: int, *, threads: int, hashed: bool) -> None:
            super().__init__(pid, threads=threads, hashed=hashed)
            opened.append((threads, hashed))

    monkeypatch.setattr(attached_pull, "AttachedReads", Noted)
    monkeypatch.setattr("mxcore.transfer.move.same_host.os.sched_getaffinity", lambda _: set(range(cores)))
    target = Target("same-host")
    target.receive(start_worker("same-host", seed=SEED).serve())
    assert target.is_right()
    assert opened == [(cores, True)]


class StuckMemory:
    """Memory of this process that its readers wait for, as for a page that its owner's kernel does not bring."""

    BYTES = 16 * mmap.PAGESIZE

    def __init__(self) -> None:
        self._faults = _libc.syscall(_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        if self._faults < 0:
            pytest.skip("userfaultfd is not allowed here (it wants CAP_SYS_PTRACE)")
        self._memory = mmap.mmap(-1, self.BYTES)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        fcntl.ioctl(self._faults, _UFFDIO_API, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
        fcntl.ioctl(self._faults, _UFFDIO_REGISTER, bytearray(struct.pack("QQQQ", self.address, self.BYTES, 1, 0)))

    def let_go(self) -> None:
        os.close(self._faults)


@contextmanager
def stuck(stall_seconds: float) -> Iterator[SameHostMover]:
    """A mover whose read of chunk 0 does not end before the block does."""
    there, here = StuckMemory(), ctypes.create_string_buffer(StuckMemory.BYTES)
    chunks = Chunks(Layout("raw", (), (StuckMemory.BYTES,)))
    local, remote = (chunks.addresses([address]) for address in (ctypes.addressof(here), there.address))
    with SameHostMover(
        "w7", os.getpid(), chunks, local, remote, hashed=True, stall_timeout_seconds=stall_seconds
    ) as mover:
        mover.ask([0])
        try:
            yield mover
        finally:
            there.let_go()


def test_a_read_that_does_not_end_can_be_given_up_on() -> None:
    with stuck(3600.0) as mover:
        mover.wake()
        assert list(mover.arrived()) == []
        assert not mover.idle
        other = threading.Thread(target=mover.interrupt, args=(PeerLost("given up on"),))
        other.start()
        with pytest.raises(PeerLost, match="given up on"):
            list(mover.arrived())
        other.join()


def test_a_read_that_does_not_end_is_a_stall() -> None:
    said = r"the memory of worker w7 brought none of chunks \[0\] for 0\.\d s"
    with stuck(0.05) as mover, pytest.raises(TransferStalled, match=said):
        list(mover.arrived())
