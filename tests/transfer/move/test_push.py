"""The receiver's side of WRITEs, with a holder whose answers are made up here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mxcore.errors import PeerLost, SourceRefused, TransferStalled
from mxcore.nixl import Mailbox
from mxcore.transfer.move import NixlWriteMover
from mxcore.transfer.move.movers import Arrived
from mxserver.wire.proto import mx_pb2
from tests.transfer.conftest import wait_for

PATIENT_SECONDS = 3600.0


class Call:
    """A call's answers, once they are let go; those of `answers` that raise, raise."""

    def __init__(self, answers: list[mx_pb2.ChunkResult]) -> None:
        self.answers = answers
        self.go = threading.Event()
        self.cancelled = False

    def __iter__(self) -> Iterator[mx_pb2.ChunkResult]:
        assert self.go.wait(60)
        yield from self.answers

    def cancel(self) -> None:
        self.cancelled = True
        self.go.set()


class Holder:
    """What NixlWriteMover needs of a client: begins calls, and keeps them."""

    def __init__(self) -> None:
        self.source = SimpleNamespace(worker_id="holder")
        self.calls: list[Call] = []
        self.asked: list[list[int]] = []
        self.notify: list[bool] = []
        self.answers: list[list[mx_pb2.ChunkResult]] = []

    def push_chunks(self, lease_id: str, chunks: list[int], seconds: float, *, notify: bool) -> Call:
        assert lease_id == "lease"
        self.asked.append(list(chunks))
        self.notify.append(notify)
        answers = self.answers.pop(0) if self.answers else [mx_pb2.ChunkResult(chunk=c, written=True) for c in chunks]
        self.calls.append(Call(answers))
        return self.calls[-1]


def pulling(holder: Holder, stall_seconds: float = PATIENT_SECONDS, *, threaded: bool = False) -> NixlWriteMover:
    session: Any = SimpleNamespace(mailbox=Mailbox(), has_progress_thread=threaded)
    return NixlWriteMover(holder, "lease", session, stall_timeout_seconds=stall_seconds)  # type: ignore[arg-type]


def everything(mover: NixlWriteMover) -> list[int]:
    found: list[int] = []
    wait_for(lambda: found.extend(chunk for chunk, _ in mover.arrived()) or mover.idle)
    return found


def test_messages_alone_will_do() -> None:
    holder = Holder()
    with pulling(holder, threaded=True) as mover:
        assert mover.idle
        mover.ask([4, 2])
        holder.calls[0].go.set()
        assert everything(mover) == [4, 2]
    assert holder.notify == [False]  # nobody would look at its notifications


def test_a_chunk_is_told_by_its_notification_and_not_again_by_the_message() -> None:
    holder = Holder()
    holder.answers.append([mx_pb2.ChunkResult(chunk=1, others=[2, 3], written=True)])
    with pulling(holder) as mover:
        mover.ask([1, 2, 3])
        assert holder.notify == [True]
        for number in (2, 77, 1, 2):  # nobody asked for 77
            mover._mailbox.put(number)
        assert list(mover.arrived()) == [Arrived(2), Arrived(1)]
        holder.calls[0].go.set()
        assert everything(mover) == [3]
        mover.ask([9])
        holder.calls[1].go.set()
        assert everything(mover) == [9]


def test_two_calls_at_a_time_and_the_rest_when_one_has_ended() -> None:
    holder = Holder()
    with pulling(holder) as mover:
        for chunk in range(4):
            mover.ask([chunk])
        assert holder.asked == [[0], [1]]
        holder.calls[0].go.set()
        found: list[int] = []

        def third_begins() -> bool:
            mover.wake()
            found.extend(chunk for chunk, _ in mover.arrived())
            return len(holder.asked) == 3

        wait_for(third_begins)
        assert holder.asked == [[0], [1], [2, 3]]
        for call in holder.calls:
            call.go.set()
        assert sorted(found + everything(mover)) == [0, 1, 2, 3]


def test_waking_ends_a_wait_without_a_chunk() -> None:
    holder = Holder()
    with pulling(holder) as mover:
        assert list(mover.arrived()) == []  # nothing was asked for
        mover.ask([1])
        mover.wake()
        assert list(mover.arrived()) == []
        assert not mover.idle
    assert holder.calls[0].cancelled


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([], r"ended its answer with chunks \[1, 2\] missing"),
        ([mx_pb2.ChunkResult(chunk=3, written=True)], "chunk 3, which was not asked for"),
        ([mx_pb2.ChunkResult(chunk=1, others=[2, 2], written=True)], "chunk 2, which was not asked for"),
        ([mx_pb2.ChunkResult(chunk=1, error="no memory")], "no memory"),
    ],
)
def test_wrong_answers(answers: list[mx_pb2.ChunkResult], said: str) -> None:
    holder = Holder()
    holder.answers.append(answers)
    with pulling(holder) as mover:
        mover.ask([1, 2])
        holder.calls[0].go.set()
        with pytest.raises(SourceRefused, match=said):
            wait_for(lambda: list(mover.arrived()) and False)


def test_an_interruption_is_raised_and_the_first_one_counts() -> None:
    with pulling(Holder()) as mover:
        mover.ask([1])
        mover.interrupt(PeerLost("first"))
        mover.interrupt(PeerLost("second"))
        with pytest.raises(PeerLost, match="first"):
            list(mover.arrived())


def test_without_news_it_stalls_and_waking_is_no_news() -> None:
    with pulling(Holder(), 0.05) as mover:
        mover.ask([5, 6])

        def woken() -> bool:
            mover.wake()
            return list(mover.arrived()) != []

        with pytest.raises(TransferStalled, match=r"worker holder wrote none of chunks \[5, 6\] for 0\.\d s"):
            wait_for(woken)
