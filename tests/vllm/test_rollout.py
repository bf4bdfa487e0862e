"""`mx rollout` over real `vllm serve` processes that answer all the while: the route of updates, and its readiness."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.demo import models
from bench.demo.workers import PROMPTS, Worker
from tests.cli.mx_process import mx
from tests.vllm.conftest import LLAMA, References
from tests.vllm.engine_host import TOKENS

OPTIONS = ("--weight-transfer-config", json.dumps({"backend": "mx"}))
SETTINGS = {"VLLM_PLUGINS": "modelexpress_mx,mx_update"}


@pytest.fixture(scope="module")
def versions(folder: Path) -> tuple[Path, Path]:
    place = folder / "rollout"
    return models.generate(place / "1", "llama", LLAMA, seed=1), models.generate(place / "2", "llama", LLAMA, seed=2)


@pytest.fixture(scope="module")
def workers(folder: Path, server: str, versions: tuple[Path, Path]) -> Iterator[list[Worker]]:
    started = [
        Worker(
            name,
            versions[0],
            folder,
            load_format="mx",
            pooling=False,
            server=server,
            options=OPTIONS,
            settings=SETTINGS,
        )
        for name in ("rollout-a", "rollout-b")
    ]
    try:
        for worker in started:
            worker.start()
        yield started
    finally:
        for worker in started:
            worker.child.stop()


class Client(threading.Thread):
    """Asks an engine without a break; `answers` has each prompt with its tokens, `failures` what was no answer."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(daemon=True)
        self._worker = worker
        self._over = threading.Event()
        self.answers: list[tuple[str, list[int]]] = []
        self.failures: list[str] = []

    def run(self) -> None:
        while not self._over.is_set():
            prompt = PROMPTS[len(self.answers) % len(PROMPTS)]
            try:
                self.answers.append((prompt, tokens_of(self._worker, prompt)))
            except (OSError, http.client.HTTPException, KeyError) as error:
                self.failures.append(repr(error))
                return

    def end(self) -> None:
        self._over.set()
        self.join(120)


def tokens_of(worker: Worker, prompt: str) -> list[int]:
    body = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
    tokens: list[int] = asked(worker, "/v1/completions", body)["choices"][0]["token_ids"]
    return tokens


def asked(worker: Worker, path: str, body: dict[str, Any] | None = None) -> Any:
    url = f"http://127.0.0.1:{worker.port}{path}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - as above
        text = answer.read()
    return json.loads(text) if text else None


def rolled(model: Path, workers: list[Worker], *more: str) -> tuple[int, dict[str, Any]]:
    urls = [text for worker in workers for text in ("--engines", f"http://127.0.0.1:{worker.port}")]
    ran = mx("rollout", "demo", "--to", str(model), *urls, "--json", *more)
    assert ran.out, ran.err
    return ran.code, ran.json()


def test_engines_that_answer_all_the_while_take_another_version_and_the_old_one_again(
    workers: list[Worker], versions: tuple[Path, Path], references: References, folder: Path
) -> None:
    expected = [dict(zip(PROMPTS, (tokens for tokens, _ in references.of(model)), strict=True)) for model in versions]
    clients = [Client(worker) for worker in workers]
    for client in clients:
        client.start()
    try:
        code, told = rolled(versions[1], workers, "--dry-run")
        assert (code, told["complete"], {e["outcome"] for e in told["engines"]}) == (0, False, {"to do"})
        for model in (versions[1], versions[0], versions[1]):
            code, told = rolled(model, workers)
            assert (code, told["complete"]) == (0, True), told
            assert {engine["version"] for engine in told["engines"]} == {str(model)}
        code, told = rolled(versions[1], workers)
        assert (code, {engine["outcome"] for engine in told["engines"]}) == (0, {"had it"})
        code, told = rolled(folder / "nothing", workers)
        assert code == 1
        assert [engine["outcome"] for engine in told["engines"]] == ["failed", "to do"]
        assert "MX_UPDATE_FAILED" in told["engines"][0]["trouble"]
        for worker in workers:
            assert asked(worker, "/health") is None
            assert asked(worker, "/mx/update")["models"][0]["version"] == str(versions[1])
    finally:
        for client in clients:
            client.end()
    for worker, client in zip(workers, clients, strict=True):
        assert client.failures == []
        assert client.answers
        assert all(tokens in (expected[0][prompt], expected[1][prompt]) for prompt, tokens in client.answers)
        assert {prompt: tokens_of(worker, prompt) for prompt in PROMPTS} == expected[1]
        assert json.loads(Path(f"{worker.report_path}.update").read_text())["fallbacks"] == []
