"""How many threads read within a host, and that a receiver takes the number that it was told."""

from __future__ import annotations

import pytest

from mxcore.attached_memory import AttachedReads
from mxcore.transfer import attached_pull
from mxcore.transfer.attached_pull import threads_of
from tests.transfer.conftest import StartWorker
from tests.transfer.test_exchange import SEED, Target


@pytest.mark.parametrize(
    ("cores", "copying", "unhashed", "hashed"),
    [
        (1, 0, (1, 1), (1, 1)),
        (2, 0, (2, 2), (2, 2)),  # no core is free: both copy and hash
        (4, 0, (4, 4), (4, 4)),
        (5, 0, (4, 4), (4, 5)),
        (64, 0, (4, 4), (4, 5)),
        (2, 1, (1, 1), (1, 2)),
        (8, 6, (6, 6), (6, 7)),
        (2, 6, (6, 6), (6, 6)),  # as it was told
    ],
)
def test_how_many_threads(cores: int, copying: int, unhashed: tuple[int, int], hashed: tuple[int, int]) -> None:
    assert threads_of(cores, copying, hashed=False) == unhashed
    assert threads_of(cores, copying, hashed=True) == hashed


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_receiver_copies_by_as_many_threads_as_it_was_told(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    opened = []

    class Noted(AttachedReads):
        def __init__(self, pid: int, *, threads: int, copying: int, hashed: bool) -> None:
            super().__init__(pid, threads=threads, copying=copying, hashed=hashed)
            opened.append((copying, threads, hashed))

    monkeypatch.setattr(attached_pull, "AttachedReads", Noted)
    monkeypatch.setattr("mxcore.transfer.attached_pull.os.sched_getaffinity", lambda _: {0, 1, 2})
    target = Target("same-host", MX_SAME_HOST_THREADS=threads)
    target.receive(start_worker("same-host", seed=SEED).serve())
    assert target.is_right()
    assert opened == [{0: (3, 3, True), 1: (1, 2, True), 3: (3, 3, True)}[threads]]
