"""Three engines behind shaped links that answer all the while: one version, another one, and the first again.

What an answer has to be is said by vLLM's default loader, in an engine of its own with the same files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from mxbench.demo import far_storage
from mxbench.demo.workers import PROMPTS, Worker
from mxbench.update.clients import Client, asking, roll_out, tokens_of
from mxbench.update.fleet import OPTIONS, Fleet, started

ENGINES = 3
LAYERS = 23  # 537 MiB
MEGABITS = 320.0
CLIENTS = 1  # of each engine: of requests in one batch the answers depend on each other's sums
TOKENS = 12
ANSWERS = 200  # of each update, those before and after it included
LIMIT_SECONDS = 300.0

Answers = dict[str, list[int]]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if reason := far_storage.why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        yield started(stack, tmp_path_factory.mktemp("fleet"), ENGINES, LAYERS, MEGABITS)


def by_default_loader(version: Path, folder: Path) -> Answers:
    worker = Worker(f"default-{version.name}", version, folder, load_format="auto", pooling=False, options=OPTIONS)
    try:
        worker.start()
        return {prompt: tokens_of(f"http://{worker.host}:{worker.port}", prompt, TOKENS) for prompt in PROMPTS}
    finally:
        worker.child.stop()


def wait_for(clients: Sequence[Client], count: int) -> None:
    """Until they have so many answers in all, and each one two more than now. Failures are answers here."""
    had = [len(client.answers) for client in clients]
    deadline = time.monotonic() + LIMIT_SECONDS
    while sum(len(client.answers) + len(client.failures) for client in clients) < count or any(
        len(client.answers) + len(client.failures) < before + 2 for client, before in zip(clients, had, strict=True)
    ):
        assert time.monotonic() < deadline, [len(client.answers) for client in clients]
        time.sleep(0.05)


@pytest.mark.timeout(1500)
def test_every_answer_is_of_the_one_version_or_of_the_other(fleet: Fleet, tmp_path: Path) -> None:
    first, second = fleet.versions[:2]
    known = {version: by_default_loader(version, tmp_path) for version in (first, second)}
    assert all(known[first][prompt] != known[second][prompt] for prompt in PROMPTS)
    assert fleet.model_bytes * 8 / (MEGABITS * 1e6) >= 5, "seconds that a transfer takes at least"

    for before, after in ((first, second), (second, first)):
        with asking(fleet.urls, CLIENTS, gap_seconds=0.02, tokens=TOKENS) as clients:
            wait_for(clients, ANSWERS // 4)
            at_store = fleet.bytes_from_store()
            told = roll_out(fleet.urls, f"s3://models/{after.name}")
            read = fleet.bytes_from_store() - at_store
            done = [len(client.answers) for client in clients]
            wait_for(clients, ANSWERS)

        assert [engine["outcome"] for engine in told["engines"]] == ["updated"] * ENGINES
        assert read < 1.1 * fleet.model_bytes, "the first reads the store, the others take the weights from it"
        assert [failure for client in clients for failure in client.failures] == []
        assert sum(len(client.answers) for client in clients) >= ANSWERS
        for client, at_end in zip(clients, done, strict=True):
            of = [before if known[before][prompt] == tokens else after for prompt, tokens in client.answers]
            wrong = [
                (prompt, tokens)
                for (prompt, tokens), version in zip(client.answers, of, strict=True)
                if known[version][prompt] != tokens
            ]
            assert wrong == []
            assert of[0] == before
            assert of == sorted(of, key=[before, after].index), "none of the old version after one of the new"
            assert set(of[at_end:]) == {after}
