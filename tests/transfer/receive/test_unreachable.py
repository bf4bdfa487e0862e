"""RDMA that stalls on this host: a READ that does not complete, then a real holder that sends over TCP.

There is no RDMA here, hence what stands for it: each side is told of a port, the agent that READs is one over TCP, and
`run` copies as many chunks as a test says and then ends as it does after a stall. All else is real. The same over
verbs, with a cut wire: tests/rdma.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from mxcore.errors import TransferError, TransferStalled
from mxcore.transfer.layout import build_layout
from mxcore.transfer.member import Membership
from mxcore.transfer.move import AgentSession, Move, Source
from mxcore.transfer.route import Operation, UcxPolicy
from mxcore.transfer.route import routes as transports
from tests.transfer.memory import HostTensors, identity, model_specs
from tests.transfer.test_exchange import CHUNK_BYTES, SEED, Target, settings

Fabric = Callable[[int], None]


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> Fabric:
    """Lets so many READs of this process arrive; the one after them stalls."""
    left = 0
    run = AgentSession.run

    def running(
        session: AgentSession, operation: Operation, moves: Iterable[Move], peer: str, **options: Any
    ) -> Iterator[int]:
        nonlocal left
        if operation != "read":
            yield from run(session, operation, moves, peer, **options)
            return
        for move in moves:
            if not left:
                raise TransferStalled(f"read with {peer}: chunks [{move.chunk}] made no progress")
            left -= 1
            for local, remote, length in zip(move.local_addresses, move.remote_addresses, move.lengths, strict=True):
                ctypes.memmove(local, remote, length)  # the holder is in this process
            yield move.chunk

    def arriving(count: int) -> None:
        nonlocal left
        left = count

    monkeypatch.setenv("UCX_TLS", "^cma,posix,sysv")  # without what would be faster here
    monkeypatch.setattr(transports, "usable_ports", lambda: ["mlx5_0:1"])
    monkeypatch.setattr(UcxPolicy, "one_sided", lambda *_, **__: "tcp,self")
    monkeypatch.setattr(AgentSession, "run", running)
    return arriving


@pytest.fixture
def holder() -> Iterator[Callable[[], Source]]:
    """Starts one in this process."""
    members: list[Membership] = []

    def start() -> Source:
        weights = HostTensors(model_specs(), SEED)
        layout, placement = build_layout("raw", weights.local_tensors())
        member = Membership(settings("auto", MX_WORKER_GRPC_PORT=0), identity(), 0, "cpu", chunk_bytes=CHUNK_BYTES)
        members.append(member)
        member.serve(layout, placement, {}, keep_alive=weights)
        return Source(member.source_id, member.worker_id, 0, member.endpoint or "")

    yield start
    for member in members:
        member.close()


def test_a_holder_whose_first_read_stalls_sends(
    fabric: Fabric, holder: Callable[[], Source], caplog: pytest.LogCaptureFixture
) -> None:
    source = holder()
    fabric(0)
    target = Target("auto")
    report = target.receive(source)
    assert target.is_right()
    assert (report.operation, report.transport, report.failures) == ("send", "tcp", ())
    [said] = [record.message for record in caplog.records if "it sends over TCP instead" in record.message]
    assert "made no progress" in said


def test_reads_that_stall_later_are_the_holders_fault(
    fabric: Fabric, holder: Callable[[], Source], caplog: pytest.LogCaptureFixture
) -> None:
    source = holder()
    fabric(1)
    with pytest.raises(TransferError, match="made no progress"):
        Target("auto").receive(source)
    assert " instead" not in caplog.text


def test_in_rdma_mode_nobody_writes_over_tcp(
    fabric: Fabric, holder: Callable[[], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = holder()
    fabric(0)
    monkeypatch.setattr(UcxPolicy, "rdma_only", property(lambda self: self.transport == "rdma"))
    with pytest.raises(TransferStalled, match="made no progress"):
        Target("rdma").receive(source)
