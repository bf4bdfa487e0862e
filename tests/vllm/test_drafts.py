"""Drafts of speculative decoding: loaded by the same ladder as models, under an identity of their own.

What a draft proposes is accepted or not, so that an engine's tokens say nothing of its draft's weights. So these are
compared themselves, as they are while the engine runs: each parameter's digest, to those of vLLM's default loader.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from mxbench.stand_ins.hub import hub_stand_in
from mxbench.stand_ins.s3_server import S3Server, environment
from mxserver.wire.files import ModelClient
from tests.server.conftest import ServerProcess
from tests.storage.signed.signing import Key
from tests.vllm import drafts
from tests.vllm.engines import EngineHost, Loaded

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "vllm.md"
DRAFTED = "tests.vllm.draft_worker.DraftWorker"


class Pair(NamedTuple):
    """A model, and its draft's files, None: the model's own; the kinds of weights with which it is run."""

    model: str
    method: str
    draft: str | None
    kinds: tuple[str, ...] = ("raw",)


PAIRS = {
    "a draft model": Pair("llama", "draft_model", "llama", ("raw", "processed")),
    "an EAGLE head": Pair("llama", "eagle", "eagle"),
    "an EAGLE head with an embedding": Pair("llama", "eagle", "eagle-own", ("raw", "processed")),
    "an EAGLE 3 head": Pair("llama", "eagle3", "eagle3"),
    "multi-token prediction": Pair("mtp", "mtp", None, ("raw", "processed")),
}


@pytest.fixture(scope="module")
def models(folder: Path, model_paths: dict[str, Path]) -> dict[str, Path]:
    return made(folder / "drafts", model_paths["llama"])


def made(place: Path, llama: Path) -> dict[str, Path]:
    """All models of `PAIRS`."""
    return {
        "llama": llama,
        "eagle": drafts.eagle(place / "eagle", llama),
        "eagle-own": drafts.eagle(place / "eagle-own", llama, own_embedding=True),
        "eagle3": drafts.eagle3(place / "eagle3", llama),
        "mtp": drafts.with_mtp(place / "mtp"),
    }


def start(
    host: EngineHost, pair: str, models: Mapping[str, Path | str], load_format: str = "mx", **extra: Any
) -> Loaded:
    """The answers are the digests of the draft's parameters."""
    model, _, _, _ = PAIRS[pair]
    return host.load(
        models[model],
        load_format,
        extra=extra or None,
        ask="draft_digests",
        worker_cls=DRAFTED,
        speculative_config=speculative(pair, models),
    )


def speculative(pair: str, models: Mapping[str, Path | str]) -> dict[str, Any]:
    """vLLM's options of a pair's draft."""
    _, method, draft, _ = PAIRS[pair]
    options = {"method": method, "num_speculative_tokens": 1}
    return options if draft is None else {**options, "model": str(models[draft])}


def of_draft(loaded: Loaded) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(loaded.report_path.with_name(f"{loaded.report_path.name}.draft").read_text())
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Any]]:
    """What vLLM's default loader makes of each draft, once asked. For tests with `unpacked`: each weight shows."""
    return {}


def of_the_default_loader(
    known: dict[str, list[Any]], host: EngineHost, pair: str, models: dict[str, Path]
) -> list[Any]:
    if pair not in known:
        known[pair] = start(host, pair, models, "auto").answers
    return known[pair]


def all_files_away(models: dict[str, Path], pair: str) -> list[Path]:
    names = {PAIRS[pair].model, PAIRS[pair].draft or PAIRS[pair].model}
    return [file for name in sorted(names) for file in weight_files(models[name])]


@pytest.mark.parametrize(("pair", "kind"), [(name, kind) for name, pair in PAIRS.items() for kind in pair.kinds])
def test_a_draft_comes_from_a_worker_that_has_it(
    pair: str,
    kind: str,
    source: EngineHost,
    target: EngineHost,
    unpacked: None,
    models: dict[str, Path],
    expected: dict[str, list[Any]],
) -> None:
    wanted = of_the_default_loader(expected, target, pair, models)
    first = start(source, pair, models, "mx", layout=kind)
    with files_away(all_files_away(models, pair)):
        second = start(target, pair, models, "mx", layout=kind)

    assert of_draft(first)["path"] == "storage"
    for report in (first.report, second.report, of_draft(first), of_draft(second)):
        assert (report["fallbacks"], report["serving"], report["layout"]) == ([], True, kind)
    assert (second.report["path"], of_draft(second)["path"]) == ("p2p", "p2p")
    assert second.report["source_id"] != of_draft(second)["source_id"]
    assert second.answers == first.answers == wanted


def test_a_target_without_files_starts_with_its_draft(
    source: EngineHost, target: EngineHost, models: dict[str, Path]
) -> None:
    pair = "multi-token prediction"
    first = start(source, pair, models, "mx-source")
    with files_away(all_files_away(models, pair)):
        second = start(target, pair, models, "mx-target")

    assert second.answers == first.answers
    assert (of_draft(second)["path"], of_draft(second)["layout"], of_draft(second)["serving"]) == ("p2p", "raw", False)


def test_a_target_whose_source_has_no_draft_reads_it(
    source: EngineHost, target: EngineHost, unpacked: None, models: dict[str, Path], expected: dict[str, list[Any]]
) -> None:
    pair = "an EAGLE head"
    source.load(models["llama"], "mx-source")
    second = start(target, pair, models, "mx-target")

    assert (second.report["path"], of_draft(second)["path"]) == ("p2p", "storage")
    assert second.answers == of_the_default_loader(expected, target, pair, models)


@pytest.fixture(scope="module")
def small(folder: Path, models: dict[str, Path]) -> dict[str, Path]:
    """The same without weights."""
    return {
        name: shutil.copytree(path, folder / "drafts-small" / name, ignore=shutil.ignore_patterns("*.safetensors*"))
        for name, path in models.items()
    }


def test_a_draft_in_the_models_files_comes_from_model_uri_with_them(
    source: EngineHost,
    target: EngineHost,
    unpacked: None,
    folder: Path,
    models: dict[str, Path],
    small: dict[str, Path],
    expected: dict[str, list[Any]],
) -> None:
    """Neither worker has a weight on its disk; the second one takes both models from the first, with the store gone."""
    pair = "multi-token prediction"
    wanted = of_the_default_loader(expected, target, pair, models)
    shutil.copytree(models["mtp"], folder / "draft-buckets" / "models" / "mtp")
    with S3Server(folder / "draft-buckets") as store:
        for host in (source, target):
            host.ask("setenv", environ=environment(store.address))
        try:
            first = start(source, pair, small, model_uri="s3://models/mtp")
            store.close()
            try:
                second = start(target, pair, small, model_uri="s3://models/mtp")
            finally:
                store.start()
        finally:
            for host in (source, target):
                host.ask("setenv", environ=dict.fromkeys(environment(store.address)))

    assert (first.report["path"], of_draft(first)["path"]) == ("uri", "uri")
    assert (second.report["path"], of_draft(second)["path"]) == ("p2p", "p2p")
    assert of_draft(first)["fallbacks"] == []
    assert ["MX_OBJECT_TIMEOUT" in line for line in of_draft(second)["fallbacks"]] == [True]
    assert second.answers == first.answers == wanted


def test_a_draft_in_files_of_its_own_is_not_looked_for_at_model_uri(
    target: EngineHost,
    unpacked: None,
    models: dict[str, Path],
    small: dict[str, Path],
    expected: dict[str, list[Any]],
) -> None:
    pair = "an EAGLE head"
    wanted = of_the_default_loader(expected, target, pair, models)
    extra = {"MX_MODEL_URI": f"file://{models['llama']}"}
    loaded = start(target, pair, {**models, "llama": small["llama"]}, **extra)

    assert (loaded.report["path"], of_draft(loaded)["path"]) == ("uri", "storage")
    assert of_draft(loaded)["fallbacks"] == []
    assert loaded.answers == wanted


@pytest.fixture(scope="module")
def filled(models: dict[str, Path], folder: Path) -> Iterator[ServerProcess]:
    """A server whose cache has models and drafts of a hub that is gone."""
    with hub_stand_in() as hub:
        for name in ("llama", "eagle", "mtp"):
            hub.add(f"org/{name}", {path.name: path.read_bytes() for path in models[name].iterdir() if path.is_file()})
        environ = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "draft-server-hf-home"),
            "HF_HUB_OFFLINE": "0",
            "MODEL_EXPRESS_CACHE_DIRECTORY": str(folder / "draft-server-cache"),
            "MX_METADATA_BACKEND": "memory",
        }
        server = ServerProcess("--port", "0", environ=environ)
        with ModelClient(server.address) as client:
            for name in ("llama", "eagle", "mtp"):
                client.ensure(f"org/{name}")
    yield server
    server.close()


@pytest.mark.parametrize(
    ("pair", "to_disk"), [("an EAGLE head", "1"), ("multi-token prediction", "0")], ids=["disk", "memory"]
)
def test_a_draft_comes_from_the_servers_cache(
    pair: str,
    to_disk: str,
    target: EngineHost,
    unpacked: None,
    filled: ServerProcess,
    folder: Path,
    models: dict[str, Path],
    expected: dict[str, list[Any]],
) -> None:
    """Configurations too: this machine has no file of either model."""
    wanted = of_the_default_loader(expected, target, pair, models)
    environ = {
        "HF_HOME": str(folder / f"draft-hf-home-{to_disk}"),
        "MODEL_EXPRESS_URL": filled.address,
        "MODEL_EXPRESS_NO_SHARED_STORAGE": "1",
        "MX_CACHE_WEIGHTS": to_disk,
    }
    host = EngineHost("cached-drafts", folder, filled.address, environ)
    try:
        host.ask("plain_linear", on=True)  # as `unpacked` has it
        loaded = start(host, pair, {name: f"org/{name}" for name in models})
    finally:
        host.close()

    assert (loaded.report["path"], of_draft(loaded)["path"]) == ("cache", "cache")
    assert (of_draft(loaded)["fallbacks"], of_draft(loaded)["serving"]) == ([], True)
    assert loaded.answers == wanted


def test_a_draft_is_verified_as_its_model_is(
    source: EngineHost, target: EngineHost, unpacked: None, tmp_path: Path, model_paths: dict[str, Path]
) -> None:
    """By its own folder's signature; one in the model's files by the model's. What was not signed ends the start."""
    key, signed = Key(tmp_path / "keys"), made(tmp_path, shutil.copytree(model_paths["llama"], tmp_path / "llama"))
    for name in ("llama", "eagle", "mtp"):
        key.sign(signed[name])
    wanted = {pair: start(target, pair, signed, "auto").answers for pair in ("an EAGLE head", "multi-token prediction")}
    extra = {
        "model_signature": "require",
        "model_signature_key": str(key.public),
        "model_signature_file": str(signed["llama"] / "model.sig"),  # of the model: the draft has another one
    }
    first = start(source, "an EAGLE head", signed, **extra)
    second = start(target, "an EAGLE head", signed, **extra)
    assert (of_draft(first)["path"], of_draft(second)["path"]) == ("storage", "p2p")
    assert first.answers == second.answers == wanted["an EAGLE head"]

    del extra["model_signature_file"]
    third = start(target, "multi-token prediction", signed, **extra)
    assert (third.report["path"], of_draft(third)["path"]) == ("storage", "storage")
    assert third.answers == wanted["multi-token prediction"]

    (weights,) = weight_files(signed["eagle"])
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AssertionError, match="MX_SIGNED_FILE_MISMATCH"):
        start(target, "an EAGLE head", signed, load_paths="engine", **extra)


def test_the_pages_rows_of_drafts_are_these() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.endswith("| its draft too |")]
    told = {draft.strip(): kinds.strip() for _, draft, kinds, _ in rows}
    assert told == {name: ", ".join(pair.kinds) for name, pair in PAIRS.items()}
