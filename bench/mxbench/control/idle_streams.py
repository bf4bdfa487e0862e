"""What an open stream that waits costs a gRPC server: `python -m mxbench.control.idle_streams`, JSON lines.

grpcio's server with a thread for each stream, against grpc.aio's. Each stream has a connection of its own, as workers
have; heartbeats go on meanwhile, and in the end all streams are told something at once.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from mxbench.control.processes import cpu_seconds

COUNTS = (1600, 10_000)
SECONDS = 10.0
FILES = 65_536
SETTINGS_TAKEN = b"\0\0\0\4\1\0\0\0\0"  # else the server closes the connection after half a minute


def raise_file_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, FILES), hard))


def serve_threads(count: int) -> None:
    changed, told = threading.Condition(), 0

    def wait(request: bytes, context: grpc.ServicerContext) -> Any:
        yield b"waiting"
        with changed:
            changed.wait_for(lambda: told)
        yield b"news"

    def tell(request: bytes, context: grpc.ServicerContext) -> bytes:
        nonlocal told
        with changed:
            told += 1
            changed.notify_all()
        return b""

    server = grpc.server(ThreadPoolExecutor(count + 16))
    server.add_generic_rpc_handlers((_handlers(wait, tell, lambda request, context: b""),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()


async def serve_aio() -> None:
    news = asyncio.Event()

    async def wait(request: bytes, context: Any) -> Any:
        yield b"waiting"
        await news.wait()
        yield b"news"

    async def tell(request: bytes, context: Any) -> bytes:
        news.set()
        return b""

    async def beat(request: bytes, context: Any) -> bytes:
        return b""

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_handlers(wait, tell, beat),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)


def _handlers(wait: Any, tell: Any, beat: Any) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler(
        "s",
        {
            "wait": grpc.unary_stream_rpc_method_handler(wait),
            "tell": grpc.unary_unary_rpc_method_handler(tell),
            "beat": grpc.unary_unary_rpc_method_handler(beat),
        },
    )


def opened_stream(port: int) -> socket.socket:
    """A connection with one call of `wait`, by RFC 9113 and 7541 (no client library: this one costs nothing)."""

    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload

    fields = [(":method", "POST"), (":scheme", "http"), (":path", "/s/wait"), (":authority", "x")]
    fields += [("te", "trailers"), ("content-type", "application/grpc")]
    block = b"".join(b"\0" + bytes((len(k),)) + k.encode() + bytes((len(v),)) + v.encode() for k, v in fields)
    opened = socket.create_connection(("127.0.0.1", port))
    opened.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0))
    opened.sendall(frame(1, 4, 1, block) + frame(0, 1, 1, bytes(5)))
    return opened


def read_until(opened: socket.socket, what: bytes) -> None:
    seen = b""
    while what not in seen:
        part = opened.recv(4096)
        assert part, "the server closed a stream"
        seen += part


def of_process(pid: int, name: str) -> int:
    """A field of /proc/PID/status: KiB of memory, or a count."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])


def measured(kind: str, count: int) -> dict[str, object]:
    command = [sys.executable, "-m", "mxbench.control.idle_streams", kind, str(count)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdin is not None
    port = int(server.stdout.readline())
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    beat: Any = channel.unary_unary("/s/beat")
    beat(b"")
    before_kib, began = of_process(server.pid, "VmRSS"), time.monotonic()
    streams: list[socket.socket] = []
    while len(streams) < count:  # gRPC turns calls away at random where a thousand wait for Python
        few = [opened_stream(port) for _ in range(100)]
        for each in few:
            read_until(each, b"waiting")
            each.sendall(SETTINGS_TAKEN)
        streams += few
    opened_seconds = time.monotonic() - began
    cpu, began, beats = cpu_seconds(server.pid), time.monotonic(), []
    while time.monotonic() < began + SECONDS:
        sent = time.monotonic()
        beat(b"")
        beats.append(time.monotonic() - sent)
        time.sleep(0.01)
    idle_cpu = (cpu_seconds(server.pid) - cpu) / (time.monotonic() - began)
    kib, threads = of_process(server.pid, "VmRSS"), of_process(server.pid, "Threads")
    cpu, told = cpu_seconds(server.pid), time.monotonic()
    tell: Any = channel.unary_unary("/s/tell")
    tell(b"")
    for each in streams:
        read_until(each, b"news")
    told_seconds, told_cpu = time.monotonic() - told, cpu_seconds(server.pid) - cpu
    for each in streams:
        each.close()
    server.kill()
    server.wait()
    return {
        "server": kind,
        "streams": count,
        "kib_a_stream": round((kib - before_kib) / count, 1),
        "threads": threads,
        "open_ms_a_stream": round(opened_seconds * 1000 / count, 2),
        "cpu_idle": round(idle_cpu, 3),  # cores, with about 80 heartbeats a second
        "heartbeat_p50_ms": round(statistics.median(beats) * 1000, 2),
        "heartbeat_p99_ms": round(sorted(beats)[int(len(beats) * 0.99)] * 1000, 2),
        "tell_all_seconds": round(told_seconds, 2),
        "tell_all_cpu_seconds": round(told_cpu, 2),
    }


def main(arguments: list[str]) -> None:
    raise_file_limit()
    if arguments[:1] == ["threads"]:
        serve_threads(int(arguments[1]))
    elif arguments[:1] == ["aio"]:
        asyncio.run(serve_aio())
    else:
        for count in [int(each) for each in arguments] or COUNTS:
            for kind in ("aio", "threads"):
                print(json.dumps(measured(kind, count)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
