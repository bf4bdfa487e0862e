"""az://: a model out of Azurite, Microsoft's own stand-in for Azure's blobs, where it is installed (npm, 365 MB)."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mxbench.stand_ins.tcp_proxy import TcpProxy
from mxcore.errors import ObjectDenied, ObjectMissing, ObjectTruncated
from mxcore.storage.checkpoint import checkpoint_digest
from mxcore.storage.remote import (
    ObjectFolder,
    open_remote,
    parse_model_uri,
    pull_small_files,
    remote_digest,
    stream_remote,
)
from tests.models.sources.test_azure import ACCOUNT, AZURITE, Azurite, keys
from tests.object_store.conftest import SMALL
from tests.object_store.test_object_folder import equal, load

pytestmark = pytest.mark.skipif(AZURITE is None, reason="azurite-blob is not installed; npm install -g azurite")

URI = parse_model_uri("az://models/team/tiny")


def put(azurite: Azurite, path: str, data: bytes) -> None:
    azurite.put(f"models/team/tiny/{path}", data, x_ms_blob_type="BlockBlob")


@pytest.fixture
def azurite(
    made: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Azurite]:
    (tmp_path / "azurite").mkdir()
    running = Azurite(tmp_path / "azurite")
    running.put("models", query="restype=container")
    folder = made[0] / "models" / "team" / "tiny"
    for path in folder.rglob("*"):
        if path.is_file():
            put(running, path.relative_to(folder).as_posix(), path.read_bytes())
    for name, value in keys(running).items():
        monkeypatch.setenv(name, value)
    yield running
    running.close()


def test_a_model(azurite: Azurite, made: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    local = made[0] / "models" / "team" / "tiny"
    folder = ObjectFolder(URI)
    try:
        assert equal(load(folder), made[1])
        assert remote_digest(folder) == checkpoint_digest(
            sorted(local.glob("*.safetensors")), local / "model.safetensors.index.json"
        )
        assert pull_small_files(folder, tmp_path / "small") == len(SMALL)
    finally:
        folder.close()
    with pytest.raises(ObjectMissing, match="'models' has nothing below 'team/none'"):
        ObjectFolder(parse_model_uri("az://models/team/none"))


def test_a_cut_costs_little_again(
    azurite: Azurite, made: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(tensor.nbytes for tensor in made[1].values())
    with TcpProxy(f"127.0.0.1:{azurite.port}") as proxy:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://{proxy.address}/{ACCOUNT}")
        folder = ObjectFolder(URI)
        try:
            proxy.bytes_per_second = 5e6  # what is cut was read before, but for the last of it
            proxy.cut_after(total // 2)
            assert equal(load(folder), made[1])
        finally:
            folder.close()
    assert proxy.cuts == 1
    assert proxy.resumed() >= 1
    assert proxy.answered_bytes < total + (1 << 20)


def test_a_blob_that_is_replaced_by_one_of_its_size(azurite: Azurite, made: tuple[Path, dict[str, np.ndarray]]) -> None:
    """Azurite looks at If-Match, and answers 412."""
    name = "model-00002-of-00002.safetensors"
    data = (made[0] / "models" / "team" / "tiny" / name).read_bytes()
    folder = ObjectFolder(URI)
    try:
        checkpoint = open_remote(folder)
        put(azurite, name, data[:-1] + b"!")
        with pytest.raises(ObjectTruncated, match=rf"az bucket 'models', key 'team/tiny/{name}': it was replaced"):
            list(stream_remote(folder, checkpoint))
    finally:
        folder.close()


def test_a_wrong_key_is_denied_and_stays_secret(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = base64.b64encode(b"wrong" * 12).decode()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", wrong)
    with pytest.raises(ObjectDenied, match="az bucket 'models'") as caught:
        ObjectFolder(URI)
    assert wrong not in str(caught.value)
