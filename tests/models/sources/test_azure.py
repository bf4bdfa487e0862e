"""Models below a prefix of Azure Blob Storage, from Azurite, Microsoft's own stand-in for it.

Azurite is on npm alone, and 365 MB large: it is not installed for the tests, but used where it is
(`npm install -g azurite`).
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import http.client
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxserver.wire import ModelDownloadError, ModelNotFound
from mxserver.wire.files import ModelClient
from tests.models.conftest import FILE_DIGESTS, FILES, StartServer, digest_of, files_below, pattern

AZURITE = shutil.which("azurite-blob")

pytestmark = pytest.mark.skipif(AZURITE is None, reason="azurite-blob is not installed; npm install -g azurite")

ACCOUNT = "devstoreaccount1"
# The account key that all installations of Azurite have; it is in its documentation.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class Azurite:
    """The server, as a process of its own. `put` makes containers and blobs by signed requests."""

    def __init__(self, folder: Path) -> None:
        assert AZURITE
        self.process = subprocess.Popen(
            [AZURITE, "--blobHost", "127.0.0.1", "--blobPort", "0", "--location", folder, "--skipApiVersionCheck"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout
        listens = (re.search(r"listens on http://127\.0\.0\.1:(\d+)", line) for line in self.process.stdout)
        self.port = int(next(found for found in listens if found)[1])
        self.endpoint = f"http://127.0.0.1:{self.port}/{ACCOUNT}"

    def put(self, path: str, body: bytes = b"", *, query: str = "", **headers: str) -> None:
        now = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        sent = {"x-ms-date": now, "x-ms-version": "2021-12-02"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        named = "".join(f"{name}:{sent[name]}\n" for name in sorted(sent))
        length = str(len(body)) if body else ""
        asked = f"/{ACCOUNT}/{ACCOUNT}/{path}" + (f"\n{query.replace('=', ':')}" if query else "")
        text = f"PUT\n\n\n{length}\n\n\n\n\n\n\n\n\n{named}{asked}"
        signature = base64.b64encode(hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()).decode()
        sent["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("PUT", f"/{ACCOUNT}/{path}" + (f"?{query}" if query else ""), body, sent)
        answer = connection.getresponse()
        assert answer.status == 201, answer.read()
        connection.close()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def azurite(tmp_path: Path) -> Iterator[Azurite]:
    (tmp_path / "azurite").mkdir()
    running = Azurite(tmp_path / "azurite")
    running.put("models", query="restype=container")
    for path, data in FILES.items():
        running.put(f"models/team/tiny/{path}", data, x_ms_blob_type="BlockBlob")
    yield running
    running.close()


def keys(azurite: Azurite, key: str = KEY) -> dict[str, str]:
    return {
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": key,
        "AZURE_STORAGE_ENDPOINT": azurite.endpoint,
    }


def test_prefix_of_azure(start_server: StartServer, azurite: Azurite, tmp_path: Path) -> None:
    with ModelClient(start_server(**keys(azurite)).address) as client:
        client.ensure("az://models/team/tiny")
        client.fetch("az://models/team/tiny", tmp_path / "to")
        assert files_below(tmp_path / "to") == FILE_DIGESTS
        with pytest.raises(ModelNotFound):
            client.ensure("az://models/none")


def test_large_blob_comes_in_parts(start_server: StartServer, azurite: Azurite, tmp_path: Path) -> None:
    large = pattern(40_000_003, 5)
    azurite.put("models/big/model.safetensors", large, x_ms_blob_type="BlockBlob")
    with ModelClient(start_server(**keys(azurite)).address) as client:
        client.ensure("az://models/big")
        client.fetch("az://models/big", tmp_path / "to")
    assert digest_of((tmp_path / "to" / "model.safetensors").read_bytes()) == digest_of(large)


def test_wrong_key_is_said_to_be_one(start_server: StartServer, azurite: Azurite) -> None:
    wrong = base64.b64encode(b"wrong" * 12).decode()
    with (
        ModelClient(start_server(**keys(azurite, wrong)).address) as client,
        pytest.raises(ModelDownloadError, match="credentials"),
    ):
        client.ensure("az://models/team/tiny")
