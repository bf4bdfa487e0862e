"""Downloads have a bound: how many run, how many wait, and what happens to those that nobody waits for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import grpc
import pytest

from mxserver.models import DownloadJob, JobState, ModelKey, ModelName, downloads, model_name, transfer
from mxserver.models.cache import Limits, ModelCache
from mxserver.models.downloads import DOWNLOADS_AT_ONCE, QUESTIONS_AT_ONCE, Downloads
from mxserver.models.errors import DownloadFailed, DownloadsFull
from mxserver.models.sources import FolderSource, RemoteFile, RemoteModel
from mxserver.services import ModelService
from mxserver.services import model as model_service
from mxserver.wire.proto import model_pb2


class HeldSource:
    """Answers questions, and fetches, only while its gates are open; counts both at once."""

    parallel_files = 1

    def __init__(self) -> None:
        self.answers, self.fetches = threading.Event(), threading.Event()
        self.asked = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self._lock = threading.Lock()
        self.fetching = self.most_fetching = self.asking = self.most_asking = 0
        self.fetched: list[str] = []

    def resolve(self, model: ModelName, revision: str) -> RemoteModel:
        with self._lock:
            self.asking += 1
            self.most_asking = max(self.most_asking, self.asking)
        self.asked.release()
        self.answers.wait(120)
        with self._lock:
            self.asking -= 1
        return RemoteModel.of(ModelKey(model, "1" * 40), [RemoteFile("config.json", 2)])

    def fetch(self, remote: RemoteModel, file: RemoteFile, scratch: Path, stopping: threading.Event) -> Path:
        with self._lock:
            self.fetching += 1
            self.most_fetching = max(self.most_fetching, self.fetching)
            self.fetched.append(remote.key.model.name)
        self.begun.release()
        self.fetches.wait(120)
        with self._lock:
            self.fetching -= 1
        raise DownloadFailed("enough")


@pytest.fixture
def source() -> Iterator[HeldSource]:
    made = HeldSource()
    yield made
    made.answers.set()
    made.fetches.set()


@pytest.fixture
def running(tmp_path: Path, source: HeldSource) -> Iterator[Downloads]:
    cache = ModelCache(tmp_path / "cache", Limits(), lease_seconds=60)
    opened = Downloads(cache, {model_pb2.FILE: source})
    yield opened
    source.answers.set()
    source.fetches.set()
    opened.close()
    cache.close()


def model(number: int) -> ModelName:
    return model_name(model_pb2.FILE, f"file:///m{number}")


def ended(job: DownloadJob) -> JobState:
    state = job.state()
    while not state.ended:
        state = job.wait_for_change(state.version, 120)
    return state


def test_so_many_are_fetched_and_asked_about_at_once(running: Downloads, source: HeldSource) -> None:
    before = threading.active_count()
    jobs = [running.ensure(model(number), "") for number in range(60)]
    for _ in range(QUESTIONS_AT_ONCE):
        assert source.asked.acquire(timeout=120)
    assert threading.active_count() - before <= 2 * QUESTIONS_AT_ONCE
    source.answers.set()
    for _ in range(DOWNLOADS_AT_ONCE):
        assert source.begun.acquire(timeout=120)
    source.fetches.set()
    assert {ended(job).phase for job in jobs} == {"failed"}
    assert source.most_asking == QUESTIONS_AT_ONCE
    assert source.most_fetching == DOWNLOADS_AT_ONCE


def test_line_has_an_end(running: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "MOST_DOWNLOADS", 20)
    for number in range(20):
        running.ensure(model(number), "")
    with pytest.raises(DownloadsFull, match="MOST_DOWNLOADS"):
        running.ensure(model(20), "")
    assert running.ensure(model(3), "").model == model(3)  # joining is no new download


def test_asking_and_leaving_leaves_nothing(running: Downloads, source: HeldSource) -> None:
    for number in range(500):
        job = running.ensure(model(number), "")
        running.leave(job)
    assert running.running() <= QUESTIONS_AT_ONCE
    source.answers.set()
    kept = running.ensure(model(1000), "")
    assert source.begun.acquire(timeout=120)
    source.fetches.set()
    ended(kept)
    assert source.fetched == ["file:///m1000"]


def test_what_has_begun_goes_on(running: Downloads, source: HeldSource) -> None:
    source.answers.set()
    job = running.ensure(model(1), "")
    assert source.begun.acquire(timeout=120)
    running.leave(job)
    assert running.ensure(model(1), "") is job


def test_another_caller_keeps_it_in_the_line(running: Downloads) -> None:
    for number in range(QUESTIONS_AT_ONCE):
        running.ensure(model(number), "")
    job = running.ensure(model(99), "")
    assert running.ensure(model(99), "") is job
    running.leave(job)
    assert not job.state().ended
    running.leave(job)
    assert job.state().phase == "failed"


class Caller:
    """A call of EnsureModelDownloaded, as grpcio shows it to the method."""

    def __init__(self) -> None:
        self.is_there = True
        self.looked = 0
        self._when_gone: list[Callable[[], None]] = []

    def is_active(self) -> bool:
        self.looked += 1
        return self.is_there

    def add_callback(self, when_gone: Callable[[], None]) -> bool:
        self._when_gone.append(when_gone)
        return self.is_there

    def leave(self) -> None:
        self.is_there = False
        for each in self._when_gone:
            each()


def test_a_caller_that_waits_costs_nothing_until_there_is_news(
    running: Downloads, source: HeldSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread sleeps: news, the download's end and the caller's own wake it, and nothing else does."""
    for name in ("_UPDATE_SECONDS", "_MIN_UPDATE_SECONDS"):
        monkeypatch.setattr(model_service, name, 3600.0)
    job, callers = running.ensure(model(1), ""), [Caller() for _ in range(20)]
    told: queue.SimpleQueue[Caller] = queue.SimpleQueue()

    def follow(caller: Caller) -> None:
        for _ in ModelService._follow(ModelService.__new__(ModelService), job, cast("grpc.ServicerContext", caller)):
            told.put(caller)

    threads = [threading.Thread(target=follow, args=(caller,)) for caller in callers]
    for thread in threads:
        thread.start()
    assert {told.get(timeout=120) for _ in callers} == set(callers)
    for caller in callers:
        caller.leave()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert told.empty()


def test_how_often_progress_is_looked_at_does_not_follow_the_number_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look goes through all files that came: one a file would be a core for minutes with 10,000 of them."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.json").write_bytes(b"{}")
    looks: list[int] = []
    look = transfer.Transfer._show_progress

    def counted(self: transfer.Transfer, total_files: int) -> None:
        looks.append(total_files)
        look(self, total_files)

    monkeypatch.setattr(transfer.Transfer, "_show_progress", counted)
    monkeypatch.setattr(transfer, "_LOOK_SECONDS", 60.0, raising=False)
    cache = ModelCache(tmp_path / "cache", Limits(), lease_seconds=60)
    opened = Downloads(cache, {model_pb2.FILE: FolderSource((folder,))})
    job = opened.ensure(model_name(model_pb2.FILE, f"file://{folder}"), "")
    assert ended(job).error is None
    opened.close()
    cache.close()
    assert looks == [60, 60], "at its beginning and at its end"
