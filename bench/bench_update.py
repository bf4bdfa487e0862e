"""`mx bench update`: another version for engines of vLLM that answer all the while.

Real `vllm serve` processes on this machine, a model of --mib, and clients that ask each without a break. First one engine
takes the other version from storage, then one from that engine, then all others at once; then all go back.

`pause_over_transfer`: how long an engine that takes weights from another one is paused, over the seconds in which its
bytes came. `many_over_one`: the others at once over one alone. `storage_models_read`: models read from storage for all
engines to have the version. `mixed_answers`: answers that no version gives alone. `failed_requests`.
"""

from __future__ import annotations

import http.client
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from bench.demo import models
from bench.demo.workers import PROMPTS, Server, Worker

OPTIONS = ("--weight-transfer-config", json.dumps({"backend": "mx"}))
SETTINGS = {"VLLM_PLUGINS": "modelexpress_mx,mx_update"}
REQUEST_SECONDS = 900.0
LAYER = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
LAYER_MIB = 86


class Clients:
    """One thread an engine, which asks without a break; `answers` are what came, `failures` what was no answer."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._over = False
        self._threads = [threading.Thread(target=self._ask, args=(worker,), daemon=True) for worker in workers]
        self.answers: list[tuple[str, Any]] = []
        self.failures: list[str] = []

    def _ask(self, worker: Worker) -> None:
        number = 0
        while not self._over:
            prompt = PROMPTS[number % len(PROMPTS)]
            number += 1
            try:
                self.answers.append((prompt, tokens(worker, prompt)))
            except (OSError, http.client.HTTPException, KeyError, ValueError) as error:
                self.failures.append(repr(error))

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Within it they ask."""
        for thread in self._threads:
            thread.start()
        yield
        self._over = True
        for thread in self._threads:
            thread.join()


def call(worker: Worker, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Raises ClickException where the engine does not do it."""
    connection = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=REQUEST_SECONDS)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        told: dict[str, Any] = json.loads(response.read())
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise click.ClickException(f"{worker.child.name} answered {path} with {response.status}: {told}")
    return told


def tokens(worker: Worker, prompt: str) -> list[int]:
    """The greedy ones."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 16, "temperature": 0, "return_token_ids": True}
    found: list[int] = call(worker, "/v1/completions", body)["choices"][0]["token_ids"]
    return found


def updated(worker: Worker, model: Path) -> dict[str, Any]:
    """Takes a version; the report of it, with `paused_seconds`."""
    began = time.monotonic()
    call(worker, "/mx/update", {"path": str(model), "version": model.name})
    report: dict[str, Any] = json.loads(Path(f"{worker.report_path}.update").read_text())
    return {**report, "paused_seconds": time.monotonic() - began}


def measure(engines: int, mib: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The figures, and the reports of the updates that they are of."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shape = {**LAYER, "num_hidden_layers": max(1, round(mib / LAYER_MIB))}
        versions = [models.generate(folder / f"v{seed}", "llama", shape, seed=seed) for seed in (1, 2)]
        server = Server(folder)
        workers: list[Worker] = []
        try:
            address = server.start()
            for number in range(engines):
                say(f"engine {number + 1} of {engines} starts")
                workers.append(
                    Worker(
                        f"engine-{number}",
                        versions[0],
                        folder,
                        load_format="mx",
                        pooling=False,
                        server=address,
                        options=OPTIONS,
                        settings=SETTINGS,
                    )
                )
                workers[-1].start()
            return rounds(workers, versions, say)
        finally:
            for worker in workers:
                worker.child.stop()
            server.child.stop()


def rounds(workers: list[Worker], versions: list[Path], say: Callable[[str], None]) -> dict[str, Any]:
    """There and back, while clients ask."""
    expected = [{prompt: tokens(workers[0], prompt) for prompt in PROMPTS}]
    clients = Clients(workers)
    with clients.asking():
        say("one engine from storage")
        reports = [updated(workers[0], versions[1])]
        say("one engine from that one")
        reports.append(updated(workers[1], versions[1]))
        say("all others at once")
        began = time.monotonic()
        with ThreadPoolExecutor(len(workers)) as pool:
            reports += pool.map(lambda worker: updated(worker, versions[1]), workers[2:])
        together = time.monotonic() - began
        expected.append({prompt: tokens(workers[0], prompt) for prompt in PROMPTS})
        say("all back")
        for worker in workers:
            updated(worker, versions[0])
    mixed = sum(all(answer != known[prompt] for known in expected) for prompt, answer in clients.answers)
    one = reports[1]
    figures = {
        "pause_over_transfer": one["paused_seconds"] / one["seconds"],
        "many_over_one": together / one["paused_seconds"],
        "storage_models_read": float(sum(report["path"] == "storage" for report in reports)),
        "mixed_answers": float(mixed),
        "failed_requests": float(len(clients.failures)),
        "answers": float(len(clients.answers)),
        "paused_seconds": one["paused_seconds"],
        "transfer_seconds": one["seconds"],
        "storage_paused_seconds": reports[0]["paused_seconds"],
    }
    return {"figures": {name: round(value, 4) for name, value in figures.items()}, "reports": reports}


@click.command()
@click.option("--engines", default=4, show_default=True, type=click.IntRange(3, 16), help="Engines.")
@click.option("--mib", default=512, show_default=True, type=click.IntRange(1), help="The model's size, in MiB.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with `figures`.")
def command(engines: int, mib: int, as_json: bool) -> None:
    """How long engines pause for another version, and what they answer meanwhile."""
    measured = measure(engines, mib, lambda text: print(text, file=sys.stderr, flush=True))
    if as_json:
        click.echo(json.dumps(measured, indent=2))
    else:
        for name, value in measured["figures"].items():
            click.echo(f"{name} {value:g}")
