"""Serves the metrics of all ranks of an engine on one port, in a process of its own, which outlives any of them.

A program: `python exporter.py FOLDER PORT LINGER_SECONDS`, started by each rank (`starting`); the one that gets the
folder's lock serves. It leaves the engine's tree at once, and ends when no rank has lived for so long. It imports
nothing of ours.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

LOOK_SECONDS = 0.5  # between two looks at which ranks live
STANDBY_SECONDS = 4 * LOOK_SECONDS  # until who serves has seen a new rank, or has ended
ANSWER_SECONDS = 10.0
MOST_CONNECTIONS = 16
_RANK = "rank_"
_KEPT = "0"  # in the names of files: counts of ranks that are gone


class Ranks:
    """The ranks of a folder: who lives holds a lock on its file. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self.living: set[str] = set()
        self.lost = 0

    def look(self) -> int:
        """How many live. What those counted that do not is added to what is kept; who left no goodbye is lost."""
        stored = {
            path.stem.rpartition("_")[2] for path in self.folder.glob("*.db")
        }  # before the ranks: theirs is first
        named = {path.name.removeprefix(_RANK): path for path in self.folder.glob(_RANK + "*")}
        living = {identity for identity, path in named.items() if _is_locked(path)}
        with self.lock:
            for identity in self.living - living:
                self.lost += identity in named and named[identity].exists()  # who leaves takes it away
            self.living = living
            for identity in stored - living - {_KEPT}:
                self._fold(identity)
            for identity in named.keys() - living:
                named[identity].unlink(missing_ok=True)
        return len(living)

    def _fold(self, identity: str) -> None:
        from prometheus_client import mmap_dict

        files: Any = mmap_dict.MmapedDict  # it has no types

        for path in self.folder.glob(f"*_{identity}.db"):
            kind = path.name.partition("_")[0]
            if kind != "gauge":
                kept = files(str(self.folder / f"{kind}_{_KEPT}.db"))
                for key, value, timestamp, _ in files.read_all_values_from_file(str(path)):
                    kept.write_value(key, kept.read_value(key)[0] + value, timestamp)
                kept.close()
            path.unlink(missing_ok=True)

    def forget(self) -> None:
        """What is kept is gone: the next exporter begins anew."""
        for path in self.folder.glob(f"*_{_KEPT}.db"):
            path.unlink(missing_ok=True)

    def collect(self) -> Iterable[Any]:
        """For prometheus_client's registry: the sums of all ranks, and the ranks."""
        from prometheus_client import multiprocess
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        collector: Any = multiprocess.MultiProcessCollector  # it has no types

        with self.lock:
            counted = list(collector(None, path=str(self.folder)).collect())
            living, lost = len(self.living), self.lost
        yield from counted
        yield GaugeMetricFamily("mxworker_ranks", "ranks of this engine on this machine that live", value=living)
        meaning = "ranks that were killed, or ended without a goodbye"
        yield CounterMetricFamily("mxworker_ranks_lost", meaning, value=lost)


class _Server(ThreadingMixIn, TCPServer):
    """Answers on a socket that listens already, with a bound on connections: more are closed."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, registry: Any) -> None:
        super().__init__(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.registry = registry
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up in the middle is no news."""


class _Handler(BaseHTTPRequestHandler):
    timeout = ANSWER_SECONDS
    server: _Server

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "there is /metrics")
            return
        from prometheus_client.exposition import choose_encoder

        encode, kind = choose_encoder(self.headers.get("Accept", ""))
        body = encode(self.server.registry)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Nowhere: standard error is the engine's."""


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _owns(lock: int) -> bool:
    """Whether this process, and what it forks, is the folder's one exporter."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def listen(port: int) -> socket.socket:
    """A socket that listens on all addresses, of IPv6 too where there is that. Raises OSError."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _out_of_the_tree() -> bool:
    """Goes on in a process without a parent, in a session of its own; False in the one that was started."""
    if os.fork():
        return False
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # who reads the engine's output to its end must not wait for this one
        os.dup2(nowhere, stream)
    return True


def serve(folder: Path, listener: socket.socket, linger_seconds: float) -> None:
    """Until no rank has lived for so long."""
    from prometheus_client import CollectorRegistry

    ranks = Ranks(folder)
    ranks.look()
    registry = CollectorRegistry()
    registry.register(ranks)  # of a collector it asks for `collect` alone
    with _Server(listener, registry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        alone_since = time.monotonic()
        while True:
            time.sleep(LOOK_SECONDS)
            if ranks.look():
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > linger_seconds:
                break
        server.shutdown()
    ranks.forget()


def main() -> int:
    """The exit code: 0 where somebody serves, 1 where the port cannot be had, which standard output says.

    Who serves already may be about to end: only when it has had the time to see this rank does it stay.
    """
    folder, port, linger_seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    lock = os.open(folder / "exporter", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + STANDBY_SECONDS
    while not _owns(lock):
        if time.monotonic() > deadline:
            return 0
        time.sleep(LOOK_SECONDS / 4)
    try:
        listener = listen(port)
    except OSError as error:
        sys.stdout.write(str(error.strerror))
        return 1
    if _out_of_the_tree():
        serve(folder, listener, linger_seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
