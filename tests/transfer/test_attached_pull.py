"""How many threads read within a host, and that a receiver takes the number that it was told."""

from __future__ import annotations

import pytest

from mxcore.process.attached_memory import AttachedReads
from mxcore.transfer.move import same_host as attached_pull
from mxcore.transfer.move.same_host import threads_of
from tests.transfer.conftest import StartWorker
from tests.transfer.test_exchange import SEED, Target


@pytest.mark.parametrize(
    ("cores", "asked_for", "unhashed", "hashed"),
    [
        (1, 0, 1, 1),
        (2, 0, 2, 2),  # no core is free
        (4, 0, 4, 4),
        (5, 0, 4, 5),
        (64, 0, 4, 5),
        (2, 1, 1, 2),
        (8, 6, 6, 7),
        (2, 6, 6, 6),  # as it was told
    ],
)
def test_how_many_threads(cores: int, asked_for: int, unhashed: int, hashed: int) -> None:
    assert threads_of(cores, asked_for, hashed=False) == unhashed
    assert threads_of(cores, asked_for, hashed=True) == hashed


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_receiver_reads_by_as_many_threads_as_it_was_told(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    opened = []

    class Noted(AttachedReads):
        def __init__(self, pid: int, *, threads: int, hashed: bool) -> None:
            super().__init__(pid, threads=threads, hashed=hashed)
            opened.append((threads, hashed))

    monkeypatch.setattr(attached_pull, "AttachedReads", Noted)
    monkeypatch.setattr("mxcore.transfer.move.same_host.os.sched_getaffinity", lambda _: {0, 1, 2})
    target = Target("same-host", MX_SAME_HOST_THREADS=threads)
    target.receive(start_worker("same-host", seed=SEED).serve())
    assert target.is_right()
    assert opened == [({0: 3, 1: 2, 3: 3}[threads], True)]
