"""What is stored is bounded, and large metadata is not in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mxserver.limits import changed
from mxserver.store import Query, SourceStore, SqliteStore, StoreFull
from mxserver.store.stored_amount import LARGE_BYTES
from mxserver.wire.proto import p2p_pb2
from tests.server.stores import (
    COLLECT_SECONDS,
    HEARTBEAT_SECONDS,
    KINDS,
    READY,
    STALE,
    HandClock,
    StoreKind,
    key,
    publication,
)

Open = Callable[..., SourceStore]


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture(params=KINDS, ids=[kind.name for kind in KINDS])
def open_store(request: pytest.FixtureRequest, tmp_path: Path, clock: HandClock) -> Iterator[Open]:
    """Opens a store with these limits."""
    kind: StoreKind = request.param
    opened: list[SourceStore] = []

    def open_with(**limits: int) -> SourceStore:
        opened.append(kind.open(tmp_path, clock, changed(limits)))
        return opened[-1]

    yield open_with
    for store in opened:
        store.close()


def test_records_are_limited_and_what_is_there_goes_on(open_store: Open, clock: HandClock) -> None:
    store = open_store(records=3)
    for n in range(3):
        store.publish(publication(key(f"w{n}")))
    with pytest.raises(StoreFull, match="records=3, which MX_SERVER_LIMITS of the server raises"):
        store.publish(publication(key("w3")))
    store.publish(publication(key("w0"), status=READY))
    store.update_status(key("w1"), STALE)
    clock.advance(HEARTBEAT_SECONDS + COLLECT_SECONDS)
    store.sweep()
    store.publish(publication(key("w3")))
    assert [record.key.worker_id for record in store.find(Query())] == ["w3"]


def test_records_of_one_worker_are_limited(open_store: Open) -> None:
    store = open_store(records_per_worker=2)
    for rank in range(2):
        store.publish(publication(key("w", rank)))
    with pytest.raises(StoreFull, match="records_per_worker=2"):
        store.publish(publication(key("w", 2)))
    store.publish(publication(key("other", 2)))


def test_bytes_of_all_are_limited_and_come_back(open_store: Open, clock: HandClock) -> None:
    store = open_store(stored_bytes=100_000)
    for n in range(4):
        store.publish(publication(key(f"w{n}"), nixl_metadata=bytes(24_000)))
    with pytest.raises(StoreFull, match="stored_bytes=100000"):
        store.publish(publication(key("w4"), nixl_metadata=bytes(24_000)))
    with pytest.raises(StoreFull, match="stored_bytes=100000"):
        store.publish(publication(key("w3"), nixl_metadata=bytes(48_000)))
    store.publish(publication(key("w3"), nixl_metadata=b"small"))
    store.publish(publication(key("w4"), nixl_metadata=bytes(20_000)))
    clock.advance(HEARTBEAT_SECONDS + COLLECT_SECONDS)
    store.sweep()
    for n in range(4):
        store.publish(publication(key(f"v{n}"), nixl_metadata=bytes(24_000)))


def test_many_in_one_commit_are_limited_too(tmp_path: Path) -> None:
    """The SQLite store decides the publishes that wait one on top of the other."""
    store = SqliteStore(tmp_path / "s.sqlite3", limits=changed({"records": 2}))
    try:
        assert store._change(lambda batch: [_try(batch.publish, n) for n in range(4)]) == [True, True, False, False]
    finally:
        store.close()


def _try(publish: Callable[..., object], n: int) -> bool:
    try:
        publish(publication(key(f"w{n}")))
    except StoreFull:
        return False
    return True


def test_large_metadata_is_whole_where_one_asks_for_it(open_store: Open) -> None:
    store = open_store()
    blob = bytes(range(256)) * (LARGE_BYTES // 128)
    published = publication(nixl_metadata=blob)
    store.publish(published)
    store.update_status(key(), READY)
    record = store.get(*key()[:2])
    assert record is not None
    whole = store.whole_worker(record)
    assert whole is not None
    assert p2p_pb2.WorkerMetadata.FromString(whole).nixl_metadata == blob
    assert (record.status, record.accelerator) == (READY, "cuda")
    assert record.payload_bytes == len(published.identity) + len(published.worker)
    store.publish(publication(nixl_metadata=blob))
    if record.worker_is_cut:
        assert store.whole_worker(record) is None  # it has changed


def test_large_metadata_is_in_the_file_alone(tmp_path: Path) -> None:
    """Also after a restart: a store that did not fit into memory could not be started again."""
    path = tmp_path / "s.sqlite3"
    store = SqliteStore(path)
    published = publication(nixl_metadata=bytes(1_000_000))
    store.publish(published)
    for again in (store, None):
        if again is None:
            store.close()
            store = SqliteStore(path)
        [found] = store.find(Query())
        assert found.worker_is_cut
        assert len(found.worker) < 100
        assert found.payload_bytes > 1_000_000
        assert dict(found.topology) == {"zone": "a"}
        assert store._index.amount().payload_bytes == found.payload_bytes
        assert store.whole_worker(found) == published.worker
    store.close()
