"""Models below a prefix of an object store, and in folders of the server. The store is a real S3 server (rclone)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from mxserver.models.errors import DownloadFailed
from mxserver.models.names import model_name
from mxserver.models.sources import FolderSource
from mxserver.wire import ModelDownloadError, ModelNotFound
from mxserver.wire.files import ModelClient
from mxserver.wire.proto import model_pb2
from tests.models.conftest import FILE_DIGESTS, FILES, StartServer, digest_of, digests_of, files_below, pattern

KEYS = {"AWS_ACCESS_KEY_ID": "the-id", "AWS_SECRET_ACCESS_KEY": "the-secret", "AWS_REGION": "us-east-1"}
RCLONE = Path(sys.executable).with_name("rclone")


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    folder = tmp_path / "s3" / "models"
    put(folder / "team" / "tiny", FILES)
    put(folder / "team" / "tiny-2", {"other.json": b"{}"})
    return folder


@pytest.fixture
def s3(bucket: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    keys = f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}"
    process = subprocess.Popen(
        [RCLONE, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", keys, "--config", "", bucket.parent],
        stderr=subprocess.DEVNULL,
        env={"HOME": str(bucket.parent.parent), "PATH": ""},
    )
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


def test_prefix_of_s3(start_server: StartServer, s3: str, tmp_path: Path) -> None:
    with ModelClient(start_server(AWS_ENDPOINT_URL=s3, **KEYS).address) as client:
        updates: list[int] = []
        client.ensure("s3://models/team/tiny", on_update=lambda update: updates.append(update.progress.bytes_done))
        assert updates[-1] == sum(map(len, FILES.values()))
        assert {info.path: info.size for info in client.list_files("s3://models/team/tiny/").files} == {
            path: len(data) for path, data in FILES.items()
        }
        client.fetch("s3://models/team/tiny", tmp_path / "to")
        assert files_below(tmp_path / "to") == FILE_DIGESTS
        with pytest.raises(ModelNotFound):
            client.list_files("s3://models/team/tiny-2")
        assert not [verdict for verdict in client.validate("s3://models/team/tiny") if verdict.problem]


def test_changed_prefix_is_another_revision(start_server: StartServer, s3: str, bucket: Path) -> None:
    with ModelClient(start_server(AWS_ENDPOINT_URL=s3, **KEYS).address) as client:
        client.ensure("s3://models/team/tiny")
        put(bucket / "team" / "tiny", {"config.json": b'{"model_type": "changed"}'})
        client.ensure("s3://models/team/tiny")
        listed = {info.path: info.size for info in client.list_files("s3://models/team/tiny").files}
        assert listed["config.json"] == len(b'{"model_type": "changed"}')
        assert len(client.cached_models().models) == 2
        client.delete("s3://models/team/tiny")
        assert not client.cached_models().models


def test_large_object_comes_in_parts(start_server: StartServer, s3: str, bucket: Path, tmp_path: Path) -> None:
    large = pattern(40_000_003, 5)
    put(bucket / "big", {"model.safetensors": large})
    with ModelClient(start_server(AWS_ENDPOINT_URL=s3, **KEYS).address) as client:
        client.ensure("s3://models/big")
        client.fetch("s3://models/big", tmp_path / "to")
    assert digest_of((tmp_path / "to" / "model.safetensors").read_bytes()) == digest_of(large)


class RangedStore(BaseHTTPRequestHandler):
    """As much of S3 as a listing and ranged GETs take, unlike rclone's, which leaves ranges aside. Checks no keys."""

    data = pattern(40_000_003, 6)
    ranges: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if "list-type=2" in self.path:
            body = (
                '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false</IsTruncated>'
                f"<Contents><Key>big/model.safetensors</Key><Size>{len(self.data)}</Size><ETag>e1</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents></ListBucketResult>"
            ).encode()
            self.send_response(200)
        else:
            self.ranges.append(self.headers["Range"])
            begin, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            body = self.data[int(begin) : int(end) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end}/{len(self.data)}")
            self.send_header("ETag", "e1")
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize("name", ["s3://models/big", "gs://models/big"])
def test_store_with_ranges_is_asked_in_parts(start_server: StartServer, tmp_path: Path, name: str) -> None:
    RangedStore.ranges.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), RangedStore) as store:
        thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        url = f"http://127.0.0.1:{store.server_address[1]}"
        account = {
            "gcs_base_url": url,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        (tmp_path / "account.json").write_text(json.dumps(account))
        keys = {"AWS_ENDPOINT_URL": url, "GOOGLE_SERVICE_ACCOUNT": str(tmp_path / "account.json"), **KEYS}
        with ModelClient(start_server(**keys).address) as client:
            client.ensure(name)
            client.fetch(name, tmp_path / "to")
        store.shutdown()
        thread.join()
    assert digest_of((tmp_path / "to" / "model.safetensors").read_bytes()) == digest_of(RangedStore.data)
    assert len(RangedStore.ranges) == 3


def test_what_s3_refuses(start_server: StartServer, s3: str) -> None:
    with ModelClient(start_server(AWS_ENDPOINT_URL=s3, **KEYS).address) as client:
        with pytest.raises(ModelNotFound):
            client.ensure("s3://models/nothing/here")
        with pytest.raises(ModelNotFound):
            client.ensure("s3://no-such-bucket/x")
    wrong = KEYS | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    with (
        ModelClient(start_server(AWS_ENDPOINT_URL=s3, **wrong).address) as client,
        pytest.raises(ModelDownloadError, match="credentials"),
    ):
        client.ensure("s3://models/team/tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(tmp_path / "shared" / "tiny", FILES)
    return tmp_path / "shared"


def test_folder_of_the_server(start_server: StartServer, folder: Path, tmp_path: Path) -> None:
    name = f"file://{folder}/tiny"
    with ModelClient(start_server(MX_FILE_SOURCES=f"/nonexistent:{folder}").address) as client:
        client.ensure(name)
        client.fetch(name, tmp_path / "to")
        assert files_below(tmp_path / "to") == FILE_DIGESTS
        with pytest.raises(ModelNotFound):
            client.ensure(f"file://{folder}/none")


def test_a_file_that_is_written_to_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its size and time are set back, as `touch -r` does."""
    source = tmp_path / "m"
    put(source, {"model.safetensors": bytes(1000)})
    model = model_name(model_pb2.FILE, f"file://{source}")
    folders = FolderSource((tmp_path,))
    remote = folders.resolve(model, "")
    copy = os.sendfile

    def written_meanwhile(to: int, handle: int, offset: None, count: int) -> int:
        (source / "model.safetensors").write_bytes(b"1" * 1000)
        os.utime(source / "model.safetensors", ns=(0, int(remote.files[0].etag)))
        return copy(to, handle, offset, count)

    monkeypatch.setattr(os, "sendfile", written_meanwhile)
    with pytest.raises(DownloadFailed, match="changed while it was copied"):
        folders.fetch(remote, remote.files[0], tmp_path, threading.Event())


def test_folders_that_are_not_allowed(start_server: StartServer, folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "secrets", {"key.json": b"{}"})
    (folder / "link").symlink_to(tmp_path / "secrets")
    (folder / "tiny" / "linked.json").symlink_to(tmp_path / "secrets" / "key.json")
    with ModelClient(start_server(MX_FILE_SOURCES=str(folder)).address) as client:
        for name in (f"file://{tmp_path}/secrets", f"file://{folder}/link", f"file://{folder}/tiny", "file:///etc"):
            with pytest.raises(ModelDownloadError, match=r"MX_FILE_SOURCES|leads out"):
                client.ensure(name)
    with (
        ModelClient(start_server().address) as client,
        pytest.raises(ModelDownloadError, match="MX_FILE_SOURCES"),
    ):
        client.ensure(f"file://{folder}/tiny")
    assert files_below(tmp_path / "secrets") == digests_of({"key.json": b"{}"})
