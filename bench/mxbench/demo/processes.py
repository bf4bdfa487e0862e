"""Child processes of the demo: in a session of their own, watched until ready, ended with all their children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

STOP_SECONDS = 30.0
POLL_SECONDS = 0.2
TAIL_LINES = 25
AWAY = "away"  # folder beside weight files that are moved away

ENGINE_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_AOT_COMPILE": "0",  # it insists on the compiler
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process fewer a worker: on two cores a third of the start-up time
    "VLLM_NO_USAGE_STATS": "1",
}
"""What vLLM's CPU build needs on a small machine without a network."""


class DemoError(Exception):
    """The demo cannot continue; the message says why and where the log is."""


cancelled = threading.Event()
"""Set when the demo gives up, so that nothing waits for a process any more."""


class Child:
    """One child process with its log. `stop` ends it and everything that it started; idempotent.

    `prefix` is a command that runs it elsewhere: in a network namespace.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, prefix: Sequence[str] = ()
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, *command],
                env={**clean_environment(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process, which is the leader of its group."""
        return self._process.pid

    def wait_until(self, ready: Callable[[], bool], timeout_seconds: float) -> None:
        """Polls `ready`; raises DemoError when the process ends or the time is over."""
        deadline = time.monotonic() + timeout_seconds
        while not ready():
            code = self._process.poll()
            if code is not None:
                raise DemoError(f"{self.name} ended with code {code} before it was ready{self.tail()}")
            if cancelled.is_set():
                raise DemoError(f"{self.name} is no longer waited for")
            if time.monotonic() > deadline:
                raise DemoError(f"{self.name} was not ready after {timeout_seconds:g} s{self.tail()}")
            time.sleep(POLL_SECONDS)

    def tail(self) -> str:
        """The log's last lines and its path, for a message."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return f"; the end of {self.log}:\n" + "\n".join(lines)

    def stop(self, timeout_seconds: float = STOP_SECONDS) -> int | None:
        """SIGTERM, then SIGKILL to the whole group; returns the exit code, None when it had to be killed."""
        code: int | None = None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout_seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        return code


def clean_environment() -> dict[str, str]:
    """This process' environment without settings of ours, so that the demo shows what it sets itself."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MX_", "MODEL_EXPRESS_"))}


@contextlib.contextmanager
def files_away(files: Sequence[Path]) -> Iterator[None]:
    """Moves files into a folder beside them and back again, whatever happens meanwhile."""
    try:
        for file in files:
            away = file.parent / AWAY
            away.mkdir(exist_ok=True)
            file.replace(away / file.name)
        yield
    finally:
        for folder in {file.parent for file in files}:
            bring_back(folder)


def bring_back(folder: Path) -> None:
    """Moves files back that a killed earlier run may have left moved away."""
    away = folder / AWAY
    if away.is_dir():
        for file in away.iterdir():
            file.replace(folder / file.name)
        away.rmdir()
