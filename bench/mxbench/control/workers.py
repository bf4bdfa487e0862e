"""One process of simulated workers: `python -m mxbench.control.workers`, told what to do by JSON lines on stdin.

Each worker has a connection of its own and does what a worker does at its start: it joins, lists, gets one record,
publishes itself and becomes ready; later it sends heartbeats. Times are wall seconds of single calls.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from array import array
from dataclasses import dataclass, field
from typing import Any

import grpc

from mxserver.wire.calls import channel_options
from mxserver.wire.proto import p2p_pb2, p2p_pb2_grpc

CALL_SECONDS = 30.0
CANDIDATES = 16  # as many as a real worker lists
METADATA_BYTES = 2048  # an agent's metadata and addresses
READY = p2p_pb2.SOURCE_STATUS_READY
INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING


@dataclass
class Task:
    """What this process simulates. Fleets are models of `fleet_workers` workers of `ranks` ranks."""

    addresses: list[str]
    first: int
    count: int
    fleet_workers: int
    ranks: int
    at_once: int


@dataclass
class Worker:
    name: str
    rank: int
    identity: p2p_pb2.SourceIdentity
    channel: grpc.aio.Channel
    stub: p2p_pb2_grpc.P2pServiceAsyncStub
    source_id: str = ""
    epoch: int = 0


@dataclass
class Outcome:
    seconds: array[float] = field(default_factory=lambda: array("d"))
    errors: dict[str, int] = field(default_factory=dict)

    async def call(self, method: Any, request: Any) -> Any:
        """The answer. None if the call failed or was refused, which counts as an error."""
        started = time.perf_counter()
        try:
            answer = await method(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            return self._failed(f"{error.code().name}: {error.details()}")
        finally:
            self.seconds.append(time.perf_counter() - started)
        return answer if getattr(answer, "success", True) else self._failed(answer.message)

    def _failed(self, reason: str) -> None:
        self.errors[reason] = self.errors.get(reason, 0) + 1


def new_worker(task: Task, number: int) -> Worker:
    fleet, member = divmod(number, task.fleet_workers)
    address = task.addresses[number % len(task.addresses)]
    channel = grpc.aio.insecure_channel(address, options=[*channel_options(), ("grpc.use_local_subchannel_pool", 1)])
    identity = p2p_pb2.SourceIdentity(
        mx_version="mx-1", model_name=f"bench/model-{fleet}", dtype="bfloat16", tensor_parallel_size=task.ranks
    )
    stub: Any = p2p_pb2_grpc.P2pServiceStub(channel)  # for types it is that of plain channels
    return Worker(f"worker-{number}", member % task.ranks, identity, channel, stub)


async def start(worker: Worker, outcome: Outcome) -> None:
    """Join, list, get, publish, ready."""
    metadata = p2p_pb2.WorkerMetadata(worker_rank=worker.rank, status=INITIALIZING, accelerator="cuda")
    request = p2p_pb2.PublishMetadataRequest(identity=worker.identity, worker=metadata, worker_id=worker.name)
    joined = await outcome.call(worker.stub.PublishMetadata, request)
    if joined is None:
        return
    worker.source_id = joined.mx_source_id
    query = p2p_pb2.ListSourcesRequest(
        identity=worker.identity, status_filter=READY, worker_rank_filter=worker.rank, limit=CANDIDATES
    )
    listed = await outcome.call(worker.stub.ListSources, query)
    wanted = listed.instances[0].worker_id if listed and listed.instances else worker.name
    get = p2p_pb2.GetMetadataRequest(mx_source_id=worker.source_id, worker_id=wanted)
    await outcome.call(worker.stub.GetMetadata, get)
    metadata.nixl_metadata = bytes(METADATA_BYTES)
    metadata.worker_grpc_endpoint = f"10.0.0.1:{6555 + worker.rank}"
    request = p2p_pb2.PublishMetadataRequest(
        identity=worker.identity, worker=metadata, worker_id=worker.name, epoch=joined.epoch
    )
    published = await outcome.call(worker.stub.PublishMetadata, request)
    if published is not None:
        worker.epoch = published.epoch
    await beat(worker, outcome)


async def beat(worker: Worker, outcome: Outcome) -> None:
    request = p2p_pb2.UpdateStatusRequest(
        mx_source_id=worker.source_id,
        worker_id=worker.name,
        worker_rank=worker.rank,
        status=READY,
        epoch=worker.epoch,
        source_load=0.0,
    )
    await outcome.call(worker.stub.UpdateStatus, request)


async def storm(task: Task, outcome: Outcome) -> list[Worker]:
    """All workers start, so many at once."""
    room = asyncio.Semaphore(task.at_once)
    workers: list[Worker] = []

    async def one(number: int) -> None:
        async with room:
            worker = new_worker(task, number)
            workers.append(worker)
            await start(worker, outcome)

    await asyncio.gather(*(one(number) for number in range(task.first, task.first + task.count)))
    return workers


async def idle(workers: list[Worker], outcome: Outcome, seconds: float, interval_seconds: float) -> None:
    """Each worker sends a heartbeat every interval, spread evenly over it."""
    started = time.monotonic()

    async def live(position: int, worker: Worker) -> None:
        due = started + interval_seconds * position / len(workers)
        while due < started + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await beat(worker, outcome)
            due += interval_seconds

    await asyncio.gather(*(live(position, worker) for position, worker in enumerate(workers)))


def answer(outcome: Outcome) -> None:
    sys.stdout.write(json.dumps({"seconds": list(outcome.seconds), "errors": outcome.errors}) + "\n")
    sys.stdout.flush()


async def main() -> None:
    lines = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    workers: list[Worker] = []
    while line := await lines.readline():
        outcome = Outcome()
        match json.loads(line):
            case {"do": "storm", "task": task}:
                workers = await storm(Task(**task), outcome)
            case {"do": "idle", "seconds": seconds, "interval_seconds": interval_seconds}:
                await idle(workers, outcome, seconds, interval_seconds)
        answer(outcome)
    for worker in workers:
        await worker.channel.close()


if __name__ == "__main__":
    asyncio.run(main())
