"""A worker of a bench's fleet in a process of its own: holds or receives a made-up model, and serves it.

Started with one argument, a JSON object; prints one JSON object a line: `progress`, `done`, `failed`.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
from typing import Any, TypeAlias

import numpy as np

from bench.transfer.shapes import ALIGNED_BYTES
from mxcore.errors import TransferError
from mxcore.process import AttachedReads
from mxcore.settings import load_settings
from mxcore.transfer.layout import LocalTensor, build_layout
from mxcore.transfer.member import PROTOCOL_VERSION, Membership
from mxcore.transfer.move import same_host as attached_pull
from mxcore.transfer.move import threads_of
from mxcore.transfer.receive import ReceivedChunks
from mxserver.wire.proto import p2p_pb2

Memory: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

_SAMPLES = 200
_TENSORS = 64
_CONTENT_BYTES = (8 << 20) - 13  # repeated: never at the same place of a chunk


def say(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


class _NotLookedAt:
    """Chunks that are read and not hashed."""

    def __init__(self, pid: int, *, threads: int, hashed: bool) -> None:
        self._reads = AttachedReads(pid, threads=threads, hashed=False)
        self.ask, self.wake, self.close = self._reads.ask, self._reads.wake, self._reads.close

    def ended(self, seconds: float) -> list[tuple[int, int, bytes]]:
        return [(key, error, b"a digest") for key, error, _ in self._reads.ended(seconds)]


def _threads_without_hashing(cores: int, *, hashed: bool) -> int:
    return threads_of(cores, hashed=False)


class _Losses(logging.Handler):
    """Reports when a receiver drops a source."""

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and "gives no" in str(record.msg):
            say(
                event="lost",
                at=time.monotonic(),
                worker=str(record.args[0]),
                asked_seconds=record.args[2],
                why=record.getMessage()[:400],
            )


class FleetWorker:
    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        if task.get("strategy") == "star":  # others have no rule that sends a receiver to storage for a slow source
            ReceivedChunks.drips = lambda _: False  # type: ignore[method-assign]
        self.verifies = ReceivedChunks.verify
        self.member = self._join()
        self.stretches = self._stretches()
        self.memory = np.zeros(self.stretches[-1][1], np.uint8)
        self.memory.fill(1)  # first touch is slow
        self.layout, self.placement = build_layout("raw", self._tensors())

    def _join(self) -> Membership:
        task = self.task
        identity = p2p_pb2.SourceIdentity(
            mx_version=PROTOCOL_VERSION,
            model_name=task["model"],
            extra_parameters={"layout": "raw", "checkpoint": str(task["content"])},
        )
        settings = load_settings({"MX_WORKER_GRPC_PORT": 0, **task.get("settings", {})})
        member = Membership(settings, identity, 0, "cpu", chunk_bytes=task["chunk_bytes"])
        member.join()
        return member

    def _stretches(self) -> list[tuple[int, int]]:
        """Where each tensor begins and ends: 64 alike, or `shape`, runs of (how many, bytes of each), aligned."""
        if "shape" not in self.task:
            cuts = [self.task["model_bytes"] * i // _TENSORS for i in range(_TENSORS + 1)]
            return list(itertools.pairwise(cuts))
        end, stretches = 0, []
        for count, size in self.task["shape"]:
            for _ in range(count):
                begin = -(-(end + self.task["gap_bytes"]) // ALIGNED_BYTES) * ALIGNED_BYTES
                end = begin + size
                stretches.append((begin, end))
        return stretches

    def _tensors(self) -> list[LocalTensor]:
        address = int(self.memory.ctypes.data)
        return [
            LocalTensor(
                f"t{i:05}",
                "torch.uint8",
                (end - begin,),
                (1,),
                address + begin,
                1,
                address,
                self.memory.nbytes,
                "cpu",
                0,
            )
            for i, (begin, end) in enumerate(self.stretches)
        ]

    def content(self) -> Memory:
        """Random bytes, the same in every worker of one content; no two chunks are alike."""
        some = np.random.default_rng(self.task["content"]).integers(0, 256, _CONTENT_BYTES, np.uint8)
        return np.resize(some, self.memory.nbytes)

    def is_right(self) -> bool:
        content = self.content()
        return all(np.array_equal(self.memory[begin:end], content[begin:end]) for begin, end in self.stretches)

    def from_storage(self) -> None:
        self.memory[:] = self.content()

    def verify(self, on: bool) -> None:
        """Switches the check of digests off: the difference is what checking costs."""
        ReceivedChunks.verify = self.verifies if on else lambda received, chunk, made=None: True  # type: ignore[method-assign]
        attached_pull.threads_of = threads_of if on else _threads_without_hashing
        attached_pull.AttachedReads = AttachedReads if on else _NotLookedAt  # type: ignore[attr-defined, assignment]

    def progress(self, done: int, total: int) -> None:
        step = total // _SAMPLES + 1
        if done // step != self.told // step or done == total:
            self.told = done
            say(event="progress", at=time.monotonic(), bytes=done)

    def run(self) -> None:
        task = self.task
        if task["role"] == "seed":
            self.from_storage()
            self.member.serve(self.layout, self.placement, {}, keep_alive=self.memory)
            say(event="serving", worker=self.member.worker_id)
        else:
            say(event="ready", worker=self.member.worker_id)
        for line in sys.stdin:
            if line.startswith("start"):
                self.start()
            elif line.startswith("again"):
                self.member.close()
                self.memory.fill(1)
                self.member = self._join()
                say(event="ready", worker=self.member.worker_id)
            elif line.startswith("verify"):
                self.verify(line.split()[1] == "on")
            elif line.startswith("flip"):
                place = int(line.split()[1]) % (8 * self.memory.nbytes)
                self.memory[place // 8] ^= 1 << place % 8
                say(event="flipped")
            elif line.startswith("sent"):
                holder = self.member.holder
                say(event="sent", bytes=holder.bytes_granted if holder else 0)

    def start(self) -> None:
        task = self.task
        self.told = -1
        started, cpu_seconds = time.monotonic(), time.process_time()
        report, failures, avoid = None, [], set[str]()
        for _ in range(3):
            sources = self.member.wait_for_source(avoid=avoid)
            if task["strategy"] != "swarm":
                sources = [source for source in sources if not source.receiving]
            if not sources:
                break
            try:
                relay = self.memory if task["strategy"] == "swarm" else None
                told = self.progress if task.get("tells", True) else None  # the telling takes its time from a transfer
                report = self.member.receive(self.layout, self.placement, {}, sources, told, relay_from=relay)
                break
            except TransferError as error:
                failures.append(str(error)[:300])
                avoid |= {source.worker_id for source in sources}
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_seconds
        if report is None:
            self.from_storage()
        right = self.is_right()
        if task["strategy"] != "star":
            self.member.serve(
                self.layout, self.placement, {}, report.digests if report else None, keep_alive=self.memory
            )
        say(
            event="done",
            right=right,
            path="p2p" if report else "storage",
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            receive_seconds=report.seconds if report else 0.0,
            moving_seconds=report.moving_seconds if report else 0.0,
            started=started,
            bytes_again=report.bytes_again if report else 0,
            bytes_from=dict(report.bytes_from) if report else {},
            failures=failures + list(report.failures if report else ()),
        )


def main() -> None:
    sys.stdout = os.fdopen(os.dup(1), "w")  # UCX and NIXL log to file 1, which becomes stderr; answers go here
    os.dup2(2, 1)
    logging.getLogger("mxcore.transfer.receive.receiver").addHandler(_Losses())
    worker = FleetWorker(json.loads(sys.argv[1]))
    worker.run()
    worker.member.close()


if __name__ == "__main__":
    main()
