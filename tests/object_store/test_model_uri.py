"""MX_MODEL_URI: what it may be, what it may not, and what has to be installed for it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from mxcore.errors import StorageError, StreamerMissing
from mxcore.storage.checkpoint import checkpoint_digest
from mxcore.storage.remote import (
    LocalFolder,
    ObjectFolder,
    listing_commit,
    missing_packages,
    open_remote,
    parse_model_uri,
    place_in_hub_cache,
    pull_small_files,
    remote_digest,
)
from mxcore.storage.remote.object_store import ObjectOptions
from mxcore.storage.remote.remote_folder import is_small
from mxserver.wire import SettingError, install_command
from tests.object_store.conftest import make_checkpoint


@pytest.mark.parametrize(
    ("text", "scheme", "bucket", "prefix"),
    [
        ("s3://bucket/a/b/", "s3", "bucket", "a/b"),
        ("gs://bucket", "gs", "bucket", ""),
        ("az://container/x", "az", "container", "x"),
        ("file:///models/a%20b", "file", "", "/models/a b"),
        ("/models/a", "file", "", "/models/a"),
    ],
)
def test_what_it_may_be(text: str, scheme: str, bucket: str, prefix: str) -> None:
    assert parse_model_uri(text)[:3] == (scheme, bucket, prefix)


@pytest.mark.parametrize(
    "text", ["models/a", "http://host/x", "s3://", "s3://a/../b", "file://host/x", "file:relative"]
)
def test_what_it_may_not_be(text: str) -> None:
    with pytest.raises(SettingError, match="MX_MODEL_URI"):
        parse_model_uri(text)


@pytest.mark.parametrize("text", ["s3://me:hush-hush@bucket/x", "s3://bucket/x?sig=hush-hush", "az://c/x#hush-hush"])
def test_credentials_in_it_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(SettingError, match="credentials go into") as caught:
        parse_model_uri(text)
    assert "hush-hush" not in str(caught.value)


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs"), ("az", "azure")])
def test_the_extra_is_named_where_packages_lack(scheme: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "runai" in name else find(name, *rest))
    uri = parse_model_uri(f"{scheme}://bucket/x")
    assert missing_packages(uri) == ""
    assert install_command(extra) in missing_packages(uri, streamer=True)
    with pytest.raises(StreamerMissing, match="runai_model_streamer"):
        ObjectFolder(uri, ObjectOptions("runai"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(StreamerMissing, match=f"obstore is not installed: {re.escape(install_command(extra))}"):
        ObjectFolder(uri)


def test_nothing_is_missing_for_a_folder() -> None:
    assert missing_packages(parse_model_uri("/models/a")) == ""


def test_a_local_folder_is_read_as_any_other(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model")
    folder = LocalFolder(tmp_path / "model")
    assert len(open_remote(folder)) == 8
    assert remote_digest(folder) == checkpoint_digest(
        sorted((tmp_path / "model").glob("*.safetensors")), tmp_path / "model" / "model.safetensors.index.json"
    )
    folder.check_unchanged()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(StorageError, match="has changed"):
        folder.check_unchanged()
    with pytest.raises(StorageError, match=r"none\.json"):
        folder.whole("none.json")
    with pytest.raises(StorageError, match="no such folder"):
        LocalFolder(tmp_path / "none")


@pytest.mark.parametrize(
    ("path", "small"),
    [
        ("config.json", True),
        ("tokenizer.model", True),
        ("modeling.py", True),
        ("a/b.SafeTensors", False),
        ("x.gguf", False),
    ],
)
def test_which_files_the_engine_wants_beside_the_weights(path: str, small: bool) -> None:
    assert is_small(path) is small


def test_the_hubs_library_finds_what_was_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    make_checkpoint(tmp_path / "model")
    folder = LocalFolder(tmp_path / "model")
    commit = listing_commit(folder.files)
    place = place_in_hub_cache(tmp_path / "cache", "org/name", commit, lambda to: pull_small_files(folder, to))

    def found(revision: str | None = None) -> Path:
        return Path(
            snapshot_download("org/name", revision=revision, cache_dir=tmp_path / "cache", local_files_only=True)
        )

    assert found() == place
    assert (place / "config.json").is_file()
    assert not list(place.rglob("*.safetensors*"))
    again = place_in_hub_cache(tmp_path / "cache", "org/name", commit, lambda to: pytest.fail("it is there"), ref="v2")
    assert again == place
    assert (
        Path(snapshot_download("org/name", revision="v2", cache_dir=tmp_path / "cache", local_files_only=True)) == place
    )


def test_a_failure_leaves_no_snapshot(tmp_path: Path) -> None:
    def fails(to: Path) -> None:
        (to / "config.json").write_text("{")
        raise StorageError("cut off")

    with pytest.raises(StorageError, match="cut off"):
        place_in_hub_cache(tmp_path, "org/name", "0" * 40, fails)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["../x", "a/b/c", "/etc", "a//b"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingError, match="no name of a model"):
        place_in_hub_cache(tmp_path, name, "0" * 40, lambda to: None)
