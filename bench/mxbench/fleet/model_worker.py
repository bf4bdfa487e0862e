"""A worker in a process of its own that holds or receives a made-up model, and serves it.

Started with one argument, a JSON object; prints JSON objects, one a line: `serving` or `ready`, `progress`, `lost` (a
source was dropped), `done`, `cpu`, `sent`, `flipped`. It takes lines: `start` receives, `again` forgets what came and
joins anew, `next` joins for the next version of the model, in the memory of this one, `cpu` and `sent` ask, `flip N`
changes one bit. It ends with its input.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mxbench.fleet.model_memory import (
    CONTENT_BYTES,
    DeviceMemory,
    HostMemory,
    ModelMemory,
    content_pieces,
    tensors_of,
    written_file,
)
from mxbench.fleet.shapes import places_of
from mxcore.errors import TransferError
from mxcore.settings import load_settings
from mxcore.transfer.layout import build_layout
from mxcore.transfer.member import PROTOCOL_VERSION, Membership
from mxcore.transfer.receive import ReceivedChunks, ReceiveReport
from mxserver.wire.proto import p2p_pb2

_SAMPLES = 200
_TRIES = 3
_EMPTY = b"\x01"


def say(**values: Any) -> None:
    """One line."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


class _Losses(logging.Handler):
    """Tells when a receiver drops a source."""

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and "gives no" in str(record.msg):
            worker, _, asked_seconds, *_ = record.args
            why = record.getMessage()[:400]
            say(event="lost", at=time.monotonic(), worker=str(worker), asked_seconds=asked_seconds, why=why)


class ModelWorker:
    """What the process is. `task`: model, content, chunk_bytes, role (seed, receiver), strategy, settings.

    `shape`, with `gap_bytes` between two tensors, or `model_bytes`: what the model is (shapes.places_of).
    `strategy`: star (all from the seed), doubling (finished copies serve), swarm (ours: receivers serve at once).
    `device`: index of a CUDA device that the model is on; else it is in host memory. `folder`: where storage is.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        if task["strategy"] == "star":  # others have no rule that sends a receiver to storage for a slow source
            ReceivedChunks.drips = lambda self: False  # type: ignore[method-assign]
        self._stretches = places_of(task)
        size_bytes = self._stretches[-1][1]
        device = task.get("device")
        self.memory: ModelMemory = HostMemory(size_bytes) if device is None else DeviceMemory(size_bytes, device)
        self._forget()
        self._file: Path | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if task.get("folder") is not None:
            self._folder = tempfile.TemporaryDirectory(prefix="mx-bench-", dir=task["folder"])
            self._file = written_file(Path(self._folder.name), task["content"], size_bytes)
        self.layout, self.placement = build_layout("raw", tensors_of(self.memory, self._stretches))
        self.member = self._joined()
        self._told = -1

    def _joined(self) -> Membership:
        task = self.task
        identity = p2p_pb2.SourceIdentity(
            mx_version=PROTOCOL_VERSION,
            model_name=task["model"],
            extra_parameters={"layout": "raw", "checkpoint": str(task["content"])},
        )
        settings = load_settings({"MX_WORKER_GRPC_PORT": 0, **task.get("settings", {})})
        member = Membership(settings, identity, 0, self.memory.device[0], chunk_bytes=task["chunk_bytes"])
        member.join()
        return member

    def _forget(self) -> None:
        """Other bytes than the content's; the first time this touches the memory."""
        other = _EMPTY * CONTENT_BYTES
        for at in range(0, self.memory.size_bytes, CONTENT_BYTES):
            self.memory.write(at, other[: self.memory.size_bytes - at])

    def _from_storage(self) -> None:
        if self._file is None:
            for at, piece in content_pieces(self.task["content"], self.memory.size_bytes):
                self.memory.write(at, piece)
            return
        with self._file.open("rb", buffering=0) as stored:
            at = 0
            while piece := stored.read(CONTENT_BYTES):
                self.memory.write(at, piece)
                at += len(piece)

    def _is_right(self) -> bool:
        """Every byte of every tensor."""
        tensors = iter(self._stretches)
        begin, end = next(tensors)
        for at, piece in content_pieces(self.task["content"], self.memory.size_bytes):
            there = self.memory.read(at, len(piece))
            while True:
                low, high = max(begin - at, 0), min(end - at, len(piece))
                if low < high and there[low:high] != piece[low:high]:
                    return False
                if end - at > len(piece):
                    break
                try:
                    begin, end = next(tensors)
                except StopIteration:
                    return True
        return True

    def run(self) -> None:
        """Until the input ends."""
        self._begin()
        for line in sys.stdin:
            self.take(*line.split())

    def take(self, told: str, *words: str) -> None:
        """One line of the input."""
        match told:
            case "start":
                self._start()
            case "again":
                self.member.close()
                self._forget()
                self.member = self._joined()
                self._begin()
            case "next":
                self.member.close()
                self.task["content"] += 1
                self.member = self._joined()
                self._begin()
            case "cpu":
                say(event="cpu", seconds=time.process_time())
            case "sent":
                holder = self.member.holder
                say(event="sent", bytes=holder.bytes_granted if holder else 0)
            case "flip":
                self._flip(int(words[0]))
                say(event="flipped", at=time.monotonic())

    def _flip(self, number: int) -> None:
        """One bit of the memory, whatever the number."""
        place, bit = divmod(number % (8 * self.memory.size_bytes), 8)
        self.memory.write(place, bytes([self.memory.read(place, 1)[0] ^ 1 << bit]))

    def _begin(self) -> None:
        """A seed serves, a receiver waits to be told."""
        if self.task["role"] == "seed":
            self._from_storage()
            self._serve(None)
            say(event="serving", worker=self.member.worker_id)
        else:
            say(event="ready", worker=self.member.worker_id)

    def _serve(self, report: ReceiveReport | None) -> None:
        digests = report.digests if report else None
        self.member.serve(self.layout, self.placement, {}, digests, keep_alive=self.memory)

    def _progress(self, done: int, total: int) -> None:
        step = total // _SAMPLES + 1
        if done // step != self._told // step or done == total:
            self._told = done
            say(event="progress", at=time.monotonic(), bytes=done)

    def _start(self) -> None:
        self._told = -1
        started, cpu_seconds = time.monotonic(), time.process_time()
        report, failures = self._received()
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_seconds
        if report is None:
            self._from_storage()
            seconds = time.monotonic() - started
        if self.task["strategy"] != "star":
            self._serve(report)
        say(
            event="done",
            right=self._is_right(),
            path="p2p" if report else "storage",
            started=started,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            bytes=sum(end - begin for begin, end in self._stretches),
            receive_seconds=report.seconds if report else 0.0,
            moving_seconds=report.moving_seconds if report else 0.0,
            transport=report.transport if report else "",
            operation=report.operation if report else "",
            bytes_again=report.bytes_again if report else 0,
            holders=len(report.bytes_from) if report else 0,
            bytes_from=dict(report.bytes_from) if report else {},
            failures=[*failures, *(report.failures if report else ())],
        )

    def _received(self) -> tuple[ReceiveReport | None, list[str]]:
        """From others, or nothing: then it is this worker that reads storage."""
        swarm = self.task["strategy"] == "swarm"
        failures: list[str] = []
        avoid: set[str] = set()
        for _ in range(_TRIES):
            sources = self.member.wait_for_source(avoid=avoid)
            if not swarm:
                sources = [source for source in sources if not source.receiving]
            if not sources:
                break
            told = self._progress if self.task.get("tells", True) else None  # telling takes its time from a transfer
            relay = self.memory if swarm else None
            try:
                report = self.member.receive(self.layout, self.placement, {}, sources, told, relay_from=relay)
            except TransferError as error:
                failures.append(str(error)[:300])
                avoid |= {source.worker_id for source in sources}
            else:
                return report, failures
        return None, failures

    def close(self) -> None:
        """Leaves the fleet, gives memory and files back."""
        self.member.close()
        self.memory.close()
        if self._folder is not None:
            self._folder.cleanup()


def be(kind: type[ModelWorker]) -> None:
    """This process is one worker of that kind."""
    sys.stdout = os.fdopen(os.dup(1), "w")  # UCX and NIXL log to file 1, which becomes stderr; answers go here
    os.dup2(2, 1)
    logging.getLogger("mxcore.transfer.receive.receiver").addHandler(_Losses())
    worker = kind(json.loads(sys.argv[1]))
    worker.run()
    worker.close()


if __name__ == "__main__":
    be(ModelWorker)
