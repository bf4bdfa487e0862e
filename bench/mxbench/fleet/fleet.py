"""Fleets of real processes for benches: a server and workers, on this host or each in a shaped network namespace."""

from __future__ import annotations

import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BY_NIXL = "tcp-by-nixl"
DEADLINE_SECONDS = 180.0
_serial = itertools.count()


def settings_of(transport: str) -> dict[str, str]:
    """The settings for a value of MX_TRANSPORT. BY_NIXL: TCP by UCX's WRITEs instead of our own connections."""
    return {"MX_TRANSPORT": "tcp", "MX_TCP_TRANSFER": "nixl"} if transport == BY_NIXL else {"MX_TRANSPORT": transport}


class FleetError(RuntimeError):
    """A process of the fleet did not do what the bench expected."""


class Network:
    """A bridge, and a namespace a worker whose link carries `megabits` a second each way (tc tbf). Needs root.

    `megabits` is one rate for all links, or one for each.
    """

    def __init__(self, workers: int, megabits: float | Sequence[float]) -> None:
        number = next(_serial)
        self.tag = f"mx{os.getpid() % 10000}{chr(ord('a') + number % 26)}"  # names of links are short
        # Two at once, of one process or of several, have addresses of their own: the host has a route to each.
        self._subnet = f"10.213.{(os.getpid() * 31 + number) % 255}"
        self.host = f"{self._subnet}.1"
        self._workers = workers
        self._megabits = [megabits] * workers if isinstance(megabits, int | float) else list(megabits)

    def prefix(self, worker: int) -> list[str]:
        return ["ip", "netns", "exec", f"{self.tag}n{worker}"]

    def address(self, worker: int) -> str:
        return f"{self._subnet}.{worker + 2}"

    def link(self, worker: int, up: bool) -> None:
        _run("ip", "link", "set", f"{self.tag}v{worker}", "up" if up else "down")

    def __enter__(self) -> Self:
        bridge = f"{self.tag}b"
        try:
            _run("ip", "link", "add", bridge, "type", "bridge")
            _run("ip", "addr", "add", f"{self.host}/24", "dev", bridge)
            _run("ip", "link", "set", bridge, "up")
            for worker in range(self._workers):
                space, outer, inner = (f"{self.tag}{letter}{worker}" for letter in "nvw")
                _run("ip", "netns", "add", space)
                _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", space)
                _run("ip", "link", "set", outer, "master", bridge, "up")
                inside = ["ip", "-n", space]
                _run(*inside, "addr", "add", f"{self.address(worker)}/24", "dev", inner)
                _run(*inside, "link", "set", inner, "up")
                _run(*inside, "link", "set", "lo", "up")
                shape = _shape(self._megabits[worker])
                _run("tc", "qdisc", "add", "dev", outer, "root", "tbf", *shape)
                _run("tc", "-n", space, "qdisc", "add", "dev", inner, "root", "tbf", *shape)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        for worker in range(self._workers):
            subprocess.run(["ip", "netns", "del", f"{self.tag}n{worker}"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self.tag}b"], check=False, capture_output=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _shape(megabits: float) -> list[str]:
    """tbf's settings. The bucket holds what the link carries in 10 ms: a smaller one holds fast links down."""
    return ["rate", f"{megabits}mbit", "burst", f"{max(256, round(megabits * 1.25))}kb", "latency", "50ms"]


class Process:
    """A worker; its lines arrive in `lines`."""

    def __init__(
        self, task: dict[str, Any], environ: dict[str, str], prefix: Sequence[str], log: Path, slot: int, module: str
    ) -> None:
        self.slot = slot  # its place in the network
        names = {name: value for name, value in os.environ.items() if not name.startswith(("UCX_", "MX_", "MODEL_"))}
        self.log = log
        with log.open("w") as stderr:
            self.popen = subprocess.Popen(
                [*prefix, sys.executable, "-m", module, json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**names, **environ},
                text=True,
                bufsize=1,
            )
        self.lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.progress: list[tuple[float, int]] = []
        self.lost: list[dict[str, Any]] = []  # which source was dropped when, and why
        self._pumping = threading.Thread(target=self._pump, daemon=True)
        self._pumping.start()

    def _pump(self) -> None:
        if self.popen.stdout is not None:
            with self.popen.stdout as lines:
                for line in lines:
                    self._take(json.loads(line))
        self.lines.put({"event": "ended", "status": self.popen.wait()})

    def _take(self, message: dict[str, Any]) -> None:
        if message["event"] == "progress":
            self.progress.append((message["at"], message["bytes"]))
        elif message["event"] == "lost":
            self.lost.append(message)
        else:
            self.lines.put(message)

    def send(self, line: str) -> None:
        """Sends it a command; does nothing if it has died."""
        if self.popen.stdin is not None:
            with suppress(BrokenPipeError):
                self.popen.stdin.write(line + "\n")

    def expect(self, event: str, seconds: float = DEADLINE_SECONDS) -> dict[str, Any]:
        """The next line, which must be of this event. Raises FleetError."""
        try:
            message = self.lines.get(timeout=seconds)
        except queue.Empty:
            raise FleetError(f"no {event!r} within {seconds:g} s; its log ends: {self.tail()}") from None
        if message["event"] != event:
            raise FleetError(f"{message} instead of {event!r}; its log ends: {self.tail()}")
        return message

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def signal(self, number: int) -> None:
        if self.alive:
            self.popen.send_signal(number)

    def until(self, count: float, seconds: float = DEADLINE_SECONDS) -> None:
        """Waits until it has reported this many bytes. Raises FleetError."""
        deadline = time.monotonic() + seconds
        while not self.progress or self.progress[-1][1] < count:
            if time.monotonic() > deadline or not self.alive:
                raise FleetError(f"a receiver did not get going; its log ends: {self.tail()}")
            time.sleep(0.002)

    def leave(self) -> None:
        """Lets it leave the fleet and end."""
        if self.popen.stdin is not None:
            self.popen.stdin.close()
        self.popen.wait(DEADLINE_SECONDS)

    def end(self) -> None:
        for number in (signal.SIGCONT, signal.SIGKILL):
            self.signal(number)
        self.popen.wait()
        self._pumping.join()
        if self.popen.stdin is not None:
            with suppress(BrokenPipeError):
                self.popen.stdin.close()

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-1500:]


class Fleet:
    """A server and workers; all of them end with the context. Without a `server` nobody knows of the others."""

    def __init__(self, network: Network | None = None, *, server: bool = True, metrics_port: int = 0) -> None:
        """`metrics_port` of the server, 0: it tells none."""
        self._metrics_port = metrics_port
        self._stack = ExitStack()
        self._network = network
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.workers: list[Process] = []
        self._port = "0"
        self.server: subprocess.Popen[bytes] | None = None
        self.address = ""
        if server:
            self.start_server()

    def start_server(self) -> None:
        """Starts the server, or starts it again on the same port with the same state."""
        log = self._folder / "server.log"
        host = self._network.host if self._network else "127.0.0.1"
        arguments = ["--host", host, "--port", self._port, "--store-path", str(self._folder / "state.sqlite3")]
        with log.open("w") as stderr:
            arguments += ["--metrics-port", str(self._metrics_port), "--files-port", "0"]
            command = [sys.executable, "-m", "mxserver", *arguments]
            self.server = server = subprocess.Popen(command, stderr=stderr)
        deadline = time.monotonic() + 30
        while not (found := re.findall(r"listening on (\S+)", log.read_text())):
            if time.monotonic() > deadline or server.poll() is not None:
                raise FleetError(f"the server did not start: {log.read_text()[-1000:]}")
            time.sleep(0.02)
        self.address = found[0]
        self._port = self.address.rpartition(":")[2]

    def server_calls(self) -> int:
        """How many calls the server has answered, by its metrics."""
        host = self._network.host if self._network else "127.0.0.1"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{host}:{self._metrics_port}/metrics", timeout=DEADLINE_SECONDS) as answer:
            text = answer.read().decode()
        counts = re.findall(r"^mxserver_call_duration_seconds_count\{.*\} (\S+)$", text, re.MULTILINE)
        return round(sum(map(float, counts)))

    def kill_server(self) -> None:
        """By SIGKILL, if there is one."""
        if self.server is not None:
            self.server.kill()
            self.server.wait()

    def add(
        self,
        task: dict[str, Any],
        *,
        transport: str = "tcp",
        environ: dict[str, str] | None = None,
        module: str = "mxbench.fleet.model_worker",
    ) -> Process:
        """Starts a worker; in a network, in the first free place.

        `transport`: as `settings_of` has them.
        """
        number = len(self.workers)
        taken = {worker.slot for worker in self.workers if worker.alive}
        slot = next(slot for slot in itertools.count() if slot not in taken)
        network = self._network
        names = {"MX_SERVER_ADDRESS": self.address, **settings_of(transport), **(environ or {})}
        if network is not None:
            names["MX_WORKER_HOST"] = network.address(slot)
        prefix = network.prefix(slot) if network is not None else []
        self.workers.append(Process(task, names, prefix, self._folder / f"worker{number}.log", slot, module))
        return self.workers[-1]

    def link(self, process: Process, *, up: bool) -> None:
        """Cuts a worker off the network, or restores its link."""
        if self._network is None:
            raise FleetError("this fleet runs without a network of namespaces")
        self._network.link(process.slot, up)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            worker.end()
        self.kill_server()
        self._stack.close()


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise FleetError(f"{' '.join(command)}: {done.stderr.strip()}")
