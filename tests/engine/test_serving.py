"""Goodbyes: said by the process that ends, or for it when it is killed. Real processes, a real server."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from mxcore.engine import serving
from mxcore.engine.departure import Record, say_goodbye
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2

ROOT = Path(__file__).parents[2]
SEEN_SECONDS = 60.0  # less than a lease, after which it would be stale without a goodbye

MEMBER = """
import multiprocessing, os, signal, sys, time
from mxserver.wire.proto import p2p_pb2
from mxserver.wire.calls.client import ServerClient
from mxcore.engine import serving
from mxcore.engine.departure import Record

address, how = sys.argv[1], sys.argv[2]

class Member:
    def __init__(self):
        self.client = ServerClient(address)
        identity = p2p_pb2.SourceIdentity(model_name="m")
        worker = p2p_pb2.WorkerMetadata(status=p2p_pb2.SOURCE_STATUS_READY)
        self.source_id = self.client.publish(identity, worker, "w").mx_source_id
        self.client.update_status(self.source_id, "w", 0, p2p_pb2.SOURCE_STATUS_READY)

    def close(self):
        self.client.update_status(self.source_id, "w", 0, p2p_pb2.SOURCE_STATUS_STALE)
        print("closed", flush=True)

def engine():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as vLLM's workers do
    member = Member()
    serving.stay(member, Record(address, member.source_id, "w", 0))
    print(member.source_id, os.getpid(), flush=True)
    while how != "return":
        time.sleep(0.1)

if __name__ == "__main__":
    if how == "child":
        child = multiprocessing.get_context("spawn").Process(target=engine)
        child.start()
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        child.join()
    else:
        engine()
"""


@pytest.fixture
def client(server: str) -> Iterator[ServerClient]:
    with ServerClient(server) as connected:
        yield connected


@contextlib.contextmanager
def started(tmp_path: Path, server: str, how: str) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """The process, the source id, and the process id of what serves (the process itself, or its child)."""
    program = tmp_path / "member.py"
    program.write_text(MEMBER)
    with subprocess.Popen(
        [sys.executable, str(program), server, how],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            source_id, pid = process.stdout.readline().split()
            yield process, source_id, int(pid)
        finally:
            process.kill()


def status(client: ServerClient, source_id: str) -> p2p_pb2.SourceStatus.ValueType:
    record = client.get_metadata(source_id, "w")
    assert record is not None
    return record.worker.status


def wait_for_stale(client: ServerClient, source_id: str) -> None:
    deadline = time.monotonic() + SEEN_SECONDS
    while status(client, source_id) != p2p_pb2.SOURCE_STATUS_STALE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def watchers(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"mxcore/engine/departure.py") for word in words) and str(pid).encode() in words:
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize(("how", "ends"), [("return", None), ("stay", signal.SIGTERM), ("child", signal.SIGTERM)])
def test_an_orderly_end_says_goodbye(
    how: str, ends: signal.Signals | None, tmp_path: Path, server: str, client: ServerClient
) -> None:
    with started(tmp_path, server, how) as (process, source_id, pid):
        if ends is not None:
            process.send_signal(ends)
        assert process.stdout is not None
        assert "closed" in process.stdout.read()
        assert process.wait(SEEN_SECONDS) == 0
    assert status(client, source_id) == p2p_pb2.SOURCE_STATUS_STALE
    wait_for_no_watchers(pid)


def test_goodbye_is_said_for_a_killed_worker(tmp_path: Path, server: str, client: ServerClient) -> None:
    with started(tmp_path, server, "stay") as (process, source_id, pid):
        assert status(client, source_id) == p2p_pb2.SOURCE_STATUS_READY
        (watcher,) = watchers(pid)
        assert os.getsid(watcher) != os.getsid(pid)
        process.kill()
        wait_for_stale(client, source_id)
        assert process.stdout is not None
        assert process.stdout.read() == ""
    wait_for_no_watchers(pid)


def wait_for_no_watchers(pid: int) -> None:
    deadline = time.monotonic() + SEEN_SECONDS
    while watchers(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_goodbye_for_nobody(server: str) -> None:
    assert not say_goodbye(Record(server, "0123456789abcdef", "nobody", 0))


class Known:
    """An offer that only says whether it was ended or paused."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def close(self) -> None:
        self.calls.append("close")

    def pause(self) -> bool:
        self.calls.append("pause")
        return True

    def resume(self) -> bool:
        self.calls.append("resume")
        return True


@pytest.fixture
def offers(server: str) -> Iterator[dict[str, Known]]:
    """Of two engines in this process, and of one that is not known."""
    made = {engine: Known() for engine in ("first", "second", "")}
    for engine, offer in made.items():
        serving.stay(cast("serving.Offer", offer), Record(server, "0123456789abcdef", engine, 0), engine)
    yield made
    serving.leave("the test ends")


def test_an_engine_that_offers_nothing_ends_nothing_of_another(offers: dict[str, Known]) -> None:
    watch = serving.EngineWatch()
    watch.changing("third", "its weights are updated")
    watch.sleeping("third", 1)
    watch.awake("third", None)
    watch.ending("third")
    assert offers["first"].calls == offers["second"].calls == []
    assert offers[""].calls == ["close"], "it may have been the third one's"


def test_of_two_engines_in_a_process_one_ends_its_own_offers(offers: dict[str, Known]) -> None:
    watch = serving.EngineWatch()
    watch.sleeping("first", 1)
    watch.awake("first", None)
    watch.ending("first")
    watch.ending("first")  # it has none any more
    assert offers["first"].calls == ["pause", "resume", "close"]
    assert offers["second"].calls == []


def test_an_engine_that_is_not_known_ends_every_offer(offers: dict[str, Known]) -> None:
    serving.EngineWatch().ending("")
    assert all(offer.calls == ["close"] for offer in offers.values())
