"""The machines of a cluster while a step runs: connected, with a deadline, everything ended with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from mxbench.cluster.hosts_file import HostLine
from mxbench.fleet import Shape, scaled
from mxbench.hosts import Child, Host, HostError
from mxbench.peer import TRANSPORTS

__all__ = ["Asked", "Cluster"]

Item = TypeVar("Item")
Made = TypeVar("Made")
_MOST_THREADS = 64
_STALL_SECONDS = 30


class Asked(NamedTuple):
    """What is measured: a model of `size_bytes` in `chunk_bytes`, by a transport; plain connections for `seconds`."""

    size_bytes: int
    chunk_bytes: int
    transport: str
    connections: int
    seconds: float
    folder: str

    @property
    def shape(self) -> Shape:
        """The model's tensors."""
        return scaled("few", self.size_bytes)


class Cluster:
    """Connected machines, in the order of the file; the first has the server and the first copy."""

    def __init__(self, lines: Sequence[HostLine], asked: Asked, step_seconds: float, ssh_config: str | None) -> None:
        """Raises HostError when one cannot be reached."""
        self.asked = asked
        self.hosts: list[Host] = []
        self._serial = 0
        deadline = time.monotonic() + step_seconds
        failed: list[HostError] = []

        def connect(line: HostLine) -> Host | None:
            try:
                return line.connect(ssh_config)
            except HostError as error:
                failed.append(error)
                return None

        self.hosts = [host for host in self.at_once(connect, lines) if host is not None]
        if failed:
            self.close()
            raise HostError("; ".join(str(error) for error in failed))
        for host in self.hosts:
            host.deadline = deadline

    def at_once(self, run: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
        """Runs it for all of them at the same time; raises the first failure after all have ended."""
        with ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="mx-bench") as pool:
            return list(pool.map(run, items))

    def server(self) -> str:
        """Starts a server on the first machine; its address."""
        host = self.hosts[0]
        told = host.spawn("server", {"host": host.address}).expect("listening")
        return str(told["address"])

    def worker(
        self, host: Host, server: str, role: str, strategy: str, *, readers: int = 8, from_folder: bool = False
    ) -> Child:
        """Starts a worker there; `readers`: how many it serves at once."""
        asked = self.asked
        task: dict[str, Any] = {
            "model": "bench/cluster",
            "content": 5,
            "shape": asked.shape,
            "chunk_bytes": asked.chunk_bytes,
            "role": role,
            "strategy": strategy,
            "settings": {"MX_SOURCE_MAX_READERS": readers, "MX_HEARTBEAT_INTERVAL_SECS": 2},
            **({"folder": asked.folder} if from_folder else {}),
        }
        environ = {
            "MX_SERVER_ADDRESS": server,
            "MX_WORKER_HOST": host.address,
            "MX_STALL_TIMEOUT_SECS": str(_STALL_SECONDS),
            "MX_TRANSFER_TIMEOUT": "3600",
            **TRANSPORTS.get(asked.transport, {"MX_TRANSPORT": "auto"}),
        }
        return host.spawn("worker", task, environ)

    def close(self) -> None:
        """Ends everything on all machines. Idempotent."""

        def close(host: Host) -> None:
            with suppress(HostError):
                host.close()

        self.at_once(close, self.hosts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
