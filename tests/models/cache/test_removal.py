"""A removal takes what the record lists out of the model's own folder, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxserver.models import FileRecord, ModelKey, ModelRecord, model_name
from mxserver.models.cache import Limits, ModelCache
from mxserver.models.errors import ModelNotCached
from mxserver.wire.proto import model_pb2

COMMIT = "a" * 40
KEY = ModelKey(model_name(model_pb2.HUGGING_FACE, "org/model"), COMMIT)
CONFIG = FileRecord("config.json", 2, "xxh3-64:0", "models--org--model/blobs/b1")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ModelCache]:
    opened = ModelCache(tmp_path / "cache", Limits(), lease_seconds=60)
    yield opened
    opened.close()


def put(cache: ModelCache, *files: FileRecord, links: bool = True) -> ModelRecord:
    """A model as a download leaves it."""
    for file in files:
        place = cache.layout.root / file.place
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("{}")
        if links:
            cache.layout.link(KEY, file.path, file.place, cache.layout.staging)
    cache.layout.write_ref(KEY.model, "main", COMMIT, cache.layout.staging)
    record = ModelRecord(KEY, files, True, 0)
    cache.publish_record(record, cache.layout.staging)
    return record


def test_all_of_it_goes(cache: ModelCache) -> None:
    put(cache, CONFIG, dataclasses.replace(CONFIG, path="a/b/c.json", place="models--org--model/blobs/b2"))
    assert cache.remove(KEY) == 4
    assert not cache.layout.model_folder(KEY.model).exists()


@pytest.mark.parametrize("revision", ["../../../precious", "..", "a/b", "", "/precious"])
def test_record_whose_revision_leads_out_is_no_model(cache: ModelCache, tmp_path: Path, revision: str) -> None:
    precious = tmp_path / "precious" / "data.txt"
    precious.parent.mkdir()
    precious.write_text("not the cache's")
    (cache.layout.model_folder(KEY.model) / "snapshots").mkdir(parents=True)
    key = ModelKey(KEY.model, revision)
    fields = json.loads(ModelRecord(KEY, (), True, 0).to_json()) | {"revision": revision}
    cache.layout.record(key).write_text(json.dumps(fields))
    assert cache.records() == []
    with pytest.raises(ModelNotCached):
        cache.remove(key)
    assert precious.read_text() == "not the cache's"


@pytest.mark.parametrize("place", [".modelexpress/records/other.json", "models--org--other/blobs/b1", "notes.txt"])
def test_place_outside_of_the_models_folder_stays(cache: ModelCache, place: str) -> None:
    put(cache, dataclasses.replace(CONFIG, place=place), links=False)
    cache.remove(KEY)
    assert (cache.layout.root / place).exists()


def test_what_others_put_beside_it_stays(cache: ModelCache) -> None:
    """As `hf download` of the same revision into the same folder."""
    put(cache, CONFIG)
    theirs = dataclasses.replace(CONFIG, path="model.safetensors", place="models--org--model/blobs/theirs")
    (cache.layout.root / theirs.place).write_text("weights")
    cache.layout.link(KEY, theirs.path, theirs.place, cache.layout.staging)
    own = cache.layout.snapshot(KEY) / "notes.md"
    own.write_text("written by hand")
    cache.remove(KEY)
    assert (cache.layout.snapshot(KEY) / theirs.path).read_text() == "weights"
    assert own.exists()
    assert cache.layout.read_ref(KEY.model, "main") == COMMIT
    assert not (cache.layout.snapshot(KEY) / CONFIG.path).is_symlink()
    assert not (cache.layout.root / CONFIG.place).exists()


def test_link_that_somebody_led_elsewhere_stays(cache: ModelCache, tmp_path: Path) -> None:
    put(cache, CONFIG)
    name = cache.layout.snapshot(KEY) / CONFIG.path
    name.unlink()
    name.symlink_to(tmp_path)
    cache.remove(KEY)
    assert name.is_symlink()


def test_link_on_the_way_is_not_followed(cache: ModelCache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(cache, CONFIG)
    elsewhere = tmp_path / "elsewhere"
    blobs = cache.layout.model_folder(KEY.model) / "blobs"
    blobs.rename(elsewhere)
    blobs.symlink_to(elsewhere)
    cache.remove(KEY)
    assert (elsewhere / "b1").exists()
    assert "left where it is" in caplog.text
