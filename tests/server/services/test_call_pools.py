"""Calls of one kind do not wait for those of another."""

from __future__ import annotations

import threading

import pytest

from mxserver.calls.pools import POOLS, pool_of
from mxserver.store import SqliteStore
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import cache_pb2, model_pb2, p2p_pb2

PUBLISHERS = POOLS["publishes"].threads
IDENTITY = p2p_pb2.SourceIdentity(mx_version="mx-1", model_name="m")
WORKER = p2p_pb2.WorkerMetadata()
READY = p2p_pb2.SOURCE_STATUS_READY


def test_heartbeats_and_listings_do_not_wait_for_the_disk(client: ServerClient, sqlite_store: SqliteStore) -> None:
    """The finding C3: more publishes than there are threads wait for a disk that does not answer."""
    published = client.publish(IDENTITY, WORKER, "w")
    client.update_status(published.mx_source_id, "w", 0, READY)
    held, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        held.set()
        assert go_on.wait(120)

    holder = threading.Thread(target=sqlite_store._change, args=(hold,))
    holder.start()
    assert held.wait(120)
    calls = [
        threading.Thread(target=lambda n=n: client.publish(IDENTITY, WORKER, f"w{n}")) for n in range(PUBLISHERS + 16)
    ]
    for call in calls:
        call.start()
    try:
        while sqlite_store._changes.qsize() < PUBLISHERS:
            holder.join(0.01)
        client.update_status(published.mx_source_id, "w", 0, READY)
        assert [reference.worker_id for reference in client.list_sources()] == ["w"]
        assert client.health().status
    finally:
        go_on.set()
        for call in (*calls, holder):
            call.join()


@pytest.mark.parametrize(
    ("service", "named"),
    [
        (p2p_pb2.DESCRIPTOR.services_by_name["P2pService"], {"heartbeats", "listings", "publishes", "records"}),
        (cache_pb2.DESCRIPTOR.services_by_name["CacheService"], {"validations", "models"}),
        (model_pb2.DESCRIPTOR.services_by_name["ModelService"], {"models"}),
    ],
    ids=["p2p", "cache", "models"],
)
def test_methods_are_where_they_should_be(service: object, named: set[str]) -> None:
    methods = {f"/{service.full_name}/{one.name}" for one in service.methods}  # type: ignore[attr-defined]
    assert {pool_of(method) for method in methods} == named
    known = {method for kind in POOLS.values() for method in kind.methods}
    assert {method for method in known if method.startswith(f"/{service.full_name}/")} <= methods  # type: ignore[attr-defined]
