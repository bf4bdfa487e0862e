"""The fence when what it needs fails."""

from __future__ import annotations

import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from mxcore.errors import CudaError, FenceFailed, NixlError
from mxcore.process import AttachedReads
from mxcore.transfer.layout import Chunks, build_layout
from mxcore.transfer.move import AgentSession, SameHostMover, same_host
from mxcore.transfer.receive import holder_pull
from mxcore.transfer.receive.holder_pull import HolderPull
from tests.transfer.fleet_member import SEED, NewMember
from tests.transfer.memory import HostTensors, model_specs


def test_a_device_that_fails_does_not_keep_the_agent_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise CudaError("cuCtxSynchronize failed with CUDA_ERROR_ILLEGAL_ADDRESS", status=700)

    session = AgentSession("fence", tls="tcp,self", progress_thread=False)
    monkeypatch.setattr(session, "_device", SimpleNamespace(context=SimpleNamespace(synchronize=fails)))
    for _ in range(2):  # asked again, it is no better
        with pytest.raises(FenceFailed, match="ILLEGAL_ADDRESS"):
            session.fence()
    assert session._agent.destroyed
    assert not session.fenced


def test_an_agent_that_is_not_destroyed_is_no_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise FenceFailed("destroying NIXL agent gave status -1")

    session = AgentSession("fence", tls="tcp,self", progress_thread=False)
    real = session._agent
    monkeypatch.setattr(session, "_agent", SimpleNamespace(destroy=fails, destroyed=True, name="fence"))
    with pytest.raises(FenceFailed, match="status -1"):
        session.fence()
    assert not session.fenced
    real.destroy()


def test_an_agent_that_never_ends_is_waited_for_in_vain_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    session = AgentSession("fence", tls="tcp,self", progress_thread=False, fence_timeout_seconds=0.05)
    real = session._agent
    stuck = SimpleNamespace(destroy=go_on.wait, destroyed=False, name="fence")
    monkeypatch.setattr(session, "_agent", stuck)
    with pytest.raises(FenceFailed, match=r"not destroyed within 0\.05 s"):
        session.fence()
    assert not session.fenced
    go_on.set()
    real.destroy()


def test_progress_that_never_ends_is_left_and_the_next_one_may_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    session = AgentSession("fence", tls="tcp,self", progress_thread=False, fence_timeout_seconds=0.05)
    real = session._agent
    stuck = SimpleNamespace(stop_progressing=lambda *_: None, keep_progressing=lambda _: go_on.wait(), name="fence")
    monkeypatch.setattr(session, "_agent", stuck)
    for _ in range(2):
        with session.progressing():
            pass
    assert session._progress is None
    go_on.set()
    real.destroy()


@pytest.mark.parametrize("when", ["of one of two", "of both"])
def test_a_receive_whose_fence_fails_gives_its_memory_up(
    new_member: NewMember, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Though every chunk is there and right: what was abandoned may still write."""
    sources = [new_member(SEED, MX_TCP_TRANSFER="nixl").serve() for _ in range(2)]
    target = new_member(MX_TCP_TRANSFER="nixl")
    fence = AgentSession.fence
    failed: list[str] = []

    def fails(session: AgentSession) -> None:
        fence(session)
        mine = target.membership.worker_id in session.name
        if mine and (when == "of both" or not failed):
            failed.append(session.name)
            raise FenceFailed("as if NIXL had not destroyed it")

    monkeypatch.setattr(AgentSession, "fence", fails)
    with pytest.raises(FenceFailed):
        target.receive(sources)
    assert failed


def test_a_holder_whose_calls_never_return_ends_the_receive(
    new_member: NewMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, stuck = threading.Event(), threading.Event()

    def never(pull: HolderPull, *arguments: object) -> None:
        stuck.set()
        go_on.wait()
        raise NixlError("it came back after all")

    monkeypatch.setattr(HolderPull, "_transfer", never)
    monkeypatch.setattr("mxcore.transfer.receive.receiver.END_SECONDS", 0.05)
    assert holder_pull.END_SECONDS > 60  # longer than a fence may take
    source, target = new_member(SEED).serve(), new_member(MX_TRANSFER_TIMEOUT=0.5)
    with pytest.raises(FenceFailed, match="does not end"):
        target.receive([source])
    assert stuck.is_set()
    go_on.set()


def test_a_read_that_does_not_return_keeps_what_it_writes_to() -> None:
    """A read of a gigabyte is one that does not return for a while."""
    there, here = np.ones(1 << 29, np.uint8), np.zeros(1 << 29, np.uint8)
    reads = AttachedReads(os.getpid(), threads=1, hashed=True)
    held = sys.getrefcount(reads)
    while True:
        reads.ask(1, [here.ctypes.data], [there.ctypes.data], [there.nbytes])
        if not reads.close(0.0):
            break
        reads = AttachedReads(os.getpid(), threads=1, hashed=True)  # the thread had not begun
    assert sys.getrefcount(reads) == held + 1  # its thread uses it, whoever else lets go of it
    with pytest.raises(ValueError, match="closed"):
        reads.ask(2, [here.ctypes.data], [there.ctypes.data], [1])
    assert reads.close()
    assert reads.close(0.0)
    assert sys.getrefcount(reads) == held


def test_a_mover_within_the_host_says_when_it_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = HostTensors(model_specs(1), SEED)
    layout, placement = build_layout("raw", tensors.local_tensors())
    chunks = Chunks(layout, 65536)
    local = chunks.local_addresses(placement)
    mover = SameHostMover("w", os.getpid(), chunks, local, local, hashed=True, stall_timeout_seconds=5)
    monkeypatch.setattr(same_host, "_CLOSE_SECONDS", 0.0)
    reads = mover._reads
    monkeypatch.setattr(mover, "_reads", SimpleNamespace(close=lambda seconds: False))
    with pytest.raises(FenceFailed, match="has not ended after 0 s"):
        mover.close()
    assert reads.close()
