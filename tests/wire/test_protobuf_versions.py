"""The stubs and the client under the oldest and the newest protobuf and grpcio that images carry."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxserver.server import Server
from mxserver.settings import load_settings
from tests.installs import installed

ROOT = Path(__file__).resolve().parents[2]

ROUND_TRIP = """
import sys
import google.protobuf, grpc
from mxserver.wire.proto import api_pb2, health_pb2, model_pb2, mx_pb2, p2p_pb2
from mxserver.wire.proto import api_pb2_grpc, health_pb2_grpc, model_pb2_grpc, mx_pb2_grpc, p2p_pb2_grpc
from mxserver.wire.calls.client import ServerClient
from mxserver.wire.errors import StaleEpoch
from mxserver.wire.calls.source_ids import source_id

address, protobuf, grpcio = sys.argv[1:]
assert (google.protobuf.__version__, grpc.__version__) == (protobuf, grpcio)
identity = p2p_pb2.SourceIdentity(model_name=protobuf, extra_parameters={"Layout": "RAW"})
worker = p2p_pb2.WorkerMetadata(worker_rank=1, nixl_metadata=b"agent", topology={"zone": "a"})
with ServerClient(address) as client:
    published = client.publish(identity, worker, "w")
    assert published.mx_source_id == source_id(identity)
    newer = client.publish(identity, worker, "w")  # a new life
    ready = p2p_pb2.SOURCE_STATUS_READY
    client.update_status(published.mx_source_id, "w", 1, ready, epoch=newer.epoch, source_load=0.5)
    try:
        client.update_status(published.mx_source_id, "w", 1, ready, epoch=published.epoch)
    except StaleEpoch:
        pass
    else:
        raise SystemExit("the old epoch was taken")
    [reference] = client.list_sources(identity, status=p2p_pb2.SOURCE_STATUS_READY)
    assert (reference.source_load, dict(reference.topology)) == (0.5, {"zone": "a"})
    found = client.get_metadata(reference.mx_source_id, reference.worker_id)
    assert found.identity == identity and found.worker.nixl_metadata == b"agent" and found.epoch == newer.epoch
    assert client.health().status == "ok"
assert not {"torch", "pydantic"} & set(sys.modules)
"""


@pytest.fixture
def address() -> Iterator[str]:
    server = Server(load_settings({"host": "127.0.0.1", "port": "0", "store": "memory"}))
    yield f"127.0.0.1:{server.port}"
    server.close()


@pytest.mark.parametrize(("protobuf", "grpcio"), [("5.29.6", "1.66.2"), ("7.36.2", "1.85.1")])
def test_client_and_stubs_work_without_warnings(address: str, protobuf: str, grpcio: str) -> None:
    """`-S` leaves our environment's packages out: nothing but these two and the standard library is there."""
    path = installed(f"protobuf-{protobuf}", f"protobuf=={protobuf}", f"grpcio=={grpcio}")
    done = subprocess.run(
        [sys.executable, "-S", "-W", "error", "-c", ROUND_TRIP, address, protobuf, grpcio],
        env={"PYTHONPATH": f"{path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
