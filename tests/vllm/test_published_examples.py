"""Workers as Dynamo's and llm-d's pages start them (published_examples.toml), on the real vLLM: weights come p2p.

`vllm serve` stands for `python3 -m dynamo.vllm`, which parses the same arguments by the same class of vLLM's. Replaced
are: the model, by a small one; host and port of the server, which keep the form that they are written in; two ranks of
llm-d's by one. What vLLM's CPU build needs on a small machine is added, and a file for the report.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mxbench.demo.processes import ENGINE_ENVIRONMENT, Child
from mxbench.demo.workers import Worker
from mxbench.fleet.free_ports import free_port

EXAMPLES = {
    example["name"]: example
    for example in tomllib.loads((Path(__file__).parent / "published_examples.toml").read_text())["example"]
}
_ADDRESS = re.compile(r"[\w.-]+:\d+$")
WITHOUT_EFFECT = {"llm-d": "MX_METADATA_PORT has no effect here"}


class PublishedWorker(Worker):
    """A worker as a page starts it."""

    def __init__(self, name: str, example: dict[str, Any], model: Path, folder: Path, server: str) -> None:
        self.pooling, self.ranks, self.host, self.port = False, 1, "127.0.0.1", free_port()
        self.report_path = folder / f"published-{name}.json"
        given = [str(model) if part == example["model"] else part for part in example["arguments"]]
        given = ["--tensor-parallel-size=1" if part.startswith("--tensor-parallel-size=") else part for part in given]
        if given[0] == "--model":  # `vllm serve` takes the model by its place
            given = given[1:]
        needed = ["--host", self.host, "--port", str(self.port), "--served-model-name", "demo", "--enforce-eager"]
        needed += ["--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "256", "--seed", "0"]
        needed += ["--kv-cache-memory-bytes", str(64 << 20)]
        needed += ["--model-loader-extra-config", json.dumps({"report_path": str(self.report_path)})]
        environment = {
            key: _ADDRESS.sub(server, value) if key in ("MODEL_EXPRESS_URL", "MX_SERVER_ADDRESS") else value
            for key, value in example["environment"].items()
        }
        self.child = Child(
            name,
            ["-m", "vllm.entrypoints.cli.main", "serve", *given, *needed],
            {**ENGINE_ENVIRONMENT, "VLLM_CACHE_ROOT": str(folder / "cache"), **environment},
            folder / "logs" / f"published-{name}.log",
        )


@pytest.fixture(scope="module")
def first(folder: Path, server: str, model_paths: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """The first worker's report: Dynamo's own example, which finds nobody and reads storage."""
    worker = PublishedWorker("first", EXAMPLES["dynamo"], model_paths["llama"], folder, server)
    try:
        worker.start()
        yield {**worker.report(), "answers": worker.answers()}
    finally:
        worker.child.stop()


def test_the_first_worker_reads_storage_and_serves(first: dict[str, Any]) -> None:
    assert (first["path"], first["serving"], first["fallbacks"]) == ("storage", True, [])


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_worker_as_published_takes_its_weights_from_another(
    name: str, first: dict[str, Any], folder: Path, server: str, model_paths: dict[str, Path]
) -> None:
    worker = PublishedWorker(name, EXAMPLES[name], model_paths["llama"], folder, server)
    try:
        worker.start()
        report, answers = worker.report(), worker.answers()
    finally:
        worker.child.stop()
    assert (report["path"], report["fallbacks"]) == ("p2p", [])
    assert report["source_worker"]
    assert report["serving"] is (name != "dynamo-load-format-in-the-environment")  # which says mx-target
    assert answers == first["answers"]
    log = worker.child.log.read_text()
    assert "is no setting" not in log
    assert (WITHOUT_EFFECT[name] in log) if name in WITHOUT_EFFECT else ("no effect here" not in log)
