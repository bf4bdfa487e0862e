"""Drafts of speculative decoding: loaded by the same ladder as models, under an identity of their own.

What a draft proposes is accepted or not, so that an engine's tokens say nothing of its draft's weights. So these are
compared themselves, as they are while the engine runs: each parameter's digest, to those of vLLM's default loader.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench.demo.models import weight_files
from bench.demo.processes import files_away
from tests.vllm import drafts
from tests.vllm.engines import EngineHost, Loaded

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
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
    llama, place = model_paths["llama"], folder / "drafts"
    return {
        "llama": llama,
        "eagle": drafts.eagle(place / "eagle", llama),
        "eagle-own": drafts.eagle(place / "eagle-own", llama, own_embedding=True),
        "eagle3": drafts.eagle3(place / "eagle3", llama),
        "mtp": drafts.with_mtp(place / "mtp"),
    }


def start(host: EngineHost, pair: str, models: dict[str, Path], load_format: str, **extra: Any) -> Loaded:
    """The answers are the digests of the draft's parameters."""
    model, method, draft, _ = PAIRS[pair]
    speculative = {"method": method, "num_speculative_tokens": 1}
    if draft is not None:
        speculative["model"] = str(models[draft])
    return host.load(
        models[model],
        load_format,
        extra=extra or None,
        ask="draft_digests",
        worker_cls=DRAFTED,
        speculative_config=speculative,
    )


def of_draft(loaded: Loaded) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(loaded.report_path.with_name(f"{loaded.report_path.name}.draft").read_text())
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Any]]:
    """What vLLM's default loader makes of each draft, once it was asked."""
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


def test_the_pages_rows_of_drafts_are_these() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.endswith("| its draft too |")]
    told = {draft.strip(): kinds.strip() for _, draft, kinds, _ in rows}
    assert told == {name: ", ".join(pair.kinds) for name, pair in PAIRS.items()}
