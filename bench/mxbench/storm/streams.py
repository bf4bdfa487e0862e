"""What open streams of workers that wait cost the server: `python -m mxbench.storm.streams 1600 10000`, JSON lines.

A real server, and for each stream a connection of its own. Heartbeats go on meanwhile; in the end all are told at once
that a worker serves.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import statistics
import sys
import tempfile
import time
from pathlib import Path

from mxbench.control.idle_streams import of_process, raise_file_limit
from mxbench.control.processes import Server, cpu_seconds
from mxbench.storm.http2_stream import Http2Stream
from mxserver.wire.calls import ServerClient, source_id
from mxserver.wire.proto import p2p_pb2, watch_pb2

COUNTS = (1600, 10_000)
SECONDS = 20.0
DEADLINE_SECONDS = 300.0
AT_ONCE = 100  # gRPC turns calls away where a thousand wait for Python
IDENTITY = p2p_pb2.SourceIdentity(model_name="bench/streams")


class Stream(Http2Stream):
    """`told` has the messages so far."""

    told = b""

    def take(self) -> list[bytes]:
        messages = super().take()
        self.told += b"".join(messages)
        return messages


class Streams:
    """All of them, served by whoever calls."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.all: list[Stream] = []

    def open(self, address: str, count: int) -> None:
        for _ in range(count):
            name = f"w{len(self.all)}"
            asked = watch_pb2.WatchSourcesRequest(mx_source_id=source_id(IDENTITY), worker_id=name, limit=16)
            stream = Stream(address, asked)
            self.all.append(stream)
            self._selector.register(stream.socket, selectors.EVENT_READ, stream)

    def serve(self, seconds: float) -> None:
        """Takes what comes, for at most so long where nothing does."""
        for key, _ in self._selector.select(seconds):
            key.data.take()

    def until_told(self, what: bytes) -> None:
        left = [stream for stream in self.all if what not in stream.told]
        deadline = time.monotonic() + DEADLINE_SECONDS
        while left:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(left)} streams were not told {what!r}")
            self.serve(0.1)
            left = [stream for stream in left if what not in stream.told]

    def close(self) -> None:
        self._selector.close()
        for stream in self.all:
            stream.socket.close()


def _publish(client: ServerClient, worker: str) -> None:
    record = p2p_pb2.WorkerMetadata(status=p2p_pb2.SOURCE_STATUS_READY, worker_grpc_endpoint="h:1")
    client.publish(IDENTITY, record, worker)


def measured(count: int) -> dict[str, float]:
    streams = Streams()
    with tempfile.TemporaryDirectory(prefix="mx-bench-") as place:
        limits = ["--limits", f"watches_per_client={2 * count}"]
        core = min(os.sched_getaffinity(0))
        server = Server(Path(place), 0, ["--store-path", f"{place}/state.sqlite3", *limits], core)
        pid = server.process.pid
        resource.prlimit(pid, resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))
        try:
            with ServerClient(server.address) as client:
                _publish(client, "first-of-all")
                before_kib, began = of_process(pid, "VmRSS"), time.monotonic()
                while len(streams.all) < count:
                    streams.open(server.address, min(AT_ONCE, count - len(streams.all)))
                    streams.until_told(b"first-of-all")
                opened_seconds = time.monotonic() - began
                used, began, beats = cpu_seconds(pid), time.monotonic(), []
                while time.monotonic() < began + SECONDS:
                    sent = time.monotonic()
                    client.update_status(source_id(IDENTITY), "first-of-all", 0, p2p_pb2.SOURCE_STATUS_READY)
                    beats.append(time.monotonic() - sent)
                    streams.serve(0.02)
                idle = (cpu_seconds(pid) - used) / (time.monotonic() - began)
                kib = of_process(pid, "VmRSS")
                used, told = cpu_seconds(pid), time.monotonic()
                _publish(client, "second-of-all")
                streams.until_told(b"second-of-all")
                told_seconds, told_cpu = time.monotonic() - told, cpu_seconds(pid) - used
        finally:
            streams.close()
            server.stop()
    return {
        "streams": count,
        "open_ms_a_stream": round(1000 * opened_seconds / count, 2),
        "kib_a_stream": round((kib - before_kib) / count, 1),
        "server_core_share_idle": round(idle, 3),  # with about 50 heartbeats a second
        "heartbeat_p50_ms": round(1000 * statistics.median(beats), 2),
        "heartbeat_p99_ms": round(1000 * sorted(beats)[int(0.99 * len(beats))], 2),
        "tell_all_seconds": round(told_seconds, 2),
        "tell_all_cpu_seconds": round(told_cpu, 2),
    }


def main(arguments: list[str]) -> None:
    raise_file_limit()
    for count in [int(each) for each in arguments] or COUNTS:
        sys.stdout.write(json.dumps(measured(count)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
