"""Whole workers of the storm in one process, which really transfer: `python -m mxbench.storm.whole`, a task on stdin.

One of them "reads storage" (time that passes), the others wait, and receive it over TCP from each other; the holders
have few places, so that some are refused and come back.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from mxbench.storm.connections import own_connections
from mxcore.errors import TransferError
from mxcore.settings import load_settings
from mxcore.transfer.layout import LocalTensor, build_layout
from mxcore.transfer.member import PROTOCOL_VERSION, Membership
from mxcore.transfer.serve.refused_readers import RefusedReaders
from mxserver.wire.proto import p2p_pb2

_TENSORS = 64
_CHUNK_BYTES = 1 << 20
_PLACES = 2


@dataclass(frozen=True)
class Task:
    """Times are seconds, moments those of the monotonic clock."""

    addresses: list[str]
    count: int
    model_bytes: int
    began: float
    start_seconds: float
    read_seconds: float
    heartbeat_seconds: float
    end_seconds: float


class Worker:
    """One membership with its memory. `outcome` is `storage`, `peers`, or what went wrong."""

    def __init__(self, task: Task, number: int, content: np.ndarray[Any, Any]) -> None:
        self._task, self._number, self._content = task, number, content
        self.outcome = "it did not end"
        self.memory = np.zeros(task.model_bytes, np.uint8)
        names = {
            "MX_SERVER_ADDRESS": task.addresses[number % len(task.addresses)],
            "MX_WORKER_GRPC_PORT": 0,
            "MX_WORKER_HOST": "127.0.0.1",
            "MX_TRANSPORT": "tcp",
            "MX_SOURCE_MAX_READERS": _PLACES,
            "MX_HEARTBEAT_INTERVAL_SECS": task.heartbeat_seconds,
            "MX_SOURCE_WAIT_SECS": task.end_seconds,
            "MX_DRAIN_TIMEOUT_SECS": 1,
        }
        identity = p2p_pb2.SourceIdentity(mx_version=PROTOCOL_VERSION, model_name="bench/storm/whole")
        self.member = Membership(load_settings(names, {}), identity, 0, "cpu", chunk_bytes=_CHUNK_BYTES)

    def run(self) -> None:
        try:
            self.outcome = self._load()
        except TransferError as error:
            self.outcome = f"{type(error).__name__}: {error}"[:200]

    def _load(self) -> str:
        task, member = self._task, self.member
        start = task.began + task.start_seconds * random.Random(self._number).random()
        time.sleep(max(0.0, start - time.monotonic()))
        member.join()
        cuts = [task.model_bytes * i // _TENSORS for i in range(_TENSORS + 1)]
        address, size = int(self.memory.ctypes.data), self.memory.nbytes
        tensors = [
            LocalTensor(f"t{i}", "torch.uint8", (end - begin,), (1,), address + begin, 1, address, size, "cpu", 0)
            for i, (begin, end) in enumerate(itertools.pairwise(cuts))
        ]
        layout, placement = build_layout("raw", tensors)
        digests, path = None, "storage"
        if sources := member.wait_for_source():
            report = member.receive(layout, placement, {}, sources, relay_from=self.memory)
            digests, path = report.digests, "peers"
        else:
            time.sleep(task.read_seconds)
            self.memory[:] = self._content
        member.serve(layout, placement, {}, digests, keep_alive=self.memory)
        return path if np.array_equal(self.memory, self._content) else "wrong weights"


def main() -> None:
    task = Task(**json.loads(sys.stdin.readline()))
    own_connections()
    refused: list[float] = []
    again_seconds = RefusedReaders.again_seconds

    def counted(readers: RefusedReaders, connection: str) -> float:
        refused.append(again_seconds(readers, connection))
        return refused[-1]

    RefusedReaders.again_seconds = counted  # type: ignore[assignment, method-assign]
    content = np.random.default_rng(1).integers(0, 256, task.model_bytes, np.uint8)
    workers = [Worker(task, number, content) for number in range(task.count)]
    threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, task.began + task.end_seconds - time.monotonic()))
    outcomes = [worker.outcome for worker in workers]
    live = [(worker.member.source_id, worker.member.worker_id) for worker in workers]
    sys.stdout.write(json.dumps({"outcomes": outcomes, "refused": len(refused), "live": live}) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()
    for worker in workers:
        worker.member.close()


if __name__ == "__main__":
    main()
