"""gs:// and az://: a model out of Google's emulator; the right client for the scheme, errors with bucket and key."""

from __future__ import annotations

import base64
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mxbench.stand_ins.s3_server import S3Server
from mxbench.stand_ins.tcp_proxy import TcpProxy
from mxcore.errors import ObjectDenied, ObjectMissing, ObjectStoreError, StoreTimeout, StoreUnreachable
from mxcore.storage.checkpoint import checkpoint_digest
from mxcore.storage.remote import (
    ObjectFolder,
    open_remote,
    parse_model_uri,
    pull_small_files,
    remote_digest,
    stream_remote,
)
from mxcore.storage.remote.object_store import ObjectOptions, Reader
from tests.object_store.conftest import SMALL, make_checkpoint
from tests.object_store.google_store import BUCKET, GoogleStore
from tests.object_store.test_object_folder import answer
from tests.storage.limited import in_child

ACCOUNT_KEY = base64.b64encode(b"the-azure-key-of-the-tests").decode()


def gone() -> str:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return f"http://127.0.0.1:{found.getsockname()[1]}"


def azure(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", url)


def google(monkeypatch: pytest.MonkeyPatch, folder: Path, url: str) -> None:
    account = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    (folder / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(folder / "account.json"))


def test_azure_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    azure(monkeypatch, gone())
    with pytest.raises((StoreUnreachable, StoreTimeout), match="az bucket 'container', key 'models/m'") as caught:
        ObjectFolder(parse_model_uri("az://container/models/m"))
    assert ACCOUNT_KEY not in str(caught.value)


def test_azure_that_refuses(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with TcpProxy(server.address) as proxy:
        azure(monkeypatch, f"http://{proxy.address}")
        proxy.answer_next(answer(403, b"Forbidden", b"<Error><Code>AuthenticationFailed</Code></Error>"), 9)
        with pytest.raises(ObjectDenied, match="az bucket 'container'") as caught:
            ObjectFolder(parse_model_uri("az://container/models/m"))
    assert ACCOUNT_KEY not in str(caught.value)


def test_google_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    google(monkeypatch, tmp_path, gone())
    with pytest.raises(ObjectStoreError, match="gs bucket 'bucket', key 'models/m'"):
        ObjectFolder(parse_model_uri("gs://bucket/models/m"))


def test_google_that_refuses(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with TcpProxy(server.address) as proxy:
        google(monkeypatch, tmp_path, f"http://{proxy.address}")
        proxy.answer_next(answer(403, b"Forbidden", b"<Error><Code>AccessDenied</Code></Error>"), 9)
        with pytest.raises(ObjectDenied, match="gs bucket 'bucket'"):
            ObjectFolder(parse_model_uri("gs://bucket/models/m"))


@pytest.mark.parametrize("reader", ["obstore", "runai"])
def test_a_model_out_of_googles_emulator(tmp_path: Path, reader: Reader) -> None:
    """Run:ai's streamer reads from the emulator itself, obstore by the XML interface before it.

    In a process of its own: the streamer keeps what its first store in a process was told.
    """
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator (requirements/dev.txt) is not installed")
    make_checkpoint(tmp_path / "model", rows=300)
    with GoogleStore() as store:
        store.put_folder(tmp_path / "model", "team/tiny")
        in_child(_load_from_google, store.xml_url, store.url, tmp_path / "model", tmp_path / "small", reader)


def _load_from_google(xml_url: str, url: str, model: Path, small: Path, reader: Reader) -> None:
    os.environ["GOOGLE_BASE_URL"] = xml_url
    os.environ["CLOUD_STORAGE_EMULATOR_ENDPOINT"] = url
    os.environ["RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS"] = "1"
    files = sorted(model.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    folder = ObjectFolder(parse_model_uri(f"gs://{BUCKET}/team/tiny"), ObjectOptions(reader))
    try:
        checkpoint = open_remote(folder)
        found = {name: tensor.numpy().copy() for name, tensor in stream_remote(folder, checkpoint)}
        digest = remote_digest(folder)
        assert pull_small_files(folder, small) == len(SMALL)
    finally:
        folder.close()
    with pytest.raises(ObjectMissing, match="has nothing below 'team/none'"):
        ObjectFolder(parse_model_uri(f"gs://{BUCKET}/team/none"))
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    assert folder.bytes_read >= sum(tensor.nbytes for tensor in tensors.values())
    assert digest == checkpoint_digest(files, model / "model.safetensors.index.json")
    assert (small / "config.json").read_bytes() == SMALL["config.json"]
