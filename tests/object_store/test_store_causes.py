"""What a store refuses and why, for worker and server alike; keys that are no paths (findings, rows 5 to 8, 31, 33)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mxcore.errors import (
    ObjectCredentials,
    ObjectDenied,
    ObjectMissing,
    ObjectStoreError,
    StoreTimeout,
    StoreUnreachable,
    WrongRegion,
)
from mxcore.storage.remote import ObjectFolder, parse_model_uri, pull_small_files
from mxcore.storage.remote.object_store import ObjectOptions
from mxserver.models.errors import DownloadFailed, DownloadInterrupted, RevisionNotFound
from mxserver.models.names import model_name
from mxserver.models.sources import ObjectSource
from mxserver.wire.proto import model_pb2
from mxserver.wire.stores import cause_of
from tests.object_store.spelt_store import Refusal, SpeltStore, spelt_store

URI = "s3://bucket/models/m"
FILES = {"config.json": b"{}", "sub/tokenizer.json": b"[]", "empty.txt": b"", "x.safetensors": b"12345678"}
MARKERS = {"": b"", "sub/": b"", "only/marker/": b""}
NO_PATHS = {"a//b.txt": b"x", "sub/../up.txt": b"x"}
# refusal → the worker's error, what it says and what to do, and whether the server tries again
CASES: dict[str, tuple[Refusal, type[ObjectStoreError], str, bool]] = {
    "redirect without a place": (Refusal(301, "PermanentRedirect"), WrongRegion, "set AWS_REGION", False),
    "region": (Refusal(400, "AuthorizationHeaderMalformed"), WrongRegion, "AWS_REGION=us-east-1", False),
    "expired": (Refusal(400, "ExpiredToken"), ObjectCredentials, "have expired: renew them", False),
    "unknown token": (Refusal(400, "InvalidToken"), ObjectDenied, "does not know these credentials", False),
    "unknown key": (Refusal(403, "InvalidAccessKeyId"), ObjectDenied, "does not know these credentials", False),
    "denied": (Refusal(403, "AccessDenied"), ObjectDenied, "may not read it", False),
    "clock": (Refusal(403, "RequestTimeTooSkewed"), ObjectDenied, "clock is wrong", False),
    "no bucket": (Refusal(404, "NoSuchBucket"), ObjectMissing, "check the name", False),
    "slow down": (Refusal(503, "SlowDown"), StoreTimeout, "worth another try", True),
    "too many": (Refusal(429), StoreTimeout, "worth another try", True),
    "cut": (Refusal(200, "", cut=True), StoreTimeout, "broke off", True),
    "no store": (Refusal(418), StoreUnreachable, "does not answer as such a store does", False),
}


@pytest.fixture(scope="module")
def running() -> Iterator[SpeltStore]:
    with spelt_store({f"models/m/{name}": data for name, data in FILES.items()}) as store:
        yield store


@pytest.fixture
def store(running: SpeltStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[SpeltStore]:
    for name, value in running.environ().items():
        monkeypatch.setenv(name, value)
    yield running
    running.refusal = None


def on_the_worker(uri: str = URI) -> ObjectFolder:
    return ObjectFolder(parse_model_uri(uri), ObjectOptions("obstore", timeout_seconds=2.0))


def on_the_server(uri: str = URI) -> dict[str, int | None]:
    found = ObjectSource().resolve(model_name(model_pb2.S3, uri), "")
    return {file.path: file.size for file in found.files}


@pytest.mark.parametrize("odd", [MARKERS, NO_PATHS, MARKERS | NO_PATHS], ids=["markers", "no paths", "both"])
def test_odd_keys_cost_themselves_and_not_the_prefix(
    odd: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What consoles make for folders (findings, row 5), and keys that are no paths (row 6)."""
    sizes = {name: len(data) for name, data in FILES.items()}
    with spelt_store({f"models/m/{name}": data for name, data in (FILES | odd).items()}) as store:
        for name, value in store.environ().items():
            monkeypatch.setenv(name, value)
        assert on_the_server() == sizes
        folder = on_the_worker()
        try:
            assert {file.path: file.size_bytes for file in folder.files} == sizes
            assert pull_small_files(folder, tmp_path) == 3
            assert (tmp_path / "sub" / "tokenizer.json").read_bytes() == b"[]"
        finally:
            folder.close()
    assert ("left out: " in caplog.text) is (odd is not MARKERS)


def test_an_odd_key_at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    with spelt_store({f"models/m/{name}": data for name, data in (FILES | {"/lost": b"x"}).items()}) as store:
        for name, value in store.environ().items():
            monkeypatch.setenv(name, value)
        assert on_the_server() == {name: len(data) for name, data in FILES.items()}


def test_more_keys_than_one_page_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Findings, row 33; the neighbour `m-2` is none of them."""
    files = {f"{number:04}.json": b"{}" for number in range(1202)}
    objects = {f"models/m/{name}": data for name, data in files.items()} | {"models/m-2/x.json": b"{}"}
    with spelt_store(objects) as store:
        for name, value in store.environ().items():
            monkeypatch.setenv(name, value)
        assert on_the_server() == dict.fromkeys(files, 2)
        folder = on_the_worker()
        try:
            assert {file.path for file in folder.files} == set(files)
            assert store.requests >= 4  # two pages each
        finally:
            folder.close()


def test_names_that_have_to_be_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Findings, row 31."""
    files = {name: name.encode() for name in ("a b.json", "ü.json", "100%.json", "%41.json", "1+1.json", "a#b&c.json")}
    with spelt_store({f"models/m/{name}": data for name, data in files.items()}) as store:
        for name, value in store.environ().items():
            monkeypatch.setenv(name, value)
        assert on_the_server() == {name: len(data) for name, data in files.items()}
        folder = on_the_worker()
        try:
            assert pull_small_files(folder, tmp_path) == len(files)
        finally:
            folder.close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("case", CASES)
def test_worker_and_server_name_the_same_cause(store: SpeltStore, case: str) -> None:
    store.refusal, kind, text, is_tried_again = CASES[case]
    with pytest.raises(ObjectStoreError, match=text) as told:
        on_the_worker()
    assert type(told.value) is kind
    with pytest.raises(Exception, match=text) as by_server:
        on_the_server()
    expected = RevisionNotFound if kind is ObjectMissing else DownloadInterrupted if is_tried_again else DownloadFailed
    assert type(by_server.value) is expected
    for message in map(str, (told.value, by_server.value)):
        assert "bucket" in message
        assert "models/m" in message
        assert "Debug source" not in message
        assert "the-secret-key" not in message
        assert "the-key-id" not in message


def test_absent_credentials_are_not_denied() -> None:
    asked = "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 4 ms - Server returned "
    assert cause_of(OSError(f"{asked}non-2xx status code: 403 Forbidden: no"), "s3").kind == "credentials"


def test_no_host_and_nobody_who_listens(monkeypatch: pytest.MonkeyPatch, store: SpeltStore) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreUnreachable, match=r"AWS_ENDPOINT_URL=http://127\.0\.0\.1:9"):
        on_the_worker()
