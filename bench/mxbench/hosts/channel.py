"""Ways to an agent: a process of this machine, ssh, or the port of `mx bench peer --listen`."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import IO, Any

from mxbench.hosts.agent import lines_of
from mxbench.hosts.errors import HostError

__all__ = ["Channel", "over_socket", "over_ssh", "started_here"]

AGENT = "mxbench.hosts"
CONNECT_SECONDS = 20.0
_END_SECONDS = 20.0


class Channel:
    """JSON objects to and from an agent. `send` from any thread, `told` from one."""

    def __init__(
        self, answers: IO[bytes], requests: IO[bytes], close: Callable[[], str], here: str, there: str
    ) -> None:
        """`close` ends the way and says what went wrong on it. `here`, `there`: addresses of both ends, if known."""
        self.here, self.there = here, there
        self._answers, self._requests, self._close = answers, requests, close
        self._lock = threading.Lock()

    def send(self, **told: Any) -> None:
        """Raises HostError when the other side is gone."""
        with self._lock:
            try:
                self._requests.write(json.dumps(told).encode() + b"\n")
                self._requests.flush()
            except (OSError, ValueError) as error:
                raise HostError(f"the connection is lost: {error}") from error

    def told(self) -> Iterator[dict[str, Any]]:
        """Until the connection ends, however it does."""
        with suppress(OSError, ValueError):
            yield from lines_of(self._answers)

    def close(self) -> str:
        """Ends the connection, and with it the processes that were started; what ssh said, if anything. Idempotent."""
        with self._lock, suppress(OSError, ValueError):
            self._requests.close()
        said = self._close()
        with suppress(OSError, ValueError):
            self._answers.close()
        return said


def started_here(python: str = sys.executable) -> Channel:
    """An agent as a process of this machine."""
    return _process([python, "-m", AGENT])


def over_ssh(target: str, python: str = "python3", config: str | None = None, options: Sequence[str] = ()) -> Channel:
    """An agent that ssh starts; ssh asks for nothing (BatchMode). `config`: its -F."""
    chosen = ["-F", config] if config else []
    ssh = ["ssh", "-T", *chosen, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS:.0f}", *options]
    # Of a machine that vanishes nothing is heard: without these ssh would wait for hours.
    alive = ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4"]
    return _process([*ssh, *alive, "--", target, f"exec {shlex.quote(python)} -m {AGENT}"])


def _process(command: Sequence[str]) -> Channel:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    errors, said = process.stderr, list[bytes]()
    reading = threading.Thread(target=lambda: said.extend(errors), daemon=True)
    reading.start()

    def close() -> str:
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reading.join(_END_SECONDS)
        errors.close()
        return b"".join(said[-5:]).decode(errors="replace").strip()

    return Channel(process.stdout, process.stdin, close, "", "")


def over_socket(host: str, port: int) -> Channel:
    """The agent at a port. Raises HostError."""
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    except OSError as error:
        raise HostError(f"nobody listens at {host}:{port} ({error}): start `mx bench peer --listen` there") from error
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    here, there = connection.getsockname()[0], connection.getpeername()[0]

    def close() -> str:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        return ""

    return Channel(connection.makefile("rb"), connection.makefile("wb"), close, here, there)
