"""Real engines whose weights come from an S3 server and from the server's cache: the same answers every time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mxbench.demo import models
from mxbench.demo.models import weight_files
from mxbench.stand_ins.hub import hub_stand_in
from mxbench.stand_ins.s3_server import SECRET, S3Server, environment
from mxbench.stand_ins.tcp_proxy import TcpProxy
from mxserver.wire.files import ModelClient
from tests.server.conftest import ServerProcess
from tests.small_disk import SmallDisk
from tests.vllm.conftest import LLAMA, References
from tests.vllm.engines import EngineHost

URI = "s3://models/llama"


@pytest.fixture(scope="module")
def bucket(model_paths: dict[str, Path], folder: Path) -> Path:
    """The folder of buckets: a model in one file, and one in shards; a test changes an object and puts it back."""
    root = folder / "s3"
    for name in ("llama", "qwen3"):
        shutil.copytree(model_paths[name], root / "models" / name)
        (root / "models" / name / "ready").unlink()
    return root


@pytest.fixture(scope="module")
def s3(bucket: Path) -> Iterator[S3Server]:
    with S3Server(bucket) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(s3: S3Server) -> Iterator[TcpProxy]:
    with TcpProxy(s3.address) as running:
        yield running


@pytest.fixture(scope="module")
def _stored_host(folder: Path, server: str, proxy: TcpProxy) -> Iterator[EngineHost]:
    home = {"HF_HOME": str(folder / "hf-home"), **environment(proxy.address)}
    host = EngineHost("stored", folder, server, home)
    yield host
    host.close()


@pytest.fixture
def stored(_stored_host: EngineHost) -> Iterator[EngineHost]:
    """The process of workers that reach the store; what they serve ends with the test."""
    yield _stored_host
    _stored_host.ask("leave")


@pytest.fixture(scope="module")
def without_weights(model_paths: dict[str, Path], folder: Path) -> Path:
    """Configuration and tokenizer alone."""
    small = folder / "models" / "llama-small"
    shutil.copytree(model_paths["llama"], small, ignore=lambda path, names: [n for n in names if ".safetensors" in n])
    return small


@pytest.fixture(scope="module")
def filled(model_paths: dict[str, Path], folder: Path) -> Iterator[ServerProcess]:
    """A server whose cache has two models of a hub that is gone."""
    with hub_stand_in() as hub:
        for name in ("llama", "qwen3", "full-disk"):
            path_of = model_paths["llama" if name == "full-disk" else name]
            files = {path.name: path.read_bytes() for path in path_of.iterdir() if path.name != "ready"}
            hub.add(f"org/{name}", files)
        environ = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "server-hf-home"),
            "HF_HUB_OFFLINE": "0",
            "MODEL_EXPRESS_CACHE_DIRECTORY": str(folder / "server-cache"),
            "MX_METADATA_BACKEND": "memory",
        }
        server = ServerProcess("--port", "0", environ=environ)
        with ModelClient(server.address) as client:
            client.ensure("org/llama")
            client.ensure("org/qwen3")
            client.ensure("org/full-disk")
    yield server
    server.close()


def outcomes(report: dict[str, Any]) -> dict[str, str]:
    return {step["rung"]: step["outcome"] for step in report["paths"]}


def test_from_s3_and_the_next_one_from_that_worker_with_s3_gone(
    stored: EngineHost,
    target: EngineHost,
    references: References,
    model_paths: dict[str, Path],
    without_weights: Path,
    s3: S3Server,
    folder: Path,
) -> None:
    expected = references.of(model_paths["llama"])
    first = stored.load(without_weights, extra={"model_uri": URI})
    s3.close()
    try:
        second = target.load(without_weights, extra={"model_uri": URI})
    finally:
        s3.start()

    assert first.answers == second.answers == expected
    assert (first.report["path"], first.report["serving"], first.report["fallbacks"]) == ("uri", True, [])
    assert outcomes(first.report) == {"p2p": "skipped", "fleet": "skipped", "uri": "loaded"}
    assert f"load path uri (MX_MODEL_URI): taken: {URI}" in first.log
    assert first.report["bytes"] > 0
    assert second.report["path"] == "p2p"
    assert second.report["source_worker"] == first.report["worker_id"]
    written = [*(folder.glob("*.log")), *folder.glob("*.json"), *folder.glob("server.sqlite3*")]
    written += [path for path in (folder / "logs").rglob("*") if path.is_file()]
    assert any(path.name == "server.sqlite3" for path in written)
    assert not [path.name for path in written if SECRET.encode() in path.read_bytes()]


def test_the_model_itself_is_a_uri(stored: EngineHost, references: References, model_paths: dict[str, Path]) -> None:
    """vLLM refuses a model in a bucket for formats that it does not know: it finds a folder, and we the bucket."""
    loaded = stored.load(URI, extra={"server_address": None})
    assert loaded.answers == references.of(model_paths["llama"])
    assert (loaded.report["path"], loaded.report["serving"]) == ("uri", False)
    assert loaded.report["bytes"] > 0


def test_ranks_of_one_engine_share_what_they_read(
    stored: EngineHost, bucket: Path, proxy: TcpProxy, folder: Path
) -> None:
    """Tensor parallelism over two processes: the store gives the weights about once, and both ranks have them."""
    wide = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3}
    model = models.generate(folder / "models" / "llama-wide", "llama", wide, seed=3)
    shutil.copytree(model, bucket / "models" / "llama-wide")
    weight_bytes = sum(path.stat().st_size for path in weight_files(model))
    expected = stored.load(model, "auto", tensor_parallel_size=2).answers
    before = proxy.answered_bytes
    extra = {"server_address": None, "model_uri": "s3://models/llama-wide", "load_paths": "uri"}
    loaded = stored.load(model, extra=extra, tensor_parallel_size=2)
    fetched_bytes = proxy.answered_bytes - before

    assert loaded.answers == expected
    assert [report["path"] for report in loaded.ranks(2)] == ["uri", "uri"]
    assert 20e6 < weight_bytes <= fetched_bytes < 1.5 * weight_bytes  # headers and samples are read by each rank


def test_a_name_of_the_hub_with_the_files_of_the_store(
    stored: EngineHost, references: References, model_paths: dict[str, Path], folder: Path
) -> None:
    """Offline, and with a hub's cache that has nothing: configuration and tokenizer come from the bucket."""
    stored.ask("setenv", environ={"MX_MODEL_URI": URI})
    try:
        loaded = stored.load("org/from-the-store")
    finally:
        stored.ask("setenv", environ={"MX_MODEL_URI": None})
    assert loaded.answers == references.of(model_paths["llama"])
    assert loaded.report["path"] == "uri"
    assert not list((folder / "hf-home").rglob("*.safetensors"))


def test_where_vllm_forks_its_engine(
    stored: EngineHost,
    references: References,
    model_paths: dict[str, Path],
    folder: Path,
    server: str,
    proxy: TcpProxy,
) -> None:
    """As source and as target. Finding A5: a store's client, used before the fork, hung after it for ever."""
    environ = {"HF_HOME": str(folder / "hf-forking"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "MX_MODEL_URI": URI}
    forking = EngineHost("forking", folder, server, {**environment(proxy.address), **environ})
    forking.ask("fork_workers")
    stored.ask("setenv", environ={"MX_MODEL_URI": URI})
    try:
        first = forking.load("org/forked", keep=True)
        second = stored.load("org/forked")
        third = forking.load("org/forked")
    finally:
        stored.ask("setenv", environ={"MX_MODEL_URI": None})
        forking.close()
    assert first.answers == second.answers == third.answers == references.of(model_paths["llama"])
    assert [loaded.report["path"] for loaded in (first, second, third)] == ["uri", "p2p", "p2p"]
    assert second.report["source_worker"] == first.report["worker_id"]
    assert third.report["source_worker"] == second.report["worker_id"]


def test_an_object_truncated_in_the_middle_of_a_load_leaves_nothing_behind(
    stored: EngineHost, references: References, model_paths: dict[str, Path], bucket: Path, proxy: TcpProxy
) -> None:
    """Shards before it are in the model already; the next rung's answers are right all the same."""
    shards = [path for path in weight_files(bucket / "models" / "qwen3") if path.suffix == ".safetensors"]
    last, whole = shards[-1], shards[-1].read_bytes()
    assert len(shards) > 3
    total = sum(path.stat().st_size for path in shards)

    def truncate() -> None:
        with last.open("r+b") as file:
            file.truncate(len(whole) // 2)

    proxy.cut_after(total // 2, meanwhile=truncate)
    try:
        loaded = stored.load(model_paths["qwen3"], extra={"model_uri": "s3://models/qwen3"})
    finally:
        last.write_bytes(whole)

    assert proxy.cuts == 1
    assert loaded.answers == references.of(model_paths["qwen3"])
    assert loaded.report["path"] == "storage"
    assert outcomes(loaded.report)["uri"] == "failed"
    (fallback,) = loaded.report["fallbacks"]
    assert f"key 'qwen3/{last.name}'" in fallback
    assert "MX_OBJECT_TRUNCATED" in fallback
    assert loaded.report["serving"]


@pytest.mark.parametrize("cached", ["1", "0"])
def test_from_the_servers_cache_with_no_hub_and_no_shared_storage(
    cached: str,
    stored: EngineHost,
    filled: ServerProcess,
    references: References,
    model_paths: dict[str, Path],
    folder: Path,
) -> None:
    """Configuration and tokenizer first, into the hub's cache; weights there as well, or straight into the model."""
    name = "qwen3" if cached == "1" else "llama"
    environ = {
        "MODEL_EXPRESS_URL": filled.address,
        "MODEL_EXPRESS_NO_SHARED_STORAGE": "1",
        "MX_CACHE_WEIGHTS": cached,
    }
    stored.ask("setenv", environ=environ)
    try:
        loaded = stored.load(f"org/{name}", extra={"server_address": filled.address})
    finally:
        stored.ask("setenv", environ=dict.fromkeys(environ))

    assert loaded.answers == references.of(model_paths[name])
    assert (loaded.report["path"], loaded.report["fallbacks"]) == ("cache", [])
    assert outcomes(loaded.report)["cache"] == "loaded"
    assert loaded.report["serving"]
    here = folder / "hf-home" / "hub" / f"models--org--{name}"
    assert list(here.rglob("config.json"))
    assert bool(list(here.rglob("*.safetensors"))) == (cached == "1")


def test_reload_weights_takes_them_from_the_servers_cache_again(
    stored: EngineHost, filled: ServerProcess, references: References, model_paths: dict[str, Path]
) -> None:
    environ = {
        "MODEL_EXPRESS_URL": filled.address,
        "MODEL_EXPRESS_NO_SHARED_STORAGE": "1",
        "MX_CACHE_WEIGHTS": "0",
    }
    stored.ask("setenv", environ=environ)
    try:
        extra = {"server_address": filled.address, "load_paths": "cache"}
        loaded = stored.load("org/llama", extra=extra, keep=True)
        stored.ask("reload")
        answers = stored.ask("answers")["answers"]
    finally:
        stored.ask("end")
        stored.ask("setenv", environ=dict.fromkeys(environ))
    report = json.loads(Path(f"{loaded.report_path}.update").read_text())
    assert (report["path"], report["fallbacks"]) == ("cache", [])
    assert answers == loaded.answers == references.of(model_paths["llama"])


def test_a_worker_whose_disk_is_full_or_read_only_streams_past_it_and_the_next_one_with_room_does_not(
    stored: EngineHost,
    filled: ServerProcess,
    references: References,
    model_paths: dict[str, Path],
    folder: Path,
) -> None:
    """A worker that went on without its disk leaves no weights there; a later load puts them there after all."""
    here = folder / "hf-home" / "hub" / "models--org--full-disk"
    weight_bytes = sum(path.stat().st_size for path in weight_files(model_paths["llama"]))
    small_bytes = sum(path.stat().st_size for path in model_paths["llama"].iterdir()) - weight_bytes
    environ = {"MODEL_EXPRESS_URL": filled.address, "MODEL_EXPRESS_NO_SHARED_STORAGE": "1"}
    extra = {"server_address": filled.address, "load_paths": "cache,engine"}
    with SmallDisk(here, str(small_bytes + 200_000)) as disk:
        assert disk.free_bytes < weight_bytes
        stored.ask("setenv", environ=environ)
        try:
            without_room = stored.load("org/full-disk", extra=extra)
            left = [path for path in here.rglob("*") if path.is_file() and path.stat().st_size and "safe" in path.name]
            partial = [path for path in (here / ".mx-partial").glob("*/*") if path.name != "lock"]
            disk.read_only(True)
            unwritable = stored.load("org/full-disk", extra=extra)
            disk.read_only(False)
            disk.resize("64m")
            with_room = stored.load("org/full-disk", extra=extra)
        finally:
            stored.ask("setenv", environ=dict.fromkeys(environ))
        kept_bytes = sum(path.stat().st_size for path in here.rglob("*.safetensors"))

    assert without_room.answers == unwritable.answers == with_room.answers == references.of(model_paths["llama"])
    assert without_room.report["path"] == unwritable.report["path"] == with_room.report["path"] == "cache"
    (fallback,) = unwritable.report["fallbacks"]
    assert "past the disk" in fallback
    assert "Read-only file system" in fallback
    (fallback,) = without_room.report["fallbacks"]
    assert "MX_DISK_FULL" in fallback
    assert str(here) in fallback
    assert f"{weight_bytes} bytes are to be written" in fallback
    assert "the weights go straight into the model" in without_room.log
    assert not left
    assert not partial
    assert with_room.report["fallbacks"] == []
    assert kept_bytes == weight_bytes


def test_from_the_servers_folder_where_both_see_it(
    stored: EngineHost,
    filled: ServerProcess,
    references: References,
    model_paths: dict[str, Path],
    folder: Path,
) -> None:
    small = folder / "hub-names" / "models--org--qwen3" / "snapshots"
    (commit,) = (folder / "server-cache" / "models--org--qwen3" / "snapshots").iterdir()
    shutil.copytree(commit, small / commit.name, ignore=lambda path, names: [n for n in names if ".safetensors" in n])
    loaded = stored.load(small / commit.name, extra={"server_address": filled.address})

    assert loaded.answers == references.of(model_paths["qwen3"])
    assert loaded.report["path"] == "cache"
    assert "files of the same sizes" in next(s["reason"] for s in loaded.report["paths"] if s["rung"] == "cache")
