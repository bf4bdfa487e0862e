"""Complete is what has all that the provider lists, never what happens to lie in the folder (findings, A3)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mxbench.stand_ins.hub import HubStandIn
from mxserver.models.completeness import Missing, missing_files
from mxserver.wire import ModelDownloadError, ModelNotFound
from mxserver.wire.files import ModelClient
from tests.models.conftest import FILES, REPOSITORY, WEIGHTS, StartServer

SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def by_the_hubs_library(hub: HubStandIn, cache: Path, *left_out: str) -> None:
    program = (
        "import sys, huggingface_hub as h; h.snapshot_download(sys.argv[1], cache_dir=sys.argv[2], "
        "ignore_patterns=sys.argv[3:])"
    )
    subprocess.run(
        [sys.executable, "-c", program, REPOSITORY, str(cache), *left_out],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache.parent / "other")},
        check=True,
    )


def problems(client: ModelClient, name: str = REPOSITORY) -> dict[str, str]:
    return {verdict.relative_path: verdict.problem for verdict in client.validate(name) if verdict.problem}


def test_half_a_model_is_refused_offline_and_completed_online(
    start_server: StartServer, hub: HubStandIn, cache_folder: Path
) -> None:
    by_the_hubs_library(hub, cache_folder, SECOND)
    with ModelClient(start_server(HF_HUB_OFFLINE="1").address) as client:
        with pytest.raises(ModelDownloadError, match=f"lacks {SECOND}, and HF_HUB_OFFLINE is set"):
            client.ensure(REPOSITORY)
        client.ensure(REPOSITORY, ignore_weights=True)
    with ModelClient(start_server().address) as client:
        commit = client.ensure(REPOSITORY)
        assert {info.path for info in client.list_files(REPOSITORY, revision=commit).files} == set(FILES)
        assert not problems(client)
    assert hub.requests[f"GET {SECOND}"] == 1


def test_what_an_earlier_server_took_for_complete_is_found_out(
    start_server: StartServer, hub: HubStandIn, cache_folder: Path
) -> None:
    """A record without the list, of a folder in which a shard was missing: what 452726d wrote offline."""
    with ModelClient(start_server().address) as client:
        commit = client.ensure(REPOSITORY)
    (path,) = (cache_folder / ".modelexpress" / "records").iterdir()
    record = json.loads(path.read_text())
    del record["listed"]
    record["files"] = [file for file in record["files"] if file["path"] != SECOND]
    path.write_text(json.dumps(record))
    (cache_folder / "models--org--tiny-1.0" / "snapshots" / (commit or "") / SECOND).resolve().unlink()
    with ModelClient(start_server(HF_HUB_OFFLINE="1").address) as client:
        assert problems(client) == {SECOND: "is listed, and not in the cache: mx models get brings it"}
        with pytest.raises(ModelDownloadError, match=SECOND):
            client.ensure(REPOSITORY)
    with ModelClient(start_server().address) as client:
        client.ensure(REPOSITORY, revision=commit)
        assert not problems(client)


def test_what_is_no_weight_may_be_missing_and_is_named(
    start_server: StartServer, hub: HubStandIn, cache_folder: Path
) -> None:
    by_the_hubs_library(hub, cache_folder, "README.md")
    offline = start_server(HF_HUB_OFFLINE="1")
    with ModelClient(offline.address) as client:
        client.ensure(REPOSITORY)
        offline.wait_for("files=README.md")
    with ModelClient(start_server().address) as client:
        client.ensure(REPOSITORY)
        assert {info.path for info in client.list_files(REPOSITORY).files} == set(FILES)


def index_of(*files: str) -> bytes:
    return json.dumps({"weight_map": {str(number): file for number, file in enumerate(files)}}).encode()


@pytest.mark.parametrize("how", ["index", "numbers", "dangling link"])
def test_half_an_upload_is_refused_before_its_weights_are_copied(
    start_server: StartServer, tmp_path: Path, how: str
) -> None:
    """A folder's list is what lies there; what belongs to the model its index says, or the numbers of its shards."""
    source = tmp_path / "sources"
    source.mkdir()
    first, lacking = (
        ("a.safetensors", "b.safetensors") if how == "index" else ("model-00001-of-00002.safetensors", SECOND)
    )
    files = {"config.json": b"{}", first: b"1"}
    if how == "index":
        files[INDEX] = index_of(first, lacking)
    for name, data in files.items():
        (source / name).write_bytes(data)
    if how == "dangling link":
        (source / lacking).symlink_to(source / "lost")
    name = f"file://{source}"
    with ModelClient(start_server(MX_FILE_SOURCES=str(source)).address) as client:
        with pytest.raises(ModelDownloadError, match=f"{lacking}.*is the upload complete"):
            client.ensure(name)
        with pytest.raises(ModelNotFound):
            client.list_files(name)
        client.ensure(name, ignore_weights=True)
        (source / "lost" if how == "dangling link" else source / lacking).write_bytes(b"2")
        client.ensure(name)
        there = {info.path for info in client.list_files(name).files}
        assert {*files, lacking} <= there
        assert not problems(client, name)


@pytest.mark.parametrize(
    ("found", "listed", "missing"),
    [
        ({"a.safetensors": b"", INDEX: index_of("a.safetensors", "b.safetensors")}, None, ("b.safetensors",)),
        ({"model-00001-of-00002.safetensors": b""}, None, (SECOND,)),
        ({"model.safetensors": b"", "pytorch_model.bin.index.json": index_of("x.bin")}, None, ()),
        ({"model.safetensors": b""}, ["model.safetensors", "pytorch_model.bin"], ()),
        ({"config.json": b"{}"}, ["config.json", "a.safetensors", "b.bin"], ("a.safetensors",)),
        ({"config.json": b"{}"}, ["config.json", "m.gguf"], ("m.gguf",)),
        ({"config.json": b"{}"}, None, ()),
        (dict.fromkeys(FILES, b""), list(FILES), ()),
        ({"config.json": b"{}"}, [*FILES, INDEX], tuple(sorted(WEIGHTS))),
    ],
)
def test_what_an_engine_would_miss(found: dict[str, bytes], listed: list[str] | None, missing: tuple[str, ...]) -> None:
    told = missing_files(found, listed, found.__getitem__)
    others = set(listed or ()) - set(found) - set(missing)
    assert told == Missing(missing, tuple(sorted(others)))
