"""The client of the PyPI package `modelexpress` against our server, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mxserver.wire.calls import ServerClient
from tests.installs import installed
from tests.server.conftest import ROOT, ServerProcess
from tests.server.stores import READY


@pytest.fixture(scope="module", params=["0.7.0", "0.8.0.dev20261026"])
def modelexpress(request: pytest.FixtureRequest) -> Path:
    """The newest release, and one before the next. torch and huggingface_hub, which both import, are in ours."""
    version = request.param
    return installed(f"modelexpress-{version}", f"modelexpress=={version}", "google-crc32c", dependencies=False)


def run(program: str, *arguments: str, path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": f"{path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


LIFE_OF_THEIR_CLIENT = """
import sys
from modelexpress import p2p_pb2
from modelexpress.client import MxClient

client = MxClient(server_url=sys.argv[1])
identity = p2p_pb2.SourceIdentity(
    mx_version="0.5.0", model_name="deepseek-ai/DeepSeek-V3", backend_framework=1,
    tensor_parallel_size=8, pipeline_parallel_size=1, dtype="bfloat16",
)
tensors = [
    p2p_pb2.TensorDescriptor(name=f"t{n}", addr=n, size=8, device_id=2, dtype="torch.bfloat16") for n in range(9)
]
worker = p2p_pb2.WorkerMetadata(
    worker_rank=2, nixl_metadata=b"agent", tensors=tensors, metadata_endpoint="10.0.0.1:5557",
    agent_name="a", worker_grpc_endpoint="10.0.0.1:6557", accelerator="cuda",
)
worker.tensor_source.tensors.extend(tensors)
READY, INITIALIZING = p2p_pb2.SOURCE_STATUS_READY, p2p_pb2.SOURCE_STATUS_INITIALIZING

assert len(client.list_sources(identity).instances) == 0
assert client.get_metadata("f" * 16, "w").found is False
assert not client.update_status("f" * 16, "w", 2, READY)

source = client.publish_metadata(identity, worker, "w")
assert source == "5a5f555570065064", source
assert len(client.list_sources(identity, READY).instances) == 0
assert client.update_status(source, "w", 2, READY)
assert client.publish_metadata(identity, worker, "w") == source
for filters in ((), (identity,), (None, READY), (identity, READY)):
    [found] = client.list_sources(*filters).instances
    assert (found.mx_source_id, found.worker_id, found.worker_rank) == (source, "w", 2), found
    assert (found.model_name, found.accelerator) == ("deepseek-ai/DeepSeek-V3", "cuda")
assert len(client.list_sources(identity, INITIALIZING).instances) == 0

response = client.get_metadata(source, "w")
assert response.found and response.identity == identity and response.worker.status == READY
assert list(response.worker.tensors) == tensors and list(response.worker.tensor_source.tensors) == tensors
assert response.worker.nixl_metadata == b"agent" and response.worker.updated_at > 1_600_000_000_000
assert client.update_status(source, "w", 2, READY, source_load=0.5)
assert client.list_sources(identity, READY).instances[0].source_load == 0.5

# As large as they come: 60,000 tensors, written twice, and a blob of 20 MiB.
many = [
    p2p_pb2.TensorDescriptor(
        name=f"model.layers.{n % 61}.mlp.experts.{n // 61}.gate_up_proj.weight", addr=n, size=2**21, dtype="torch.int8"
    )
    for n in range(60_000)
]
large = p2p_pb2.WorkerMetadata(worker_rank=2, nixl_metadata=bytes(20 * 2**20), tensors=many)
large.tensor_source.tensors.extend(many)
assert client.publish_metadata(identity, large, "large") == source
response = client.get_metadata(source, "large")
assert response.found
response.worker.status, response.worker.updated_at = 0, 0
assert response.worker == large
client.close()
"""


@pytest.mark.parametrize("store", ["sqlite", "memory"])
def test_their_client_publishes_lists_gets_and_updates(
    start_server: Callable[..., ServerProcess], modelexpress: Path, store: str
) -> None:
    server = start_server("--store", store)
    run(LIFE_OF_THEIR_CLIENT, server.address, path=modelexpress)
    with ServerClient(server.address) as ours:
        [reference] = ours.list_sources(status=READY)
        assert reference.worker_id == "w"
        record = ours.get_metadata(reference.mx_source_id, "w")
        assert record is not None
        assert record.worker.metadata_endpoint == "10.0.0.1:5557"


BOTH_IN_ONE_PROCESS = """
import sys
from modelexpress import p2p_pb2 as theirs
from mxserver.wire.proto import p2p_pb2 as ours
from mxserver.wire.calls.client import ServerClient
from modelexpress.client import MxClient

assert theirs.SourceIdentity is not ours.SourceIdentity
their_client = MxClient(server_url=sys.argv[1])
source = their_client.publish_metadata(theirs.SourceIdentity(model_name="m"), theirs.WorkerMetadata(), "theirs")
with ServerClient(sys.argv[1]) as our_client:
    assert our_client.publish(ours.SourceIdentity(model_name="m"), ours.WorkerMetadata(), "ours").mx_source_id == source
    assert {r.worker_id for r in our_client.list_sources()} == {"theirs", "ours"}
assert {r.worker_id for r in their_client.list_sources().instances} == {"theirs", "ours"}
their_client.close()
"""


def test_both_clients_live_in_one_process(start_server: Callable[..., ServerProcess], modelexpress: Path) -> None:
    """As in an image that carries both packages: the same message names, in descriptor pools of their own."""
    run(BOTH_IN_ONE_PROCESS, start_server().address, path=modelexpress)
