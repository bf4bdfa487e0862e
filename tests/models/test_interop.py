"""The model client of the PyPI package `modelexpress`, unchanged, against our server, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mxbench.stand_ins.hub import HubStandIn
from mxserver.wire.files import ModelClient
from tests.installs import installed
from tests.models.conftest import FILE_DIGESTS, FILES, REPOSITORY, WEIGHTS, StartServer, files_below

THEIR_CLIENT = """
import sys
from modelexpress.model_client import ModelCacheClient

address, cache, model, commit = sys.argv[1:]
client = ModelCacheClient(server_url=address, cache_directory=cache)
assert client.ensure_downloaded(model, ignore_weights=True) == commit
light = client.list_files(model, ignore_weights=True)
snapshot = client.install_metadata_snapshot(model, requested_revision="main")
print(snapshot)
assert client.ensure_downloaded(model, revision=commit) == commit
files = client.list_files(model, revision=commit)
assert set(light) < set(files), (light, files)
client.install_weight_files(model, snapshot)
client.close()
print(sorted(files.items()))
"""

OFFLINE = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], cache_dir=sys.argv[2]))"

THEIR_P2P_CLIENT = """
import sys
from modelexpress import p2p_pb2
from modelexpress.client import MxClient

client = MxClient(server_url=sys.argv[1])
assert len(client.list_sources().instances) == 0
client.close()
"""


@pytest.fixture(scope="module", params=["0.7.0", "0.8.0.dev20261026"])
def modelexpress(request: pytest.FixtureRequest) -> Path:
    """The newest release, and one before the next. torch and huggingface_hub, which both import, are in ours."""
    version = request.param
    return installed(f"modelexpress-{version}", f"modelexpress=={version}", "google-crc32c", dependencies=False)


def run(program: str, *arguments: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_their_client_lists_streams_and_loads_offline(
    start_server: StartServer, hub: HubStandIn, modelexpress: Path, tmp_path: Path
) -> None:
    address = start_server().address
    commit = hub.repositories[REPOSITORY].refs["main"]
    cache = tmp_path / "theirs"
    printed = run(THEIR_CLIENT, address, str(cache), REPOSITORY, commit, PYTHONPATH=str(modelexpress)).splitlines()
    assert Path(printed[0]).name == commit
    assert eval(printed[1]) == sorted((path, len(data)) for path, data in FILES.items())  # noqa: S307 - our own text
    loaded = run(OFFLINE, REPOSITORY, str(cache), HF_HUB_OFFLINE="1").strip()
    assert files_below(Path(loaded)) == FILE_DIGESTS
    assert set(files_below(Path(loaded))) >= WEIGHTS


def test_both_of_their_clients_on_one_server(start_server: StartServer, modelexpress: Path) -> None:
    address = start_server().address
    run(THEIR_P2P_CLIENT, address, PYTHONPATH=str(modelexpress))
    with ModelClient(address) as client:
        assert client.ensure(REPOSITORY)
