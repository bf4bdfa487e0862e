"""The cache's records are read once, not at every scrape, listing and round of eviction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mxserver.models.cache import Limits, ModelCache, record_index
from mxserver.models.names import ModelKey, ModelName
from mxserver.models.record import FileRecord, ModelRecord
from mxserver.wire.proto import model_pb2


def record(n: int, size: int = 100) -> ModelRecord:
    key = ModelKey(ModelName(model_pb2.HUGGING_FACE, f"org/m{n}"), f"{n:040x}")
    files = tuple(FileRecord(f"f{i}", size, "xxh3-64:0", f"models--org--m{n}/blobs/{i}") for i in range(3))
    return ModelRecord(key, files, has_weights=True, created_ms=0)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ModelCache]:
    opened = ModelCache(tmp_path, Limits())
    yield opened
    opened.close()


def test_records_are_read_once_and_again_when_they_change(cache: ModelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_record = record_index.read_record

    def counted(path: Path) -> ModelRecord | None:
        read.append(path.name)
        return read_record(path)

    monkeypatch.setattr(record_index, "read_record", counted)
    for n in range(20):
        cache.layout.record(record(n).key).write_text(record(n).to_json())
    for _ in range(5):
        assert cache.room().used_bytes == 20 * 300
        assert len(cache.records()) == 20
        assert cache.enforce_limits() == 0
        assert len(cache._candidates()) == 20
    assert len(read) == 20
    cache.publish_record(record(3, 200), cache.layout.staging)
    cache.layout.record(record(4).key).unlink()
    assert cache.room().used_bytes == 18 * 300 + 600
    assert len(read) == 21


def test_damaged_record_is_told_once(cache: ModelCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.layout.record(record(1).key).write_text("{")
    for _ in range(3):
        assert cache.records() == []
    assert caplog.text.count("record is ignored") == 1


def test_models_that_are_leased_or_read_are_no_candidates(cache: ModelCache) -> None:
    for n in range(3):
        cache.layout.record(record(n).key).write_text(record(n).to_json())
    lease = cache.leases.try_acquire(record(0).key.id)
    assert lease is not None
    with cache.leases.in_use(record(1).key.id):
        assert [one.key for one in cache._candidates()] == [record(2).key]
    cache.leases.release(lease)
    assert len(cache._candidates()) == 3
