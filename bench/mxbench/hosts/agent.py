"""The agent on a machine: starts processes of the benches for whoever is connected, and passes on what they say.

python -m mxbench.hosts takes one JSON object a line from stdin and answers on stdout; it is what ssh starts.
A connection of `mx bench peer --listen` is served in the same way. Only the programs in PROGRAMS are started. With the
connection end all processes that were started over it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["LINE_BYTES", "PROGRAMS", "Agent", "lines_of", "main"]

PROGRAMS = {
    "worker": "mxbench.fleet.model_worker",
    "server": "mxbench.fleet.server_process",
    "sockets": "mxbench.link.socket_end",
    "nixl": "mxbench.link.nixl_end",
    "verbs": "mxbench.link.verbs_end",
}
LINE_BYTES = 16 << 20
_SETTINGS = ("MX_", "UCX_", "MODEL_EXPRESS_")
_LOG_BYTES = 2000
_END_SECONDS = 10.0
_SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM)

Say = Callable[[dict[str, Any]], None]


class Agent:
    """The processes of one connection. `say` takes what is to be told, from any thread. Use `take` from one thread."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._children: dict[str, _Process] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="mx-bench-agent-")

    def take(self, told: dict[str, Any]) -> None:
        """One request; what is wrong with it is said, not raised."""
        try:
            self._do(told)
        except (KeyError, TypeError, ValueError, OSError) as error:
            self._say({"refused": f"{type(error).__name__}: {error}", "child": told.get("child", "")})

    def _do(self, told: dict[str, Any]) -> None:
        wanted = told["do"]
        if wanted == "describe":
            from mxbench.results import machine

            self._say({"machine": machine()})
        elif wanted == "spawn":
            self._spawn(str(told["child"]), str(told["program"]), told["task"], told.get("environ", {}))
        elif wanted == "send":
            self._children[told["child"]].send(str(told["line"]))
        elif wanted == "signal":
            self._children[told["child"]].signal(signal.Signals(told["number"]))
        elif wanted == "end":
            self._children[told["child"]].close_input()
        else:
            raise ValueError(f"no request {wanted!r}")

    def _spawn(self, child: str, program: str, task: Any, environ: dict[str, str]) -> None:
        if program not in PROGRAMS:
            raise ValueError(f"no program {program!r}")
        if child in self._children:
            raise ValueError(f"there is a process {child!r}")
        if foreign := [name for name in environ if not name.startswith(_SETTINGS)]:
            raise ValueError(f"{foreign[0]} is no setting of ours or UCX's")
        own = {name: value for name, value in os.environ.items() if not name.startswith(("MX_", "MODEL_"))}
        log = Path(self._folder.name) / f"{len(self._children)}.log"
        command = [sys.executable, "-m", PROGRAMS[program], json.dumps(task)]
        self._children[child] = _Process(command, {**own, **environ}, log, lambda event: self._tell(child, event))

    def _tell(self, child: str, event: dict[str, Any]) -> None:
        self._say({"child": child, "event": event})

    def close(self) -> None:
        """Ends all processes. Idempotent."""
        for process in self._children.values():
            process.close_input()
        for process in self._children.values():
            process.end()
        self._folder.cleanup()


class _Process:
    """One that says a JSON object a line, takes lines, and ends with its input."""

    def __init__(self, command: list[str], environ: dict[str, str], log: Path, say: Say) -> None:
        self._log, self._say = log, say
        with log.open("wb") as errors:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environ, text=True, bufsize=1
            )
        self._pumping = threading.Thread(target=self._pump, daemon=True)
        self._pumping.start()

    def _pump(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as lines:
            for line in lines:
                with suppress(ValueError):  # a word of some library's
                    self._say(json.loads(line))
        status = self._popen.wait()
        tail = self._log.read_bytes()[-_LOG_BYTES:].decode(errors="replace") if self._log.exists() else ""
        self._say({"event": "ended", "status": status, "log": tail})

    def send(self, line: str) -> None:
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):
            self._popen.stdin.write(line + "\n")

    def signal(self, number: signal.Signals) -> None:
        if number not in _SIGNALS:
            raise ValueError(f"{number.name} is not sent")
        if self._popen.poll() is None:
            self._popen.send_signal(number)

    def close_input(self) -> None:
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):
            self._popen.stdin.close()

    def end(self) -> None:
        try:
            self._popen.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            for number in (signal.SIGCONT, signal.SIGKILL):
                self._popen.send_signal(number)
            self._popen.wait()
        self._pumping.join()


def lines_of(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    """JSON objects, one a line. Ends with the stream; raises ValueError for what is none, or too long."""
    while line := stream.readline(LINE_BYTES + 1):
        if len(line) > LINE_BYTES:
            raise ValueError(f"a line of more than {LINE_BYTES} bytes")
        told = json.loads(line)
        if not isinstance(told, dict):
            raise ValueError(f"no JSON object: {line[:100]!r}")
        yield told


def serve(requests: IO[bytes], answers: IO[bytes]) -> bool:
    """Until the requests end, or nobody takes answers. Whether they ended with the request to finish."""
    lock = threading.Lock()

    def say(told: dict[str, Any]) -> None:
        with lock, suppress(OSError, ValueError):  # whoever asked is gone: the requests end as well
            answers.write(json.dumps(told).encode() + b"\n")
            answers.flush()

    agent = Agent(say)
    try:
        with suppress(OSError, ValueError):
            say({"agent": "ready"})
            for told in lines_of(requests):
                if told.get("do") == "finish":
                    return True
                agent.take(told)
    finally:
        agent.close()
    return False


def main() -> None:
    """Over stdin and stdout."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to stderr
    serve(sys.stdin.buffer, answers)
