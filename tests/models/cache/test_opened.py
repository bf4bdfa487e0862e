"""The cache of a running server: when it is opened, what health says, what is cleared up."""

from __future__ import annotations

import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import mxserver.models.opened
from mxserver.models import CacheSettings, ModelName, OpenCache, model_name
from mxserver.models.cache import Limits, ModelCache
from mxserver.models.downloads import Downloads
from mxserver.models.errors import CacheUnusable, DownloadInterrupted, LeaseLost, ModelInUse, ModelNotCached
from mxserver.models.sources import FolderSource, RemoteFile, RemoteModel, is_disk_full
from mxserver.models.transfer import RetryPolicy
from mxserver.setting_values import default_cache_directory
from mxserver.wire import ServerRefused
from mxserver.wire.files import ModelClient
from mxserver.wire.proto import model_pb2
from tests.models.conftest import FILE_DIGESTS, FILES, REPOSITORY, StartServer, files_below
from tests.server.conftest import ServerProcess

SERVICES = ("model_express.model.ModelService", "model_express.mx.CacheService")


def health(address: str, service: str) -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=60).status)


@pytest.mark.parametrize("service", SERVICES)
def test_health_per_service(start_server: StartServer, service: str) -> None:
    assert health(start_server().address, service) == health_pb2.HealthCheckResponse.SERVING


def test_folder_that_was_asked_for_must_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = ["--host", "127.0.0.1", "--port", "0", "--store", "memory", "--cache-dir", str(tmp_path / "file")]
    ended = subprocess.run([sys.executable, "-m", "mxserver", *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode not in (0, 2)
    assert "MODEL_EXPRESS_CACHE_DIRECTORY" in ended.stderr
    assert "listening on" not in ended.stderr


def test_default_folder_is_left_alone_until_it_is_needed(tmp_path: Path) -> None:
    """A server for P2P alone starts where it can write nothing."""
    (tmp_path / "home").touch()
    process = ServerProcess("--port", "0", "--store", "memory", environ={"HF_HOME": str(tmp_path / "home" / "none")})
    try:
        assert health(process.address, "") == health_pb2.HealthCheckResponse.SERVING
        with ModelClient(process.address) as client, pytest.raises(ServerRefused, match="MX_CACHE_UNUSABLE"):
            client.cached_models()
    finally:
        process.close()


def test_default_folder_is_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_directory() == Path("/xdg/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/home")
    assert default_cache_directory() == Path("/home/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/cache")
    assert default_cache_directory() == Path("/cache")


class FlakySource:
    """A folder that is given only after some attempts."""

    parallel_files = 2

    def __init__(self, folder: Path, failures: int) -> None:
        self._folders = FolderSource((folder,))
        self.failures = failures
        self.asked_to_wait: list[float] = []

    def resolve(self, model: ModelName, revision: str) -> RemoteModel:
        if self.failures:
            self.failures -= 1
            raise DownloadInterrupted("not now", retry_after_seconds=0.01)
        return self._folders.resolve(model, revision)

    def fetch(self, remote: RemoteModel, file: RemoteFile, scratch: Path, stopping: threading.Event) -> Path:
        return self._folders.fetch(remote, file, scratch, stopping)


@pytest.fixture
def source_folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "source"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ModelCache]:
    opened = ModelCache(tmp_path / "cache", Limits(), lease_seconds=60)
    yield opened
    opened.close()


def ensure(cache: ModelCache, folder: Path, *, failures: int = 0, attempts: int = 3) -> tuple[ModelName, str]:
    model = model_name(model_pb2.FILE, f"file://{folder}")
    policy = RetryPolicy(attempts, first_wait_seconds=0.001)
    downloads = Downloads(cache, {model_pb2.FILE: FlakySource(folder, failures)}, retry=policy)
    job = downloads.ensure(model, "")
    state = job.state()
    while not state.ended:
        state = job.wait_for_change(state.version, 30)
    assert downloads.running() == 0
    return model, str(state.error or "")


def test_retries_have_an_end(cache: ModelCache, source_folder: Path) -> None:
    model, error = ensure(cache, source_folder, failures=3)
    assert "given up after 3 attempts" in error
    with pytest.raises(ModelNotCached):
        cache.find(model, "")
    model, error = ensure(cache, source_folder, failures=2)
    assert not error
    assert files_below(cache.layout.snapshot(cache.find(model, "").key)) == FILE_DIGESTS


def test_waits_grow_and_heed_the_provider() -> None:
    policy = RetryPolicy(first_wait_seconds=1, longest_wait_seconds=10)
    assert all(0.5 <= policy.wait_seconds(1, 0) <= 1 for _ in range(20))
    assert all(2 <= policy.wait_seconds(3, 0) <= 4 for _ in range(20))
    assert all(5 <= policy.wait_seconds(9, 0) <= 10 for _ in range(20))
    assert policy.wait_seconds(1, 30) == 30


def test_damaged_record_is_no_model_and_is_made_again(cache: ModelCache, source_folder: Path) -> None:
    model, _ = ensure(cache, source_folder)
    record = cache.find(model, "")
    path = cache.layout.record(record.key)
    path.write_text("{")
    with pytest.raises(ModelNotCached):
        cache.find(model, "")
    assert cache.records() == []
    ensure(cache, source_folder)
    assert cache.find(model, "").files == record.files


def test_record_under_a_foreign_name_is_no_model(cache: ModelCache, source_folder: Path) -> None:
    model, _ = ensure(cache, source_folder)
    record = cache.find(model, "")
    fields = json.loads(record.to_json()) | {"revision": "0" * 40}
    cache.layout.record(record.key).write_text(json.dumps(fields))
    with pytest.raises(ModelNotCached):
        cache.find(model, "")


def test_files_that_vanished_are_fetched_again(cache: ModelCache, source_folder: Path) -> None:
    model, _ = ensure(cache, source_folder)
    key = cache.find(model, "").key
    (cache.layout.snapshot(key) / "config.json").unlink()
    assert not ensure(cache, source_folder)[1]
    assert files_below(cache.layout.snapshot(key)) == FILE_DIGESTS


def test_removal_that_was_broken_off_is_finished(cache: ModelCache, source_folder: Path) -> None:
    """As if the process had died between hiding the record and deleting the files."""
    model, _ = ensure(cache, source_folder)
    key = cache.find(model, "").key
    left = cache.layout.staging / f"{key.id}.1"
    left.mkdir()
    cache.layout.record(key).rename(left / "record.json")
    assert cache.layout.snapshot(key).exists()
    cache.sweep()
    assert not cache.layout.snapshot(key).exists()
    assert not list(cache.layout.staging.iterdir())


def test_abandoned_downloads_are_dropped_after_a_day(cache: ModelCache) -> None:
    young, old = (cache.layout.staging / f"{digit * 32}.1" for digit in "ab")
    for folder in (young, old):
        (folder / "scratch").mkdir(parents=True)
    os.utime(old, (0, 0))
    cache.sweep()
    assert list(cache.layout.staging.iterdir()) == [young]


def test_removal_while_it_is_read_changes_nothing(cache: ModelCache, source_folder: Path) -> None:
    model, _ = ensure(cache, source_folder)
    with cache.reading(model, "") as record:
        with pytest.raises(ModelInUse, match="being read"):
            cache.remove(record.key)
        assert cache.find(model, "") == record
    assert cache.remove(record.key) == record.size_bytes
    assert not cache.layout.model_folder(model).exists()
    with pytest.raises(ModelNotCached):
        cache.remove(record.key)


def test_a_removal_waits_for_readers_that_finish(
    cache: ModelCache, source_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has the last byte before the server is done with the file: a delete may come in between."""
    model, _ = ensure(cache, source_folder)
    key, looked, is_used = cache.find(model, "").key, threading.Event(), cache.leases.is_used

    def look(name: str) -> bool:
        found = is_used(name)
        looked.set()
        return found

    monkeypatch.setattr(cache.leases, "is_used", look)
    with ThreadPoolExecutor() as pool:
        with cache.reading(model, ""):
            removal = pool.submit(cache.remove, key, patience_seconds=60)
            assert looked.wait(60)
        assert removal.result(60) > 0


def test_use_is_noted(cache: ModelCache, source_folder: Path) -> None:
    model, _ = ensure(cache, source_folder)
    key = cache.find(model, "").key
    os.utime(cache.layout.record(key), (1, 1))
    with cache.reading(model, ""):
        assert cache.last_used(key) > 1


def test_cache_in_a_file_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheUnusable):
        ModelCache(tmp_path / "file", Limits())


def test_disk_full_is_found_among_causes() -> None:
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(5, "I/O error"))


def test_health_shows_a_folder_that_is_gone(start_server: StartServer, cache_folder: Path) -> None:
    process = start_server(MX_CACHE_LEASE_SECS="0.3")
    with ModelClient(process.address) as client:
        client.ensure(REPOSITORY)
    shutil.rmtree(cache_folder)
    process.wait_for("the cache folder does not work")
    assert health(process.address, SERVICES[0]) == health_pb2.HealthCheckResponse.NOT_SERVING
    assert health(process.address, "") == health_pb2.HealthCheckResponse.SERVING


def opened_in(folder: Path) -> OpenCache:
    return OpenCache(CacheSettings(folder, lease_seconds=60), lambda _: None)


def test_keeper_that_loses_its_lease_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the server stops while another replica holds what is to be cleared up."""
    met = threading.Event()

    def lost(_: ModelCache) -> None:
        met.set()
        raise LeaseLost("it stops")

    monkeypatch.setattr(ModelCache, "sweep", lost)
    opened = opened_in(tmp_path)
    opened.open()
    assert met.wait(60)
    opened.close()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_keeper_outlives_what_nobody_expected_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown: queue.SimpleQueue[bool] = queue.SimpleQueue()
    fails = iter([True])

    def sweep(_: ModelCache) -> None:
        if next(fails, False):
            raise ZeroDivisionError

    monkeypatch.setattr(ModelCache, "sweep", sweep)
    opened = OpenCache(CacheSettings(tmp_path, lease_seconds=0.1), shown.put)
    opened.open()
    assert [shown.get(timeout=60) for _ in range(2)] == [False, True]
    opened.close()
    assert "cannot be kept within its limits" in caplog.text


def test_folder_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mxserver.models.opened, "_CLOSE_SECONDS", 0.05)
    hangs, goes_on, closed = threading.Event(), threading.Event(), threading.Event()

    def hang(_: ModelCache) -> None:
        hangs.set()
        goes_on.wait(120)

    close = ModelCache.close

    def note_close(cache: ModelCache) -> None:
        close(cache)
        closed.set()

    monkeypatch.setattr(ModelCache, "sweep", hang)
    monkeypatch.setattr(ModelCache, "close", note_close)
    opened = opened_in(tmp_path)
    opened.open()
    assert hangs.wait(60)
    opened.close()
    assert "does not answer" in caplog.text
    goes_on.set()
    assert closed.wait(60)
    with pytest.raises(CacheUnusable, match="is stopping"):
        opened.open()


class _Locks:
    """Locks of replicas, which nobody else takes here."""

    def acquire(self, name: str, token: str, seconds: float) -> bool:
        return True

    def extend(self, name: str, token: str, seconds: float) -> bool | None:
        return True

    def release(self, name: str, token: str) -> None:
        pass

    def is_held(self, name: str) -> bool:
        return False

    def close(self) -> None:
        pass


def test_a_replica_without_a_model_says_which_one_it_is(tmp_path: Path) -> None:
    model = model_name(model_pb2.HUGGING_FACE, "org/none")
    for locks, named in ((None, False), (_Locks(), True)):
        cache = ModelCache(tmp_path / "cache", Limits(), shared_locks=locks)
        with pytest.raises(ModelNotCached) as raised:
            cache.find(model, "")
        assert (f"the replica {socket.gethostname()}" in str(raised.value)) is named
        cache.close()
