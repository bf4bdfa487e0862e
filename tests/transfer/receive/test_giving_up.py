"""When a receive ends because nothing more can come, and when it does not: real workers, and what the server lists."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from mxcore.errors import ChunksMissing, LayoutMismatch, TransferStalled
from mxcore.transfer.move import Source
from mxcore.transfer.serve import SelfCheck
from mxserver.wire import ServerUnreachable
from tests.transfer.conftest import StartWorker, WorkerProcess, wait_for
from tests.transfer.fleet_member import SEED, NewMember
from tests.transfer.test_exchange import Target

# Whoever waits for news ends with TransferStalled instead of what these tests want, and long after all else.
WAITING = {"MX_STALL_TIMEOUT_SECS": 600, "MX_TRANSFER_TIMEOUT": 120}


def after_failures(count: int, caplog: pytest.LogCaptureFixture) -> None:
    wait_for(lambda: sum("gives no (more) weights" in record.message for record in caplog.records) >= count)


def lie(worker: WorkerProcess) -> Source:
    """A holder one of whose chunks is not what its digest promises."""
    source = worker.serve()
    worker.ask(do="flip", storage="layer3", offset=123_456)
    return source


@pytest.fixture
def lying(start_worker: StartWorker) -> Callable[[], Source]:
    return lambda: lie(start_worker("tcp", seed=SEED, without_self_check=True))


def test_a_wrong_digest_of_the_only_holder_is_not_waited_out(
    new_member: NewMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SelfCheck, "start", lambda check: None)  # else the liar may be the first to notice
    liar, target = new_member(SEED), new_member(**WAITING)
    source = liar.serve()
    liar.tensors.storages["layer3"][123_456] ^= 1
    target.membership.join()
    with pytest.raises(ChunksMissing, match="MX_DIGEST_MISMATCH") as raised:
        target.receive([source])  # the server lists it and nobody else
    assert raised.value.partial is not None  # so that storage gives the rest


def test_another_layout_of_the_only_holder_is_not_waited_out(new_member: NewMember, start_worker: StartWorker) -> None:
    other = start_worker("tcp", seed=SEED, prefix="other.")
    target = new_member(**WAITING)
    target.membership.join()
    with pytest.raises(LayoutMismatch):
        target.receive([other.serve()])


def test_all_holders_must_have_failed_for_good(lying: Callable[[], Source], caplog: pytest.LogCaptureFixture) -> None:
    sources = [lying(), lying()]

    def nobody_else() -> list[Source]:
        after_failures(1, caplog)
        return sources

    with pytest.raises(ChunksMissing) as raised:
        Target("tcp", **WAITING).receive(sources[0], find_more=nobody_else)
    assert len(raised.value.failures) == 2  # the second one was asked too


def test_who_is_listed_after_the_failure_is_waited_for(
    start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    lists: list[list[Source]] = [[], [start_worker("tcp", seed=SEED).serve()]]
    liar = start_worker("tcp", seed=SEED)
    source = lie(liar)
    liar.kill(signal.SIGSTOP)

    def listed() -> list[Source]:
        liar.kill(signal.SIGCONT)  # so that it fails while this question is on its way, whose answer is an old one then
        after_failures(1, caplog)
        return lists.pop(0) if len(lists) > 1 else lists[0]

    target = Target("tcp", MX_SERVER_TIMEOUT_SECS=60, **WAITING)
    report = target.receive(source, find_more=listed)
    assert target.is_right()
    assert lists[0][0].worker_id in report.bytes_from


def test_a_server_that_does_not_answer_has_not_said_that_nobody_is_there(
    lying: Callable[[], Source], start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    good = start_worker("tcp", seed=SEED).serve()
    asked = 0

    def listed() -> list[Source]:
        nonlocal asked
        asked += 1
        after_failures(1, caplog)
        if asked < 4:
            raise ServerUnreachable("it restarts")
        return [good]

    target = Target("tcp", **WAITING)
    target.receive(lying(), find_more=listed)
    assert target.is_right()
    assert sum("sources cannot be listed" in record.message for record in caplog.records) == 1  # once, not each time


def test_other_bytes_are_taken_as_soon_as_the_first_cannot_be_completed(
    lying: Callable[[], Source], start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    first, other = lying(), start_worker("tcp", seed=SEED + 1).serve()

    def listed() -> list[Source]:
        after_failures(1, caplog)
        return [first, other]

    target = Target("tcp", **WAITING)
    target.receive(first, find_more=listed)
    assert target.is_right(SEED + 1)


def test_a_holder_that_is_gone_has_not_refused_for_good(
    start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    gone, good = start_worker("tcp", seed=SEED), start_worker("tcp", seed=SEED).serve()
    source = gone.serve()
    lists = [[source], [source], [source]]
    gone.kill()

    def listed() -> list[Source]:
        after_failures(1, caplog)
        return lists.pop(0) if len(lists) > 1 else [good]

    target = Target("tcp", MX_SERVER_TIMEOUT_SECS=60, **WAITING)
    target.receive(source, find_more=listed)
    assert target.is_right()


def test_who_is_told_to_stop_waits_for_no_holder(new_member: NewMember, start_worker: StartWorker) -> None:
    """As where another process of the engine has failed. The holder is stopped, and would be waited for for minutes."""
    silent, target = start_worker("tcp", seed=SEED), new_member(**WAITING)
    source = silent.serve()
    silent.kill(signal.SIGSTOP)
    target.membership.join()
    with pytest.raises(TransferStalled, match="nobody waits for these weights any more"):
        target.membership.receive(target.layout, target.placement, {}, [source], stopped=lambda: True)
