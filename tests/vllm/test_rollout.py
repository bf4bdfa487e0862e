"""`mx rollout` over a real `vllm serve` that answers all the while: the route of updates, and its readiness.

That weights are those of vLLM's default loader is tests/vllm/test_update.py's; here a version is known by what the
engine answers with it when nothing else is asked.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mxbench.demo import models
from mxbench.demo.workers import PROMPTS, Worker
from tests.cli.mx_process import mx
from tests.vllm.conftest import LLAMA
from tests.vllm.engine_host import TOKENS

OPTIONS = (
    *("--weight-transfer-config", json.dumps({"backend": "mx"}), "--enable-scale-out"),
    *("--kv-cache-memory-bytes", str(256 * 1024)),  # for some 500 tokens: requests are preempted
)
SETTINGS = {"VLLM_PLUGINS": "modelexpress_mx,mx_update"}
CLIENTS = 3
ANSWERS = 5  # of each client, before and after each rollout
ANSWER_SECONDS = 120.0


@pytest.fixture(scope="module")
def versions(folder: Path) -> tuple[Path, Path]:
    place = folder / "rollout"
    return models.generate(place / "1", "llama", LLAMA, seed=1), models.generate(place / "2", "llama", LLAMA, seed=2)


@pytest.fixture(scope="module")
def worker(folder: Path, server: str, versions: tuple[Path, Path]) -> Iterator[Worker]:
    started = Worker(
        "rollout",
        versions[0],
        folder,
        load_format="mx",
        pooling=False,
        server=server,
        options=OPTIONS,
        settings=SETTINGS,
    )
    try:
        started.start()
        yield started
    finally:
        started.child.stop()


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
def asking(worker: Worker) -> Iterator[list[Client]]:
    clients = [Client(worker) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield clients
    finally:
        for client in clients:
            client.end()


def asked(worker: Worker, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url(worker) + path, data, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:  # noqa: S310 - this machine
        text = answer.read()
    return json.loads(text) if text else None


def tokens_of(worker: Worker, prompt: str) -> list[int]:
    body = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
    tokens: list[int] = asked(worker, "/v1/completions", body)["choices"][0]["token_ids"]
    return tokens


def answers_of(worker: Worker) -> dict[str, list[int]]:
    return {prompt: tokens_of(worker, prompt) for prompt in PROMPTS}


def version_of(worker: Worker) -> str:
    return str(asked(worker, "/mx/update")["models"][0]["version"])


def url(worker: Worker) -> str:
    return f"http://127.0.0.1:{worker.port}"


def rolled(to: Path | str, worker: Worker, *more: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and all that was told, with the engine's part under `engine`."""
    ran = mx("rollout", "demo", "--to", str(to), "--json", *more, "--engines", url(worker))
    assert ran.out, ran.err
    told = ran.json()
    return ran.code, {**told, "engine": told["engines"][0]}


def test_an_engine_that_answers_all_the_while_takes_another_version_and_the_old_one_again(
    worker: Worker, versions: tuple[Path, Path], folder: Path
) -> None:
    """Every answer is one of either version, from its first token to its last, and none fails."""
    code, told = rolled(versions[1], worker, "--dry-run")
    assert (code, told["complete"], told["engine"]["outcome"]) == (0, False, "to do")
    expected = [answers_of(worker)]
    assert asked(worker, "/mx/update", {"path": str(versions[1]), "version": str(versions[1])})["changed"]
    expected.append(answers_of(worker))
    assert expected[0] != expected[1]
    with asking(worker) as clients:
        for model in (versions[0], versions[1], versions[0]):
            for client in clients:
                client.more()
            code, told = rolled(model, worker)
            assert (code, told["complete"], told["engine"]["outcome"]) == (0, True, "updated"), told
            assert told["engine"]["version"] == str(model)
        for client in clients:
            client.more()
        code, told = rolled(versions[0], worker)
        assert (code, told["engine"]["outcome"]) == (0, "had it")
        code, told = rolled(folder / "nothing", worker)
        assert (code, told["engine"]["outcome"]) == (1, "failed")
        assert "MX_UPDATE_FAILED" in told["engine"]["trouble"]
        for client in clients:
            client.more()
    assert [client.failures for client in clients] == [[]] * CLIENTS
    answers = [answer for client in clients for answer in client.answers]
    assert len(answers) >= 50
    assert all(tokens in (expected[0][prompt], expected[1][prompt]) for prompt, tokens in answers)
    assert asked(worker, "/health") is None
    assert version_of(worker) == str(versions[0])
    assert answers_of(worker) == expected[0]
    report = json.loads(Path(f"{worker.report_path}.update").read_text())
    assert (report["path"], report["serving"], report["fallbacks"]) == ("storage", True, [])


def test_answers_whose_requests_were_preempted_are_of_one_version_too(
    worker: Worker, versions: tuple[Path, Path]
) -> None:
    """They wait when the pause begins, with a part of their answer: vLLM alone would go on with the other weights.

    Told by vLLM's own record of which weights made which tokens. Before, a pause is given up, and changes nothing.
    """
    had = version_of(worker)
    other = next(path for path in map(str, versions) if path != had)
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
        with pytest.raises(urllib.error.HTTPError) as refused:
            asked(worker, "/mx/update", {"path": other, "version": other, "drain_seconds": 0.01})
        with refused.value as answer:
            assert (answer.code, json.load(answer)["phase"]) == (409, "ready")
        assert asked(worker, "/health") is None
        told = asked(worker, "/mx/update", {"path": other, "version": other})
        answers = [future.result() for future in asking_them]
    assert told["changed"]
    assert [len(each) for each in answers] == [1] * len(answers)
    assert had in {each[0]["version"] for each in answers}


def preemptions(worker: Worker) -> float:
    with urllib.request.urlopen(f"{url(worker)}/metrics", timeout=ANSWER_SECONDS) as answer:  # noqa: S310
        found = re.search(r"^vllm:num_preemptions_total\{[^}]*\} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("phase", ["pausing", "updating"])
def test_a_rollout_that_is_killed_goes_on_when_it_is_called_again(
    phase: str, worker: Worker, versions: tuple[Path, Path]
) -> None:
    """While the engine waits for a request that runs, which gets its whole answer; or while it takes the weights."""
    had = version_of(worker)
    other = next(path for path in versions if str(path) != had)
    body = {"model": "demo", "prompt": PROMPTS[0], "max_tokens": 240, "ignore_eos": True, "return_token_ids": True}
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(asked, worker, "/v1/completions", body)
        command = ["rollout", "demo", "--to", str(other), "--engines", url(worker)]
        with subprocess.Popen([sys.executable, "-c", "from mxcore.cli.main import main; main()", *command]) as process:
            while process.poll() is None and asked(worker, "/mx/update")["phase"] != phase:
                pass
            process.kill()
        code, told = rolled(other, worker)
        assert (code, told["complete"]) == (0, True), told
        choice = long.result()["choices"][0]
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", 240)
    assert version_of(worker) == str(other)
