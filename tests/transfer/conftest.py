"""Workers and servers as real processes."""

from __future__ import annotations

import gc
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mxbench.fleet.fleet import settings_of
from mxcore.nixl.agent import live_agents, live_transfers
from mxcore.transfer.move import Source
from mxserver.server import Server
from mxserver.settings import load_settings
from tests.transfer.fleet_member import Member, NewMember

ROOT = Path(__file__).parents[2]
# A processor that is emulated (`make test-rdma`) takes half a minute to start three workers, minutes on a busy machine.
DEADLINE_SECONDS = 60.0 if not os.environ.get("TEST_RDMA") else 600.0
STACKS_SECONDS = 2.0  # to write them

# The RDMA ports of workers and of this process; none but in `make test-rdma`.
RDMA_PORTS = [name for name in os.environ.get("TEST_RDMA", "").split(",") if name]
if RDMA_PORTS:
    os.environ["UCX_NET_DEVICES"] = f"{RDMA_PORTS[-1]},lo"
# As if on another node: neither this host's memory nor UCX's shared memory reaches it.
OTHER_NODE = ("unshare", "--pid", "--ipc", "--uts", "--fork", "--mount-proc", "--kill-child")


class WorkerProcess:
    """A `tests.transfer.worker`; `ask` sends one line and returns the answer.

    `launcher` is a command that starts another one, as the worker's only parent.
    """

    def __init__(self, task: dict[str, Any], environ: dict[str, str], launcher: Sequence[str] = ()) -> None:
        names = {name: value for name, value in os.environ.items() if not name.startswith(("UCX_", "MX_"))}
        self.process = subprocess.Popen(
            [*launcher, sys.executable, "-m", "tests.transfer.worker", json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**names, **environ},
            text=True,
            bufsize=1,
        )
        self._launched = bool(launcher)

    def send(self, **line: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_SECONDS)
        if not ready:
            self._tell_where_it_is()
        assert ready, "the worker gave no answer; its threads are where stderr says"
        line = self.process.stdout.readline()
        assert line, f"the worker ended with {self.process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **line: Any) -> dict[str, Any]:
        self.send(**line)
        return self.read()

    def serve(self, **line: Any) -> Source:
        answer = self.ask(do="serve", **line)
        return Source(answer["source_id"], answer["worker_id"], 0, answer["endpoint"])

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the worker, which has answered before."""
        os.kill(self._pid(), number)
        if number == signal.SIGKILL:
            self.process.wait()

    def _pid(self) -> int:
        """Of the worker itself."""
        pid = self.process.pid
        while self._launched and (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            [pid] = map(int, children)
        return pid

    def _tell_where_it_is(self) -> None:
        """All threads' stacks to its stderr, which pytest shows with the failure, and where the kernel has them."""
        with suppress(OSError):  # a kernel's stack is root's to see
            for task in sorted(Path(f"/proc/{self._pid()}/task").iterdir()):
                used = (task / "stat").read_text().rpartition(")")[2].split()
                where = [(task / name).read_text().strip() for name in ("comm", "wchan", "syscall", "stack")]
                told = (task.name, "state", used[0], "user", used[11], "system", used[12], *where)
                sys.stderr.write(" ".join(told) + "\n")
        with suppress(OSError, ValueError):  # it has ended, or has not come so far
            os.kill(self._pid(), signal.SIGUSR1)
            time.sleep(STACKS_SECONDS)

    def end(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.kill()
        self.process.wait()


StartWorker = Callable[..., WorkerProcess]


@pytest.fixture
def start_worker() -> Iterator[StartWorker]:
    """Starts workers; ended after the test. `transport` is that of the process, as mxbench.fleet.settings_of has them.

    With RDMA ports, each is on a node of its own, at the first port.
    """
    workers: list[WorkerProcess] = []

    def start(
        transport: str = "tcp", environ: dict[str, str] | None = None, launcher: Sequence[str] = (), **task: Any
    ) -> WorkerProcess:
        values = {**settings_of(transport), **(environ or {})}
        if RDMA_PORTS:
            values.setdefault("UCX_NET_DEVICES", f"{RDMA_PORTS[0]},lo")
            launcher = (*OTHER_NODE, *launcher)
        workers.append(WorkerProcess(task, values, launcher))
        return workers[-1]

    yield start
    for worker in workers:
        worker.end()


class ServerProcess:
    """A real mxserver on a free port; `restart` keeps the port and the state."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.address = self._start("0")

    def _start(self, port: str) -> str:
        log = self._folder / "server.log"
        arguments = ["--host", "127.0.0.1", "--port", port, "--store-path", str(self._folder / "state.sqlite3")]
        arguments += ["--metrics-port", "0", "--files-port", "0"]  # also where the port is the one from before
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mxserver", *arguments], stderr=stderr, cwd=ROOT, env={**os.environ}
            )
        address: list[str] = wait_for(lambda: re.findall(r"listening on (\S+)", log.read_text()))
        return address[0]

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0

    def restart(self, *, lose_state: bool = False) -> None:
        if lose_state:
            for file in self._folder.glob("state.sqlite3*"):
                file.unlink()
        assert self._start(self.address.rpartition(":")[2]) == self.address


@pytest.fixture
def server_process(tmp_path: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(tmp_path)
    yield process
    if process.process.poll() is None:
        process.stop()


@dataclass(frozen=True)
class RunningServer:
    address: str


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[RunningServer | ServerProcess]:
    """A server of this process, which starts at once; the process of tests that name `server_process`."""
    if "server_process" in request.fixturenames:
        yield request.getfixturevalue("server_process")
        return
    running = Server(load_settings({"host": "127.0.0.1", "port": "0", "store": "memory", "drain_seconds": "1"}))
    yield RunningServer(f"127.0.0.1:{running.port}")
    running.close()


@pytest.fixture
def new_member(server: RunningServer) -> Iterator[NewMember]:
    """Makes workers of this process at `server`; closed after the test."""
    members: list[Member] = []

    def make(seed: int | None = None, megabytes: int = 4, **changes: Any) -> Member:
        members.append(Member(server.address, seed, megabytes, **changes))
        return members[-1]

    yield make
    for member in members:
        member.membership.close()


def wait_for(condition: Callable[[], Any]) -> Any:
    """The condition's first true value; fails after a minute."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError("the condition did not become true")


@pytest.fixture(autouse=True)
def nothing_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Every agent and transfer that a test makes is gone after it."""
    yield
    caplog.get_records("call").clear()  # they hold errors, these their tracebacks, and those the transfers
    gc.collect()  # tracebacks of errors hold frames in cycles
    assert live_agents() == 0
    assert live_transfers() == 0
