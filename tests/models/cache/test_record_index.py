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


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were parsed."""
    texts: list[str] = []
    real = record_index.record_from_json

    def counted(text: str) -> ModelRecord:
        texts.append(text)
        return real(text)

    monkeypatch.setattr(record_index, "record_from_json", counted)
    return texts


def test_records_are_parsed_once_and_again_when_they_change(cache: ModelCache, parsed: list[str]) -> None:
    for n in range(20):
        cache.layout.record(record(n).key).write_text(record(n).to_json())
    for _ in range(5):
        assert cache.room().used_bytes == 20 * 300
        assert len(cache.records()) == 20
        assert cache.enforce_limits() == 0
        assert len(cache._candidates()) == 20
    assert len(parsed) == 20
    cache.publish_record(record(3, 200), cache.layout.staging)
    cache.layout.record(record(4).key).unlink()
    assert cache.room().used_bytes == 18 * 300 + 600
    assert len(parsed) == 21


def test_a_use_costs_no_parsing(cache: ModelCache, parsed: list[str]) -> None:
    """Else a call for each of 10,000 files would parse 10,000 names."""
    one = record(1)
    cache.layout.record(one.key).write_text(one.to_json())
    for _ in range(10):
        with cache.reading(one.key.model, one.key.revision) as found:
            assert found == one
    assert len(parsed) == 1
    cache.publish_record(record(1, 200), cache.layout.staging)
    with cache.reading(one.key.model, one.key.revision) as found:
        assert found == record(1, 200)
    assert cache.room().used_bytes == 600


def test_record_of_another_model_is_none(cache: ModelCache) -> None:
    cache.layout.record(record(1).key).write_text(record(2).to_json())
    assert cache.record(record(1).key) is None
    assert cache.record(record(3).key) is None


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
