"""Processes that publish and fetch: without torch and NIXL; a publisher that dies, and one that just ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exchange.worker import arrays

ROOT = Path(__file__).parents[2]
SUMS = {name: int(array.sum(dtype=np.uint64)) for name, array in arrays(7).items()}
BYTES = 16 << 20

Worker = subprocess.Popen[str]
Start = Callable[..., Worker]


@pytest.fixture(scope="session")
def numpy_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is installed here but torch, NIXL and what belongs to them."""
    folder = tmp_path_factory.mktemp("site-packages")
    for place in {Path(np.__file__).parents[1]}:
        for path in place.iterdir():
            if not path.name.lower().startswith(("torch", "nixl", "functorch", "vllm", "__editable__", "distutils-")):
                (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def start(at: dict[str, Any], name: str) -> Iterator[Start]:
    """Starts workers; `packages` is the only folder with any."""
    started: list[Worker] = []

    def run(do: str, *, packages: Path | None = None, settings: dict[str, Any] | None = None, **task: Any) -> Worker:
        given = {**at, "settings": {**at["settings"], **(settings or {})}, "do": do, "name": name, "seed": 7, **task}
        command = [sys.executable, "-W", "error", *(["-S"] if packages else [])]
        environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{packages}"} if packages else dict(os.environ)
        started.append(
            subprocess.Popen(
                [*command, "-m", "tests.exchange.worker", json.dumps(given)],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield run
    for worker in started:
        worker.kill()
        worker.wait()
        for stream in (worker.stdin, worker.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def said(worker: Worker) -> dict[str, Any]:
    """Its next line."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    assert line, f"the worker ended with {worker.wait()}"
    answer: dict[str, Any] = json.loads(line)
    return answer


def fetched(worker: Worker) -> dict[str, Any]:
    """What it says once it has everything, or has failed."""
    while "progress" in (answer := said(worker)):
        pass
    return answer


@pytest.mark.parametrize("transport", ["tcp", "same-host"])
def test_host_memory_needs_neither_torch_nor_nixl(start: Start, numpy_only: Path, transport: str) -> None:
    settings = {"MX_TRANSPORT": transport}
    publisher = start("publish", packages=numpy_only, settings=settings)
    worker = said(publisher)["worker"]
    answer = fetched(start("fetch", packages=numpy_only, settings=settings))
    assert answer == {"kind": "numpy", "sums": SUMS, "given": {worker: BYTES}, "heavy": []}


def test_a_publisher_dies_and_another_has_it(start: Start, numpy_only: Path) -> None:
    """The second one is a reader that shares; the third takes the rest from it."""
    first = start("publish", packages=numpy_only, settings={"MX_SOURCE_RATE_LIMIT": 4 << 20})
    dying = said(first)["worker"]
    second = start("publish", packages=numpy_only, settings={"MX_SOURCE_RATE_LIMIT": 16 << 20})
    other = said(second)["worker"]
    reader = start("fetch", packages=numpy_only)
    assert said(reader)["progress"]
    first.send_signal(signal.SIGKILL)
    answer = fetched(reader)
    assert answer["sums"] == SUMS
    assert answer["given"].get(other, 0) + answer["given"].get(dying, 0) == BYTES
    assert answer["given"][other]
    second.send_signal(signal.SIGKILL)
    assert fetched(start("fetch", packages=numpy_only))["sums"] == SUMS  # from the reader, which shares


def test_a_publisher_that_ends_withdraws_first(start: Start, numpy_only: Path, at: dict[str, Any], name: str) -> None:
    """Without a word to `close`: the process just ends."""
    from mxcore import fetch
    from mxcore.errors import NoSource

    publisher = start("publish", packages=numpy_only)
    said(publisher)
    assert publisher.stdin is not None
    publisher.stdin.close()
    assert publisher.wait(60) == 0
    with pytest.raises(NoSource, match="nothing is published"):
        fetch(name, 1, **at)
