"""Downloads end when the server is told to stop, whatever they wait for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import mxserver.models.downloads
from mxserver.models import DownloadJob, JobState, ModelName, Stopped, model_name
from mxserver.models.cache import Limits, ModelCache
from mxserver.models.downloads import Downloads
from mxserver.models.errors import DownloadInterrupted
from mxserver.models.sources import FolderSource, RemoteFile, RemoteModel
from mxserver.models.transfer import RetryPolicy
from mxserver.wire.proto import model_pb2


class SilentSource:
    """A provider that does not answer: to its first question, or to the one for a file."""

    parallel_files = 1

    def __init__(self, folder: Path, *, at_first: bool) -> None:
        self._folders = FolderSource((folder,))
        self._at_first = at_first
        self.asked = threading.Event()
        self.answers = threading.Event()

    def _hang(self) -> None:
        self.asked.set()
        self.answers.wait(120)

    def resolve(self, model: ModelName, revision: str) -> RemoteModel:
        if self._at_first:
            self._hang()
        return self._folders.resolve(model, revision)

    def fetch(self, remote: RemoteModel, file: RemoteFile, scratch: Path, stopping: threading.Event) -> Path:
        self._hang()
        raise DownloadInterrupted("never")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_bytes(b"{}")
    return tmp_path / "source"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ModelCache]:
    opened = ModelCache(tmp_path / "cache", Limits(), lease_seconds=60)
    yield opened
    opened.close()


def ended(job: DownloadJob) -> JobState:
    state = job.state()
    while not state.ended:
        before, state = state.version, job.wait_for_change(state.version, 30)
        assert state.version != before, "it does not end"
    return state


@pytest.mark.parametrize("at_first", [True, False], ids=["resolve", "fetch"])
def test_provider_that_does_not_answer_holds_nothing_up(cache: ModelCache, folder: Path, at_first: bool) -> None:
    source = SilentSource(folder, at_first=at_first)
    downloads = Downloads(cache, {model_pb2.FILE: source})
    job = downloads.ensure(model_name(model_pb2.FILE, f"file://{folder}"), "")
    assert source.asked.wait(120)
    downloads.close()
    assert downloads.running() == 0
    assert isinstance(ended(job).error, Stopped)
    assert not cache.records()
    source.answers.set()


def test_wait_before_the_next_attempt_ends(cache: ModelCache, folder: Path) -> None:
    class Busy(SilentSource):
        def resolve(self, model: ModelName, revision: str) -> RemoteModel:
            self.asked.set()
            raise DownloadInterrupted("busy", retry_after_seconds=3600)

    source = Busy(folder, at_first=True)
    downloads = Downloads(cache, {model_pb2.FILE: source}, retry=RetryPolicy())
    job = downloads.ensure(model_name(model_pb2.FILE, f"file://{folder}"), "")
    assert source.asked.wait(120)
    downloads.close()
    assert isinstance(ended(job).error, Stopped)


def test_download_that_cannot_end_is_left_behind(
    cache: ModelCache, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the cache folder's file system hangs."""
    monkeypatch.setattr(mxserver.models.downloads, "_CLOSE_SECONDS", 0.05)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(_: DownloadJob) -> None:
        hangs.set()
        goes_on.wait(120)

    downloads = Downloads(cache, {model_pb2.FILE: FolderSource(())}, ended=lambda _: None)
    monkeypatch.setattr(downloads, "_found", hang)
    job = downloads.ensure(model_name(model_pb2.FILE, f"file://{folder}"), "")
    assert hangs.wait(120)
    downloads.close()
    assert "abandoned" in caplog.text
    goes_on.set()
    assert ended(job).phase == "failed"


def test_nothing_starts_once_it_stops(cache: ModelCache, folder: Path) -> None:
    downloads = Downloads(cache, {model_pb2.FILE: FolderSource((folder,))})
    downloads.close()
    job = downloads.ensure(model_name(model_pb2.FILE, f"file://{folder}"), "")
    assert isinstance(job.state().error, Stopped)
    assert downloads.running() == 0
