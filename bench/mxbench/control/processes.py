"""The processes of `mx bench control` (servers, Redis, simulated workers), and the cores that they may use."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LISTENING = re.compile(r"listening on (\S+:\d+)")
START_SECONDS = 60.0


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (proc(5), fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    """Its memory in RAM (proc(5), VmRSS)."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


class Server:
    """An mxserver on a free port; `core` is the only one that it runs on."""

    def __init__(self, folder: Path, number: int, arguments: list[str], core: int, *, wait: bool = True) -> None:
        """Without `wait`, the server may not listen yet, and has no address."""
        self._log = folder / f"server-{number}.log"
        command = [sys.executable, "-m", "mxserver", "--host", "127.0.0.1", "--port", "0"]
        names = {k: v for k, v in os.environ.items() if not k.startswith(("MX_", "MODEL_EXPRESS_", "REDIS_"))}
        with self._log.open("w") as stderr:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stderr=stderr,
                env=names,
            )
        os.sched_setaffinity(self.process.pid, {core})  # before it has threads: they take it over
        self.address = self._wait() if wait else ""

    def _wait(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := LISTENING.search(self._log.read_text()):
                return found[1]
            time.sleep(0.02)
        raise RuntimeError(f"mxserver did not start: {self._log.read_text()}")

    def stop(self) -> None:
        self.process.terminate()
        if self.process.wait(60) != 0:
            raise RuntimeError(f"mxserver ended with {self.process.returncode}: {self._log.read_text()[-2000:]}")


class Redis:
    """A redis-server that keeps what it acknowledges, on a socket."""

    def __init__(self, folder: Path, core: int) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise RuntimeError("redis-server is missing: install Debian's package redis-server")
        self.url = f"unix://{folder}/redis.sock"
        command = [program, "--port", "0", "--unixsocket", f"{folder}/redis.sock", "--dir", str(folder), "--save", ""]
        self.process = subprocess.Popen(
            [*command, "--appendonly", "yes", "--appendfsync", "always"],
            stdout=subprocess.DEVNULL,
        )
        os.sched_setaffinity(self.process.pid, {core})
        deadline = time.monotonic() + START_SECONDS
        while not (folder / "redis.sock").exists():
            if time.monotonic() > deadline:
                raise RuntimeError("redis-server did not start")
            time.sleep(0.02)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


class Clients:
    """A process of simulated workers."""

    def __init__(self, cores: set[int]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mxbench.control.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        os.sched_setaffinity(self.process.pid, cores)

    def send(self, **what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"simulated workers ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def stop(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait(60)
