"""The best rates of machine and transports: memcpy, sockets, one NIXL descriptor on one region, digests."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from statistics import median
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from mxcore.digest import xxh3_64, xxh3_64_many
from mxcore.nixl import NixlAgent
from mxcore.transfer.layout import CHUNK_BYTES, digest_threads
from mxcore.transfer.move import AgentSession, Move
from mxcore.transfer.route import ucx_settings

MIB = 1 << 20
_ROUNDS = 3


def memcpy_rate(count: int) -> float:
    """10^9 bytes a second of a copy by one thread into memory that was touched; the median of some."""
    source, target = np.ones(count, np.uint8), np.ones(count, np.uint8)
    return _median(count, lambda: np.copyto(target, source))


def digest_rate(count: int) -> float:
    """10^9 bytes a second of XXH3-64 by one thread; the median of some."""
    data = np.ones(count, np.uint8)
    return _median(count, lambda: xxh3_64(data.data))


def all_cores(count: int) -> tuple[list[float], list[float]]:
    """10^9 bytes a second by all cores of this process, some rounds, by turns: of reading memory, and of digests.

    Digests are those of chunks, as a holder makes them.
    """
    data = np.ones(count // 8, np.uint64)
    parts = np.array_split(data, len(os.sched_getaffinity(0)))

    def read() -> None:
        left = list(parts)
        _in_threads(lambda: np.bitwise_or.reduce(left.pop()), len(parts))

    rates: tuple[list[float], list[float]] = ([], [])
    ways: tuple[Callable[[], object], Callable[[], object]] = (read, lambda: _digests(data))
    for _ in range(2 * _ROUNDS + 1):
        for found, function in zip(rates, ways, strict=True):
            started = time.perf_counter()
            function()
            found.append(data.nbytes / (time.perf_counter() - started) / 1e9)
    return rates


def socket_rate(count: int, connections: int) -> float:
    """10^9 bytes a second from one process to another by TCP over loopback; the median of some."""
    return median(_socket_rate(count, connections) for _ in range(_ROUNDS))


def _socket_rate(count: int, connections: int) -> float:
    data = np.ones(8 * MIB, np.uint8)
    each = max(1, count // data.nbytes // connections)
    with socket.create_server(("127.0.0.1", 0), backlog=connections) as server:
        child = os.fork()
        if child == 0:
            _in_threads(lambda: _send(server.getsockname(), data, each), connections)
            os._exit(0)
        accepted = [server.accept()[0] for _ in range(connections)]
    buffers = [np.ones(MIB, np.uint8).data for _ in accepted]
    pairs = list(zip(accepted, buffers, strict=True))
    started = time.monotonic()
    _in_threads(lambda: _drain(*pairs.pop()), connections)
    seconds = time.monotonic() - started
    os.waitpid(child, 0)
    return connections * each * data.nbytes / seconds / 1e9


def _send(address: Any, data: np.ndarray[Any, Any], times: int) -> None:
    with socket.create_connection(address) as out:
        for _ in range(times):
            out.sendall(data.data)


def _drain(connection: socket.socket, buffer: memoryview) -> None:
    with connection:
        while connection.recv_into(buffer):
            pass


def _in_threads(function: Any, count: int) -> None:
    threads = [threading.Thread(target=function) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _median(count: int, function: Any) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return count / median(seconds) / 1e9


class OneDescriptor:
    """NIXL between two processes, `count` bytes as one descriptor on one region: the best rate of a transport.

    Over TCP this process WRITEs, with agents that are driven as ours are; on one host it READs by cross-memory attach,
    in segments of 4 MiB, the fastest for UCX (16 GB/s with its default of 512 KiB where this made 18). One descriptor
    can be verified once it is there: whoever received it then makes digests of chunks of 16 MiB on all its cores.
    """

    def __init__(self, transport: Literal["tcp", "same-host"], count: int) -> None:
        self._operation: Literal["read", "write"] = "write" if transport == "tcp" else "read"
        self._tls = "tcp,self" if transport == "tcp" else "tcp,cma,self"
        self._memory = np.ones(count, np.uint8)
        os.environ["UCX_CMA_SEG_SIZE"] = "4m"
        threaded = transport == "same-host"
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._peer = context.Process(target=_peer, args=(theirs, self._tls, count, threaded), daemon=True)
        self._peer.start()
        self._session = AgentSession("bench-limit", tls=self._tls, stall_timeout_seconds=60, progress_thread=threaded)
        _register(self._session, self._memory)
        metadata, self._remote = self._pipe.recv()
        self._remote_agent = self._session.connect(metadata)

    def rate(self, *, verified: bool = False) -> float:
        """10^9 bytes a second of one transfer, with digests of all of it afterwards if it is to be `verified`."""
        address, count = int(self._memory.ctypes.data), self._memory.nbytes
        move = Move(0, array("Q", [address]), array("Q", [self._remote]), array("Q", [count]))
        with self._session.progressing():
            self._pipe.send("begin")
            self._pipe.recv()
            started = time.monotonic()
            for _ in self._session.run(self._operation, [move], self._remote_agent, in_flight_limit=1):
                pass
            if verified and self._operation == "write":
                self._pipe.send("digest")
                self._pipe.recv()
            elif verified:
                _digests(self._memory)
            seconds = time.monotonic() - started
            self._pipe.send("end")
        return count / seconds / 1e9

    def __enter__(self) -> Self:
        self.rate()  # the first one also connects
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.fence()
        self._pipe.close()
        self._peer.join()


def _peer(pipe: Connection, tls: str, count: int, threaded: bool) -> None:
    memory = np.ones(count, np.uint8)
    session = AgentSession("bench-peer", tls=tls, progress_thread=threaded)
    _register(session, memory)
    pipe.send((session.metadata(), int(memory.ctypes.data)))
    with suppress(EOFError):
        while pipe.recv():
            with session.progressing():  # no longer: others are measured meanwhile
                pipe.send("ready")
                if pipe.recv() == "digest":
                    pipe.send(_digests(memory))
                    pipe.recv()
    session.fence()


def _digests(memory: np.ndarray[Any, Any]) -> bytes:
    """Of chunks of 16 MiB, by as many threads as this process may use."""
    address, count = int(memory.ctypes.data), memory.nbytes
    starts = range(0, count, CHUNK_BYTES)
    addresses = array("Q", (address + start for start in starts))
    lengths = array("Q", (min(CHUNK_BYTES, count - start) for start in starts))
    groups = array("Q", range(len(starts) + 1))
    return xxh3_64_many(addresses, lengths, groups, threads=digest_threads())


def _register(session: AgentSession, memory: np.ndarray[Any, Any]) -> None:
    from mxcore.transfer.layout import LocalTensor, build_layout

    address = int(memory.ctypes.data)
    tensor = LocalTensor("all", "torch.uint8", (memory.nbytes,), (1,), address, 1, address, memory.nbytes, "cpu", 0)
    session.register(*build_layout("raw", [tensor]))


def idle_agent_share(seconds: float) -> float:
    """The share of a core that this process takes with an agent that does nothing."""
    with ucx_settings("tcp,self") as told:
        agent = NixlAgent("mx-bench-idle", backend_params=told)
    before, started = time.process_time(), time.monotonic()
    threading.Event().wait(seconds)
    share = (time.process_time() - before) / (time.monotonic() - started)
    agent.destroy()
    return share
