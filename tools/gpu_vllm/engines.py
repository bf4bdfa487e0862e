"""Engines of one run: a process each, started when it is first asked for or warmed before, ended by name or all."""

from __future__ import annotations

import contextlib
import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mxbench.demo.workers import Server
from tests.vllm.engines import EngineHost, Loaded
from tools.gpu_vllm import engine_options
from tools.gpu_vllm.machine import Machine

PAGE_SECONDS = 5.0
POLL_SECONDS = 0.02
GOING_SECONDS = 600.0  # its engine has to start first


class Engines:
    """A server, and processes for engines. Not thread-safe but for `cut`. End it with `close`."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        self._hosts: dict[str, EngineHost] = {}
        self._seen: set[str] = set()  # workers whose loads were waited for: one that was killed stays on the page
        self._server = Server(folder)
        self.address = self._server.start()

    def warm(self, *names: str) -> None:
        """Starts processes, which import vLLM meanwhile; an engine is the next `load`'s."""
        for name in names:
            if name in self._hosts:
                continue
            host = EngineHost(name, self.folder, self.address, engine_options.environment(gpu=self.machine.gpu))
            self._hosts[name] = host

    def load(self, name: str, model: Path, load_format: str = "mx", **arguments: Any) -> Loaded:
        """Starts an engine, asks it, ends it; what it serves stays. Raises AssertionError with the log's end."""
        self.warm(name)
        extra = arguments.pop("extra", {})
        if load_format != "auto":
            extra = {"layout": "processed", **extra}
        options = {**engine_options.options(gpu=self.machine.gpu), **arguments}
        if not self.machine.gpu:
            self._hosts[name].ask("plain_linear", on=True)
        return self._hosts[name].load(model, load_format, extra, **options)

    def ask(self, name: str, command: str, **arguments: Any) -> dict[str, Any]:
        """A command of `tests.vllm.engine_host`."""
        self.warm(name)
        return self._hosts[name].ask(command, **arguments)

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self._hosts[name].kill()

    def wait_until_receiving(self, alive: Callable[[], bool]) -> dict[str, Any]:
        """Until the server was told of a new load that has some of its bytes, not all, from a worker, which each call
        tells once. Raises ValueError."""
        log = self._server.child.log.read_text()
        page = re.search(r"status page on (http://\S+)", log)
        if page is None:
            raise ValueError(f"the server has no status page: {log[-500:]}")
        deadline = time.monotonic() + GOING_SECONDS
        while time.monotonic() < deadline and alive():
            loads = _status(page[1])["loads"]
            for load in loads:
                if load["worker_id"] in self._seen:
                    continue
                if load["from_worker_id"] and 0 < load["bytes_done"] < load["bytes_total"]:
                    self._seen.add(load["worker_id"])
                    return {name: load[name] for name in ("bytes_done", "bytes_total", "path")}
            time.sleep(POLL_SECONDS)
        raise ValueError("no transfer was seen on its way")

    def end(self, *names: str) -> list[Path]:
        """Ends processes (all, if none is named); returns their logs. Whoever was killed has been."""
        logs = []
        for name in names or tuple(self._hosts):
            if (host := self._hosts.pop(name, None)) is not None:
                with contextlib.suppress(AssertionError, OSError):  # its log says how it ended
                    host.close()
                logs.append(host.log)
        return logs

    def cut(self) -> None:
        """Kills all engines' processes, from any thread: who waits for an answer gets none."""
        for host in list(self._hosts.values()):
            host.process.kill()

    def close(self) -> list[Path]:
        """Ends everything; returns all logs, the server's too."""
        logs = self.end()
        self._server.child.stop()
        return [*logs, self._server.child.log]


def _status(page: str) -> dict[str, Any]:
    """What the server's status page knows. Raises OSError."""
    with urllib.request.urlopen(f"{page}/status", timeout=PAGE_SECONDS) as answer:  # noqa: S310 - our server's
        found: dict[str, Any] = json.load(answer)
    return found


@contextlib.contextmanager
def engines(machine: Machine, folder: Path) -> Iterator[Engines]:
    """They end with the context, and so does the server."""
    made = Engines(machine, folder)
    try:
        yield made
    finally:
        made.close()
