"""The demo's processes (the server, and `vllm serve` with a given load format), and the questions to a worker."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mxbench.demo.processes import ENGINE_ENVIRONMENT, Child, DemoError
from mxbench.fleet.free_ports import free_port

SERVER_READY_SECONDS = 60.0
WORKER_READY_SECONDS = 420.0
REQUEST_SECONDS = 120.0
TOKENS = 16
PROMPTS = (
    "A worker that starts",
    "The server knows who has what",
    "Every byte is checked",
    "The quick brown fox",
)


class Server:
    """A real `mxserver` on a free port of `host`, by default the loopback interface; settings by environment name."""

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None, *, host: str = "127.0.0.1") -> None:
        self.child = Child(
            "mxserver",
            ["-m", "mxserver", "--host", host, "--port", "0", "--store-path", str(folder / "server.sqlite3")],
            settings or {},
            folder / "logs" / "mxserver.log",
        )
        self.address = ""

    def start(self) -> str:
        """Waits until the server listens; returns its address. Raises DemoError."""
        self.child.wait_until(self._listening, SERVER_READY_SECONDS)
        return self.address

    def _listening(self) -> bool:
        found = re.search(r"listening on (\d[\d.]*:\d+)", self.child.log.read_text(errors="replace"))
        self.address = found[1] if found else ""
        return bool(found)


class Worker:
    """One `vllm serve`, of `ranks` worker processes, called at `host`.

    `prefix` is a command that it runs under, `options` and `settings` are more arguments and environment variables.
    """

    def __init__(
        self,
        name: str,
        model: Path | str,
        folder: Path,
        *,
        load_format: str,
        pooling: bool,
        server: str | None = None,
        ranks: int = 1,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        options: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.pooling = pooling
        self.ranks = ranks
        self.host = host
        self.report_path = folder / "reports" / f"{name}.json"
        self.report_path.parent.mkdir(parents=True, exist_ok=True)
        for path in self._report_paths():
            path.unlink(missing_ok=True)
        self.port = free_port()
        command = ["-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "demo"]
        command += ["--host", host, "--port", str(self.port), "--load-format", load_format]
        command += ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4", "--seed", "0"]
        command += ["--max-num-batched-tokens", "256", "--kv-cache-memory-bytes", str(64 << 20)]
        command += ["--runner", "pooling"] if pooling else []
        command += ["--tensor-parallel-size", str(ranks)] if ranks > 1 else []
        command += options
        environment = {**ENGINE_ENVIRONMENT, "VLLM_CACHE_ROOT": str(folder / "cache"), **(settings or {})}
        if server is not None:
            command += ["--model-loader-extra-config", json.dumps({"report_path": str(self.report_path)})]
            environment |= {"MODEL_EXPRESS_URL": server, "MX_WORKER_HOST": host}
        self.child = Child(name, command, environment, folder / "logs" / f"{name}.log", prefix)

    def start(self) -> None:
        """Waits until the worker answers. Raises DemoError."""
        self.child.wait_until(self._healthy, WORKER_READY_SECONDS)

    def answers(self) -> list[Any]:
        """For each prompt: the embedding, or the greedy token ids with their log probabilities. One at a time."""
        return [self._embedding(prompt) if self.pooling else self._completion(prompt) for prompt in PROMPTS]

    def report(self) -> dict[str, Any]:
        """What the loader wrote (mxcore.engine.report), of all ranks together; empty with vLLM's own loaders."""
        reports = [json.loads(path.read_text()) for path in self._report_paths() if path.exists()]
        if len(reports) < self.ranks:
            return {}
        whole: dict[str, Any] = {**reports[0], "ranks": len(reports)}
        for name in ("tensors", "bytes", "chunks_verified"):
            whole[name] = sum(report[name] for report in reports)
        whole["seconds"] = max(report["seconds"] for report in reports)
        whole["gigabytes_per_second"] = whole["bytes"] / whole["seconds"] / 1e9 if whole["seconds"] else 0.0
        if any(report["path"] != "p2p" for report in reports):
            whole["path"] = "storage"
        return whole

    def _report_paths(self) -> list[Path]:
        others = [self.report_path.with_name(f"{self.report_path.name}.rank{rank}") for rank in range(1, self.ranks)]
        return [self.report_path, *others]

    def _healthy(self) -> bool:
        try:
            return self._request("GET", "/health")[0] == http.client.OK
        except (OSError, http.client.HTTPException):
            return False

    def _embedding(self, prompt: str) -> Any:
        return self._post("/v1/embeddings", {"input": prompt})["data"][0]["embedding"]

    def _completion(self, prompt: str) -> Any:
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1, "return_token_ids": True}
        choice = self._post("/v1/completions", body)["choices"][0]
        return {"token_ids": choice["token_ids"], "log_probabilities": choice["logprobs"]["token_logprobs"]}

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        status, answer = self._request("POST", path, json.dumps({"model": "demo", **body}))
        if status != http.client.OK:
            raise DemoError(f"{self.child.name} answered {path} with {status}: {answer[:500]!r}")
        return json.loads(answer)

    def _request(self, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=REQUEST_SECONDS)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()
