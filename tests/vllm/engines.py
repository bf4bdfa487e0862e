"""The tests' side of `tests.vllm.engine_host`: engines in another process, their answers, reports and logs."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxbench.demo.processes import ENGINE_ENVIRONMENT, clean_environment

ANSWER_SECONDS = 300.0
STACKS_SECONDS = 2.0


@dataclass
class Loaded:
    """One engine's life: what it answered, its loader's report, what was logged meanwhile."""

    answers: list[Any]
    report: dict[str, Any]
    log: str
    report_path: Path
    default_steps: dict[str, float]  # seconds of vLLM's default loader, where it was that

    def of_rank(self, rank: int, part: str = "") -> dict[str, Any]:
        """A rank's report, of its model or of a `part` such as its draft."""
        name = ".".join(filter(None, (self.report_path.name, part, f"rank{rank}" if rank else "")))
        found: dict[str, Any] = json.loads(self.report_path.with_name(name).read_text())
        return found

    def ranks(self, count: int, part: str = "") -> list[dict[str, Any]]:
        """The reports of all ranks of an engine of several workers."""
        return [self.of_rank(rank, part) for rank in range(count)]


class EngineHost:
    """One process for engines. Not thread-safe. End it with `close`.

    One that gives no answer costs the command that it was asked, and is replaced by a new one at the next.

    `stock` leaves vLLM as it is, for measurements: without `engine_host.save_seconds`.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        server: str | None,
        environ: Mapping[str, str] | None = None,
        *,
        stock: bool = False,
    ) -> None:
        self.name = name
        self.folder = folder
        self.server = server
        self.log = folder / f"{name}.log"
        cache = {"VLLM_CACHE_ROOT": str(folder / "cache"), "MX_WORKER_HOST": "127.0.0.1"}
        self._command = [sys.executable, "-m", "tests.vllm.engine_host", *(["--stock"] if stock else [])]
        self._environ = {**clean_environment(), **ENGINE_ENVIRONMENT, **cache, **(environ or {})}
        self._log_file = self.log.open("wb")
        self.process = self._start()
        self._given_up = False
        self._loads = 0

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            cwd=Path(__file__).parents[2],
            env=self._environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            start_new_session=True,
        )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Runs a command there; fails the test when it raised, or gave no answer in time."""
        if self._given_up:
            self.process, self._given_up = self._start(), False
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], ANSWER_SECONDS)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            self._give_up()
        assert line, f"{self.name} gave no answer to {command}:\n{self.log.read_text(errors='replace')[-6000:]}"
        answer: dict[str, Any] = json.loads(line)
        assert answer["ok"], f"{command}: {answer['error']}\n{self.log.read_text(errors='replace')[-6000:]}"
        return answer

    def load(
        self,
        model: Path | str,
        load_format: str = "mx",
        extra: dict[str, Any] | None = None,
        keep: bool = False,
        ask: str | None = None,
        requests: int = 0,
        **options: Any,
    ) -> Loaded:
        """Starts an engine, asks it, and ends it unless it is to be kept until the command `end`.

        `extra` goes into the loader's extra configuration; `ask` is a method of its workers, to be asked instead;
        `requests` are that many more, whose answers nobody looks at.
        """
        report = self.folder / f"{self.name}-{self._loads}.json"
        self._loads += 1
        if load_format != "auto":
            settings = {"server_address": self.server} if self.server else {}
            options["model_loader_extra_config"] = {**settings, "report_path": str(report), **(extra or {})}
        before = self.log.stat().st_size
        answer = self.ask(
            "load",
            model=str(model),
            load_format=load_format,
            keep=keep,
            ask=ask,
            requests=requests,
            options=options,
        )
        log = self.log.read_bytes()[before:].decode(errors="replace")
        told = json.loads(report.read_text()) if report.exists() else {}
        return Loaded(answer["answers"], told, log, report, answer["steps"])

    def _give_up(self) -> None:
        """Ends the process and all that it started, its threads' stacks in the log."""
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(STACKS_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._close_pipes()
        self.process.wait()
        self._given_up = True

    def _close_pipes(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def renew(self) -> None:
        """Another process takes the next command: an engine that failed leaves vLLM's state in this one."""
        self._give_up()

    def freeze(self) -> None:
        """SIGSTOP: there, and silent."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL: nothing of it gets to run any more."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends the process in order; its exit code must be 0 unless it was killed."""
        self._close_pipes()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._log_file.close()
        assert self.process.returncode in (0, -signal.SIGKILL), self.log.read_text(errors="replace")[-4000:]
