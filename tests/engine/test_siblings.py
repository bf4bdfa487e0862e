"""Processes of one engine climb the ladder together: real processes, a real gloo group, collectives in processing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is the engine's")

from mxcore import agreement  # noqa: E402
from mxcore.agreement import LEAST_STALL_SECONDS, MESSAGE_BYTES, Agreement  # noqa: E402
from mxcore.engine.context import LoadContext  # noqa: E402
from mxcore.engine.protocol import Source  # noqa: E402
from mxcore.engine.report import Fallbacks  # noqa: E402
from mxcore.engine.rungs.missing_chunks import fill_missing  # noqa: E402
from mxcore.errors import TransferStalled  # noqa: E402
from mxcore.settings import WorkerSettings  # noqa: E402
from mxcore.storage.plan import Progress  # noqa: E402
from mxcore.transfer.receive import receiver  # noqa: E402
from tests.engine.plain_engine import LAYERS, SIZE, Layer, PlainEngine, write_checkpoint  # noqa: E402
from tests.engine.plain_worker import ROLES  # noqa: E402
from tests.transfer.conftest import wait_for  # noqa: E402

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def pair(folder: Path, server: str, name: str, **more: Any) -> Iterator[list[dict[str, Any]]]:
    """Two processes of one engine that have loaded, and serve within the block; what each says."""
    processes = []
    store = folder.parent / f"store-{name}"
    for rank in range(2):
        command = {"folder": str(folder), "server": server, "rank": rank, "store": str(store), **more}
        command["report"] = str(folder.parent / f"{name}-{rank}.json")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.engine.parallel_engine", json.dumps(command)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )

    def end() -> None:
        for process in processes:
            process.kill()

    watchdog = threading.Timer(300, end)
    watchdog.start()
    try:
        yield [json.loads(process.stdout.readline() or "{}") for process in processes if process.stdout]
    finally:
        watchdog.cancel()
        for process in processes:
            process.kill()
            process.communicate()


def steps(said: dict[str, Any]) -> list[tuple[str, str]]:
    return [(step["rung"], step["outcome"]) for step in said["report"]["paths"]]


@pytest.mark.parametrize("processed", [False, True])
def test_a_transfer_that_fails_at_one_fails_at_all(server: str, tmp_path: Path, processed: bool) -> None:
    """Processing has collectives: whoever went on alone would wait in them for ever."""
    folder = write_checkpoint(tmp_path / "model")
    with pair(folder, server, "source", processed=processed, bad=1) as source:
        assert [said["report"]["serving"] for said in source] == [True, True]
        with pair(folder, server, "target", processed=processed) as target:
            assert [said.get("answer") for said in target] == [said["answer"] for said in source]
    assert [said["report"]["path"] for said in target] == ["storage", "storage"]
    first, second = target
    assert steps(first) == steps(second)
    assert ("p2p", "failed") in steps(first)
    assert "process 1: " in next(step["reason"] for step in first["report"]["paths"] if step["outcome"] == "failed")


def test_who_still_receives_hears_that_another_one_failed(server: str, tmp_path: Path) -> None:
    """The source of rank 0 gives its manifest and then nothing more, and rank 0 has hours of patience with that."""
    folder = write_checkpoint(tmp_path / "model")
    with (
        pair(folder, server, "source", bad=1, mute=0),
        pair(folder, server, "target", options={"stall_timeout_seconds": 3600}) as target,
    ):
        assert [said["report"]["path"] for said in target] == ["storage", "storage"]
    first, second = target
    assert steps(first) == steps(second)
    assert ("p2p", "failed") in steps(first)
    assert "process 1: " in next(step["reason"] for step in first["report"]["paths"] if step["outcome"] == "failed")


def test_one_bad_rank_costs_all_of_them_less_than_a_minute() -> None:
    """By the default settings, from its last good chunk until none is at work any more; what engines do themselves, and
    a device that does not end its transfers, aside."""
    stall_seconds = WorkerSettings().stall_timeout_seconds
    it_has_failed = receiver._PATIENCE_STALLS * stall_seconds + receiver._POLL_SECONDS
    all_have_heard = agreement._LONGEST_PAUSE_SECONDS + max(LEAST_STALL_SECONDS, stall_seconds)
    others_have_ended = receiver._POLL_SECONDS + stall_seconds  # calls under way are cancelled, and end by then anyhow
    assert it_has_failed + all_have_heard + others_have_ended < 60


def test_all_take_from_workers_together(server: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    with (
        pair(folder, server, "source", processed=True) as source,
        pair(folder, server, "target", processed=True) as told,
    ):
        assert [said["report"]["path"] for said in told] == ["p2p", "p2p"]
        assert [said["report"]["fallbacks"] for said in told] == [[], []]
        assert [said["answer"] for said in told] == [said["answer"] for said in source]


def test_no_rank_waits_for_a_source_when_another_reads_storage(server: str, tmp_path: Path) -> None:
    """Rank 1 finds one, rank 0 does not: both read."""
    folder = write_checkpoint(tmp_path / "model")
    with (
        pair(folder, server, "source", processed=True, silent=0),
        pair(folder, server, "target", processed=True) as target,
    ):
        assert [said["report"]["path"] for said in target] == ["storage", "storage"]
        assert steps(target[0]) == steps(target[1])


class Group:
    """Threads that gather, as processes do."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.messages = [b""] * size

    def of(self, rank: int) -> Any:
        def gather(message: bytes, timeout_seconds: float) -> list[bytes]:
            assert len(message) == MESSAGE_BYTES
            self.messages[rank] = message
            try:
                self.barrier.wait(timeout_seconds)
                messages = list(self.messages)
                self.barrier.wait(timeout_seconds)
            except threading.BrokenBarrierError as error:
                raise RuntimeError("somebody is away") from error
            return messages

        return gather


def test_steps_are_matched_by_their_order() -> None:
    """Whoever fails goes on at once; the other hears of each failure at the step that it was of."""
    group = Group(2)
    fast, slow = Agreement(group.of(0)), Agreement(group.of(1))
    assert fast.agree("first") == "process 0: first"
    assert fast.agree("second \n") == "process 0: second  "
    assert slow.is_given_up()
    assert slow.agree() == "process 0: first"
    assert slow.agree() == "process 0: second  "
    assert not slow.is_given_up()
    third = threading.Thread(target=fast.agree)
    third.start()
    assert slow.agree() == ""
    third.join()
    for each in (fast, slow):
        each.leave()
    for each in (fast, slow):
        each.close()


def test_who_does_not_answer_has_failed() -> None:
    group = Group(2)
    alone = Agreement()
    assert (alone.agree(), alone.agree("trouble"), alone.is_given_up()) == ("", "trouble", False)
    left = Agreement(group.of(0))
    group.barrier.abort()
    assert "does not answer: somebody is away" in left.agree()
    assert "does not answer" in left.agree()
    left.close()
    assert left.agree() == ""
    assert left.agree("its own trouble") == "its own trouble"


def test_who_raised_is_not_waited_for() -> None:
    group = Group(2)
    stays, goes = Agreement(group.of(0)), Agreement(group.of(1))
    goes.leave()
    assert stays.agree() == "process 1 of this engine has ended its load"
    for each in (stays, goes):
        each.leave()


class Interrupted(PlainEngine):
    """Another process of it fails when this one has filled its first tensor, and this one hears of that at once."""

    sibling: Agreement | None = None
    told = 0

    def fill(self, model: torch.nn.Module, source: Source, settings: WorkerSettings, progress: Progress) -> int:
        def tell(done_bytes: int, total_bytes: int) -> None:
            self.told += 1
            if self.sibling is not None:
                self.sibling.agree("its memory is bad")
                wait_for(self.agreement.is_given_up)
            progress(done_bytes, total_bytes)

        return super().fill(model, source, settings, tell)

    def __init__(self, folder: Path, agreement: Agreement) -> None:
        super().__init__(folder, {})
        self.agreement = agreement


def rest_read_by(engine: Interrupted) -> tuple[int, torch.nn.Module]:
    """`fill_missing` of a model of which nothing came; bytes read, and the model."""
    model = torch.nn.Sequential(*(Layer(SIZE) for _ in range(LAYERS)))
    stretches = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in model.parameters())
    size_bytes = sum(part.nbytes for part in model.parameters())
    partial: Any = SimpleNamespace(
        missing_bytes=size_bytes, total_bytes=size_bytes, missing_stretches=lambda: stretches, complete=lambda: None
    )
    for part in model.parameters():
        part.zero_()
    with ExitStack() as at_end:
        context = LoadContext(engine, ROLES["both"], WorkerSettings(), Fallbacks(), at_end, agreement=engine.agreement)
        try:
            return fill_missing(partial, model, context), model
        except TransferStalled:
            return -1, model


def test_what_is_missing_is_read_until_another_process_has_failed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    read_bytes, model = rest_read_by(alone := Interrupted(folder, Agreement()))
    assert (read_bytes, alone.told) == (LAYERS * SIZE * SIZE * 4, LAYERS)
    assert all(part.any() for part in model.parameters())

    group = Group(2)
    ours, theirs = Agreement(group.of(0)), Agreement(group.of(1))
    interrupted = Interrupted(folder, ours)
    interrupted.sibling = theirs
    read_bytes, model = rest_read_by(interrupted)
    for each in (ours, theirs):
        each.leave()
    for each in (ours, theirs):
        each.close()
    assert (read_bytes, interrupted.told) == (-1, 1)
    assert [bool(part.any()) for part in model.parameters()] == [True, False, False]
