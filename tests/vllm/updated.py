"""Two versions of a model, and what an engine has and answers after it was given one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.vllm.engines import EngineHost, Loaded

__all__ = ["TRANSFER", "Versions", "addresses", "as_loaded", "now", "report_of", "two_versions", "update"]

TRANSFER: dict[str, Any] = {"weight_transfer_config": {"backend": "mx"}}


class Versions(NamedTuple):
    """Folders of one model with two seeds: no tensor is equal."""

    one: Path
    two: Path


def two_versions(place: Path, generate: Callable[[Path, int], Path]) -> Versions:
    """Written by `generate`, which is given a folder and a seed; again the same where they are there."""
    return Versions(generate(place / "1", 1), generate(place / "2", 2))


def now(host: EngineHost) -> dict[str, Any]:
    """What the kept engine answers, and its tensors' digests."""
    told = host.ask("answers")
    return {"answers": told["answers"], "digests": told["digests"]}


def as_loaded(host: EngineHost, model: Path, **options: Any) -> dict[str, Any]:
    """The same of an engine that vLLM's default loader loads."""
    host.load(model, "auto", keep=True, **options)
    told = now(host)
    host.ask("end")
    return told


def update(host: EngineHost, **info: Any) -> dict[str, Any]:
    """Without an error; the state of the first worker's model."""
    told = host.ask("update", info=info)
    assert told["error"] == ""
    state: dict[str, Any] = told["states"][0]["models"][0]
    assert state["ready"]
    return state


def addresses(host: EngineHost) -> Any:
    """Where the kept engine's parameters and buffers are."""
    return host.ask("addresses")["addresses"]


def report_of(loaded: Loaded) -> dict[str, Any]:
    """That of the engine's last update."""
    told: dict[str, Any] = json.loads(Path(f"{loaded.report_path}.update").read_text())
    return told
