"""gs:// and az://: the right client for the scheme, and errors with bucket and key. No store of theirs runs here."""

from __future__ import annotations

import base64
import json
import socket
from pathlib import Path

import pytest

from mxcore.errors import ObjectDenied, ObjectStoreError, StoreTimeout, StoreUnreachable
from mxcore.storage.model_uri import parse_model_uri
from mxcore.storage.object_store import ObjectFolder
from tests.models.tcp_proxy import TcpProxy
from tests.object_store.s3_server import S3Server
from tests.object_store.test_object_folder import answer

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
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)  # plain HTTP is allowed only where such an endpoint is named


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
