"""`mx rollout` over real `vllm serve` processes that answer all the while: the route of updates, and its readiness."""

from __future__ import annotations

import ast
import http.client
import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.demo import models
from bench.demo.processes import clean_environment
from bench.demo.workers import PROMPTS, Worker
from tests.cli.mx_process import mx
from tests.vllm.conftest import LLAMA, References
from tests.vllm.engine_host import TOKENS

ROOT = Path(__file__).parents[2]
OPTIONS = ("--weight-transfer-config", json.dumps({"backend": "mx"}), "--enable-scale-out")
FEW_BLOCKS = ("--kv-cache-memory-bytes", str(256 * 1024))  # for some 500 tokens: requests are preempted
SETTINGS = {"VLLM_PLUGINS": "modelexpress_mx,mx_update"}
ANSWERS = 5  # of each client, before and after each rollout
ANSWER_SECONDS = 120.0


@pytest.fixture(scope="module")
def versions(folder: Path) -> tuple[Path, Path]:
    place = folder / "rollout"
    return models.generate(place / "1", "llama", LLAMA, seed=1), models.generate(place / "2", "llama", LLAMA, seed=2)


@pytest.fixture(scope="module")
def workers(folder: Path, server: str, versions: tuple[Path, Path]) -> Iterator[list[Worker]]:
    def made(name: str, *more: str) -> Worker:
        return Worker(
            name,
            versions[0],
            folder,
            load_format="mx",
            pooling=False,
            server=server,
            options=(*OPTIONS, *more),
            settings=SETTINGS,
        )

    started: list[Worker] = []
    try:
        for name, more in (("rollout-a", ()), ("rollout-b", FEW_BLOCKS)):
            started.append(made(name, *more))
            started[-1].start()  # one after the other: the second one takes its weights from the first
        yield started
    finally:
        for worker in started:
            worker.child.stop()


class Client(threading.Thread):
    """Asks an engine without a break; `answers` has each prompt with its tokens, `failures` what was no answer."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(daemon=True)
        self._worker = worker
        self._over = False
        self._told = threading.Condition()
        self.answers: list[tuple[str, list[int]]] = []
        self.failures: list[str] = []

    def run(self) -> None:
        while not self._over and not self.failures:
            prompt = PROMPTS[len(self.answers) % len(PROMPTS)]
            try:
                answer = (prompt, tokens_of(self._worker, prompt))
                with self._told:
                    self.answers.append(answer)
                    self._told.notify_all()
            except (OSError, http.client.HTTPException, KeyError) as error:
                with self._told:
                    self.failures.append(repr(error))
                    self._told.notify_all()

    def more(self) -> None:
        """Waits for ANSWERS more."""
        with self._told:
            wanted = len(self.answers) + ANSWERS
            assert self._told.wait_for(lambda: self.failures or len(self.answers) >= wanted, ANSWER_SECONDS)

    def end(self) -> None:
        self._over = True
        self.join(ANSWER_SECONDS)


@contextmanager
def asking(workers: list[Worker]) -> Iterator[list[Client]]:
    """Two clients an engine."""
    clients = [Client(worker) for worker in workers for _ in range(2)]
    for client in clients:
        client.start()
    try:
        yield clients
    finally:
        for client in clients:
            client.end()


def tokens_of(worker: Worker, prompt: str) -> list[int]:
    body = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
    tokens: list[int] = asked(worker, "/v1/completions", body)["choices"][0]["token_ids"]
    return tokens


def asked(worker: Worker, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url(worker) + path, data, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:  # noqa: S310 - this machine
        text = answer.read()
    return json.loads(text) if text else None


def url(worker: Worker) -> str:
    return f"http://127.0.0.1:{worker.port}"


def rolled(model: Path, workers: list[Worker], *more: str) -> tuple[int, dict[str, Any]]:
    ran = mx("rollout", "demo", "--to", str(model), "--json", *more, "--engines", *map(url, workers))
    assert ran.out, ran.err
    return ran.code, ran.json()


def report(worker: Worker) -> dict[str, Any]:
    """Of the last update."""
    found: dict[str, Any] = json.loads(Path(f"{worker.report_path}.update").read_text())
    return found


def test_engines_that_answer_all_the_while_take_another_version_and_the_old_one_again(
    workers: list[Worker], versions: tuple[Path, Path], references: References, folder: Path
) -> None:
    """Every answer is one of either version, from its first token to its last, and none fails."""
    expected = [dict(zip(PROMPTS, (tokens for tokens, _ in references.of(model)), strict=True)) for model in versions]
    assert expected[0] != expected[1]
    with asking(workers) as clients:
        code, told = rolled(versions[1], workers, "--dry-run")
        assert (code, told["complete"], {e["outcome"] for e in told["engines"]}) == (0, False, {"to do"})
        for model in (versions[1], versions[0], versions[1]):
            for client in clients:
                client.more()
            code, told = rolled(model, workers)
            assert (code, told["complete"]) == (0, True), told
            assert [engine["outcome"] for engine in told["engines"]] == ["updated"] * 2
            assert {engine["version"] for engine in told["engines"]} == {str(model)}
            assert [report(worker)["path"] for worker in workers] == ["storage", "p2p"]
        for client in clients:
            client.more()
        code, told = rolled(versions[1], workers)
        assert (code, [engine["outcome"] for engine in told["engines"]]) == (0, ["had it"] * 2)
        code, told = rolled(folder / "nothing", workers)
        assert (code, [engine["outcome"] for engine in told["engines"]]) == (1, ["failed", "to do"])
        assert "MX_UPDATE_FAILED" in told["engines"][0]["trouble"]
        for client in clients:
            client.more()
    assert [client.failures for client in clients] == [[]] * len(clients)
    assert sum(len(client.answers) for client in clients) >= 50
    for client in clients:
        assert all(tokens in (expected[0][prompt], expected[1][prompt]) for prompt, tokens in client.answers)
    for worker in workers:
        assert asked(worker, "/health") is None
        assert asked(worker, "/mx/update")["models"][0]["version"] == str(versions[1])
        assert {prompt: tokens_of(worker, prompt) for prompt in PROMPTS} == expected[1]
        assert report(worker)["fallbacks"] == []


def test_engines_follow_a_trainer(workers: list[Worker], versions: tuple[Path, Path], server: str) -> None:
    """examples/train_and_serve.py: what an engine answers is what it was taught last, in one round and the next."""
    for rounds, sentence in enumerate(train_and_serve_sentences(), 1):
        command = ["examples/train_and_serve.py", str(versions[0]), f"policy-{rounds}", str(rounds), *map(url, workers)]
        ran = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**clean_environment(), "MODEL_EXPRESS_URL": server, "MX_WORKER_HOST": "127.0.0.1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stderr
        assert len(ran.stdout.splitlines()) == rounds * len(workers)
        for worker in workers:
            text = continued(worker, " ".join(sentence.split()[:2]))
            assert text in sentence
            assert len(text) > 10
            assert report(worker)["path"] in ("published", "p2p")
    assert report(workers[0])["path"] == "published"
    assert report(workers[1])["path"] == "p2p"


def train_and_serve_sentences() -> tuple[str, ...]:
    """What the example teaches, in order."""
    for node in ast.parse((ROOT / "examples" / "train_and_serve.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "SENTENCES":
            return tuple(ast.literal_eval(node.value))
    raise AssertionError("the example has no SENTENCES")


def continued(worker: Worker, prompt: str) -> str:
    body = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    text: str = asked(worker, "/v1/completions", body)["choices"][0]["text"]
    return text.strip()


def test_answers_whose_requests_were_preempted_are_of_one_version_too(
    workers: list[Worker], versions: tuple[Path, Path]
) -> None:
    """They wait when the pause begins, with a part of their answer: vLLM alone would go on with the other weights.

    Told by vLLM's own record of which weights made which tokens.
    """
    worker = workers[1]
    other = next(path for path in map(str, versions) if path != asked(worker, "/mx/update")["models"][0]["version"])
    before = preemptions(worker)
    sampling = {"max_tokens": 220, "ignore_eos": True, "temperature": 0}

    def spans(first_token: int) -> list[Any]:
        body = {"model": "demo", "token_ids": [first_token, 5, 6], "sampling_params": sampling}
        found: list[Any] = asked(worker, "/inference/v1/generate", body)["choices"][0]["weight_versions"]
        return found

    with ThreadPoolExecutor(8) as pool:
        asking_them = [pool.submit(spans, token) for token in range(10, 18)]
        while preemptions(worker) == before:
            assert not all(future.done() for future in asking_them)
        told = asked(worker, "/mx/update", {"path": other, "version": other})
        answers = [future.result() for future in asking_them]
    assert told["changed"]
    assert [len(each) for each in answers] == [1] * len(answers)


def preemptions(worker: Worker) -> float:
    with urllib.request.urlopen(f"{url(worker)}/metrics", timeout=ANSWER_SECONDS) as answer:  # noqa: S310
        found = re.search(r"^vllm:num_preemptions_total\{[^}]*\} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_a_rollout_that_is_killed_goes_on_when_it_is_called_again(
    workers: list[Worker], versions: tuple[Path, Path]
) -> None:
    """While an engine waits for a request that runs: that one gets its whole answer."""
    had = asked(workers[0], "/mx/update")["models"][0]["version"]
    other = next(path for path in versions if str(path) != had)
    body = {"model": "demo", "prompt": PROMPTS[0], "max_tokens": 240, "ignore_eos": True, "return_token_ids": True}
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(asked, workers[0], "/v1/completions", body)
        command = ["rollout", "demo", "--to", str(other), "--engines", *map(url, workers)]
        with subprocess.Popen([sys.executable, "-c", "from mxcore.cli.main import main; main()", *command]) as process:
            while process.poll() is None and asked(workers[0], "/mx/update")["phase"] == "ready":
                pass
            process.kill()
        code, told = rolled(other, workers)
        assert (code, told["complete"]) == (0, True), told
        choice = long.result()["choices"][0]
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", 240)
    for worker in workers:
        assert asked(worker, "/mx/update")["models"][0]["version"] == str(other)
