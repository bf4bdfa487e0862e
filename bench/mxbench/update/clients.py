"""Who asks engines all the while, and which version each answer is of."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from mxbench.demo.workers import PROMPTS

__all__ = ["Client", "PauseWatch", "asking", "roll_out", "tokens_of", "update_engine"]

TOKENS = 4
REQUEST_SECONDS = 300.0
UPDATE_SECONDS = 600.0
GAP_SECONDS = 1.0  # between two requests of a client: engines that share two cores are to have time for updates
POLL_SECONDS = 0.05


def tokens_of(url: str, prompt: str, count: int = TOKENS) -> list[int]:
    """The engine's greedy answer. Raises OSError, HTTPException, KeyError."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": count, "temperature": 0, "return_token_ids": True}
    data, headers = json.dumps({**body, "ignore_eos": True}).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", data, headers)  # noqa: S310 - the bench's own engine
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:  # noqa: S310 - as above
            tokens: list[int] = json.loads(answer.read())["choices"][0]["token_ids"]
    except urllib.error.HTTPError as error:
        with error:
            raise OSError(f"HTTP {error.code}: {error.read()[:500]!r}") from None
    return tokens


def update_engine(url: str, uri: str) -> None:
    """Has an engine take what a URI names. Raises RuntimeError unless it has replaced its weights by it."""
    data, headers = json.dumps({"uri": uri, "version": uri}).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/mx/update", data, headers)  # noqa: S310 - the bench's own engine
    try:
        with urllib.request.urlopen(request, timeout=UPDATE_SECONDS) as answer:  # noqa: S310 - as above
            told = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            raise RuntimeError(f"{url} did not take {uri}: {error.code} {error.read()[:500]!r}") from error
    if not told.get("changed"):
        raise RuntimeError(f"{url} had {uri} already")


def roll_out(urls: Sequence[str], uri: str) -> dict[str, Any]:
    """`mx rollout`, engine by engine; what it says. Raises RuntimeError unless all have it."""
    command = [sys.executable, "-c", "from mxcore.cli.main import main; main()", "rollout", "demo"]
    command += ["--to", uri, "--json", "--engines", *urls]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=UPDATE_SECONDS, check=False)
    if ran.returncode:
        raise RuntimeError(f"mx rollout ended with {ran.returncode}: {ran.stdout}{ran.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(ran.stdout)
    return told


class Client:
    """Asks one engine, one request after the other. `answers` has prompts with tokens, `failures` what was none."""

    def __init__(self, url: str, gap_seconds: float = GAP_SECONDS, tokens: int = TOKENS) -> None:
        self.answers: list[tuple[str, list[int]]] = []
        self.failures: list[str] = []
        self._url = url
        self._gap_seconds = gap_seconds
        self._tokens = tokens
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asked = 0
        while not self._over.is_set():
            prompt = PROMPTS[asked % len(PROMPTS)]
            asked += 1
            try:
                self.answers.append((prompt, tokens_of(self._url, prompt, self._tokens)))
            except (OSError, http.client.HTTPException, KeyError, ValueError) as error:
                self.failures.append(f"{self._url}: {error!r}")
            self._over.wait(self._gap_seconds)

    def end(self) -> None:
        """After the answer to what was asked last."""
        self._over.set()
        self._thread.join(REQUEST_SECONDS)


@contextmanager
def asking(
    urls: Sequence[str], each: int = 1, gap_seconds: float = GAP_SECONDS, tokens: int = TOKENS
) -> Iterator[list[Client]]:
    """So many clients for each engine; they have ended, with all their answers, when the block has."""
    clients = [Client(url, gap_seconds, tokens) for url in urls for _ in range(each)]
    try:
        yield clients
    finally:
        for client in clients:
            client.end()


class PauseWatch:
    """When an engine took weights, by its readiness: from the end of the drain until it answers again."""

    def __init__(self, url: str) -> None:
        self.began = 0.0
        self.ended = 0.0
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PauseWatch:
        self._thread.start()
        return self

    def __exit__(self, *_failure: object) -> None:
        self._over.set()
        self._thread.join(REQUEST_SECONDS)

    @property
    def seconds(self) -> float:
        """0 where no pause was seen."""
        return max(0.0, self.ended - self.began)

    def _run(self) -> None:
        while not self._over.is_set():
            phase = self._phase()
            if phase == "updating" and not self.began:
                self.began = time.monotonic()
            elif phase == "ready" and self.began and not self.ended:
                self.ended = time.monotonic()
            self._over.wait(POLL_SECONDS)
        if self.began and not self.ended:
            self.ended = time.monotonic()

    def _phase(self) -> str:
        connection = http.client.HTTPConnection(self._url.removeprefix("http://"), timeout=REQUEST_SECONDS)
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            data = answer.read()
            if answer.status == http.client.OK:
                return "ready"
            with suppress(ValueError):
                told: dict[str, Any] = json.loads(data)
                return str(told.get("phase", ""))
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        return ""
