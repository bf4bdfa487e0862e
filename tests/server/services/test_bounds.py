"""Answers are bounded for those who cannot ask for a part, and refusals name their limit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mxserver.server import Server
from mxserver.settings import load_settings
from mxserver.wire import ServerRefused
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2
from tests.server.stores import READY

LIMITS = "listing_rows=20,listing_bytes=16KiB,records=30"


@pytest.fixture(scope="module")
def client() -> Iterator[ServerClient]:
    server = Server(load_settings({"host": "127.0.0.1", "port": "0", "store": "memory", "limits": LIMITS}))
    try:
        with ServerClient(f"127.0.0.1:{server.port}") as opened:
            yield opened
    finally:
        server.close()


def publish(client: ServerClient, model: str, worker: str, **topology: str) -> None:
    identity = p2p_pb2.SourceIdentity(model_name=model)
    source = client.publish(identity, p2p_pb2.WorkerMetadata(topology=topology), worker).mx_source_id
    client.update_status(source, worker, 0, READY)


def test_listings_and_records_are_bounded(client: ServerClient) -> None:
    """Eight records with long names broke every listing without a filter (proofs/server/p19.py)."""
    for n in range(25):
        publish(client, "m", f"w{n}")
    assert len(client.list_sources()) == 20
    assert len(client.list_sources(status=READY, limit=1000)) == 20
    assert len(client.list_sources(limit=3)) == 3
    for n in range(4):
        publish(client, "large", f"w{n}", place="x" * 6000)
    rows = client.list_sources()
    assert 0 < sum(row.ByteSize() for row in rows) <= 16 * 1024
    assert len(client.list_sources(status=READY, limit=2)) == 2
    publish(client, "m", "last")
    with pytest.raises(ServerRefused, match=r"RESOURCE_EXHAUSTED.*records=30, which MX_SERVER_LIMITS"):
        publish(client, "m", "one too many")
    publish(client, "m", "last")
