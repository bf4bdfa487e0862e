"""One process of ranks that start together: `python -m bench.storm.ranks`, told what to do by a line of JSON on stdin.

Each rank is the product's own client code (record, heartbeat, stream, directory, wait, election) over a connection of
its own; only the bytes are left out: reading storage and receiving are time that passes. Moments are of the monotonic
clock, which all processes of a machine share.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mxcore.transfer.member.directory import Directory
from mxcore.transfer.member.place import Place
from mxcore.transfer.member.record import Served, WorkerRecord
from mxcore.transfer.member.source_wait import wait_for_source
from mxcore.transfer.member.storage_election import StorageElection
from mxcore.transfer.member.watched_sources import WatchedSources
from mxcore.transfer.move import Source
from mxserver.wire import WireError
from mxserver.wire.calls import ServerClient, channels
from mxserver.wire.proto import mx_pb2, p2p_pb2

CALL_SECONDS = 30.0
_LOOK_SECONDS = 1.0  # as a receive looks for more holders


@dataclass(frozen=True)
class Task:
    """What this process does; `numbers` are those of its ranks in all. Times are seconds."""

    addresses: list[str]
    numbers: list[int]
    ranks: int
    began: float
    start_seconds: float
    read_seconds: float
    receive_seconds: float
    at_once: int
    dying: int
    heartbeat_seconds: float
    end_seconds: float


@dataclass
class Told:
    """What all ranks of this process tell. Thread-safe."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    call_seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: Counter[str] = field(default_factory=Counter)
    ready: dict[int, float] = field(default_factory=dict)  # rank -> when its reader was READY
    noticed: list[tuple[int, float]] = field(default_factory=list)  # rank, when a waiter would have asked the holder
    read: list[tuple[int, float, float]] = field(default_factory=list)  # rank, from, until: who read storage
    loading_calls: int = 0
    loading_seconds: float = 0.0
    live: list[tuple[str, str]] = field(default_factory=list)  # source and worker of who lives at the end


class CountingClient(ServerClient):
    """A client that tells of its calls."""

    def __init__(self, address: str, told: Told) -> None:
        super().__init__(address, timeout_seconds=CALL_SECONDS)
        self._told = told
        self.calls = 0

    def _call(self, name: str, method: Callable[..., Any], request: Any) -> Any:
        began = time.perf_counter()
        self.calls += 1
        try:
            return super()._call(name, method, request)
        except WireError as error:
            with self._told.lock:
                self._told.errors[f"{name}: {error}"[:160]] += 1
            raise
        finally:
            with self._told.lock:
                self._told.call_seconds[name].append(time.perf_counter() - began)


class Rank:
    """One worker of one rank, from its start to the end of the run."""

    def __init__(self, task: Task, number: int, told: Told, room: threading.Semaphore) -> None:
        self._task, self._told, self._room = task, told, room
        self._chance = random.Random(number)
        self.rank, self._host = number % task.ranks, number // task.ranks
        self._dies = number % 100 == 99 and number // 100 < task.dying
        self._identity = p2p_pb2.SourceIdentity(model_name="bench/storm", tensor_parallel_size=task.ranks)
        self._client = CountingClient(task.addresses[number % len(task.addresses)], told)
        self._worker_id = f"w{number}"
        self._endpoint = ""
        place = Place({"host": f"h{self._host}", "rack": f"r{self._host // 16}"}, ("rack", "host"))
        self._directory = Directory(self._client, self._worker_id, self.rank, lambda: place)
        self._record = WorkerRecord(
            self._client,
            self._identity,
            self._worker_id,
            self.rank,
            "cpu",
            heartbeat_interval_seconds=task.heartbeat_seconds,
            served=lambda: Served("", self._endpoint, 0 if self._endpoint else None),
            topology=lambda: place.topology,
            superseded_by_newer=lambda: None,
        )
        self._election: StorageElection | None = None
        self._leaving = threading.Event()

    def run(self) -> None:
        """Returns when it is READY, or dead."""
        task = self._task
        time.sleep(max(0.0, task.began + task.start_seconds * self._chance.random() - time.monotonic()))
        self._record.keep()
        began = time.monotonic()
        sources = self._wait()
        if self._dies:
            self._record.end()  # without a goodbye
            self._client.close()
            return
        if sources:
            with self._told.lock:
                self._told.noticed.append((self.rank, time.monotonic()))
            with self._room:  # holders serve so many at once
                self._receive()
        else:
            time.sleep(task.read_seconds)
        self._endpoint = f"10.0.{self._host % 250}.{self.rank}:6555"
        self._record.mark_ready()
        self._record.keep()
        now = time.monotonic()
        if not sources:
            with self._told.lock:
                self._told.ready.setdefault(self.rank, now)
                self._told.read.append((self.rank, began, now))
        if self._election is not None:
            self._election.end(shared=True)
        with self._told.lock:
            self._told.live.append((self._record.source_id, self._worker_id))

    def _wait(self) -> list[Source]:
        def listed(told: list[Source] | None) -> list[Source]:
            return self._directory.holders(self._identity) if told is None else told

        with WatchedSources(self._client, self._directory, self._identity, wants_turn=True) as watched:
            return wait_for_source(
                listed,
                self._stand,
                wait_seconds=3600.0,
                known=lambda: True,
                leaving=self._leaving,
                stopped=lambda: False,
                watched=watched,
            )

    def _stand(self) -> mx_pb2.TakeStorageTurnResponse | None:
        election = StorageElection(self._client, self._record.source_id, self.rank, self._worker_id)
        answer = election.stand()
        if answer.turn == mx_pb2.STORAGE_TURN_YOURS:
            self._election = election
        return answer if answer.turn == mx_pb2.STORAGE_TURN_WAIT else None

    def _receive(self) -> None:
        """Serves what it has, and looks for others, as a receive does."""
        began, calls = time.monotonic(), self._client.calls
        self._endpoint = f"10.0.{self._host % 250}.{self.rank}:6555"
        self._record.publish()
        with WatchedSources(self._client, self._directory, self._identity) as watched:
            while time.monotonic() < began + self._task.receive_seconds:
                with suppress(WireError):  # counted
                    watched.holders()
                time.sleep(_LOOK_SECONDS * (0.5 + self._chance.random()))
        with self._told.lock:
            self._told.loading_calls += self._client.calls - calls + 1  # the stream
            self._told.loading_seconds += time.monotonic() - began

    def end(self) -> None:
        """Says goodbye."""
        self._record.end()
        self._client.close()


def main() -> None:
    task = Task(**json.loads(sys.stdin.readline()))
    options = channels.channel_options
    # Else all clients of a process share one connection, which workers on hosts of their own do not.
    channels.channel_options = lambda: (*options(), ("grpc.use_local_subchannel_pool", 1))  # type: ignore[assignment]
    threading.stack_size(256 * 1024)
    told, room = Told(), threading.Semaphore(task.at_once)
    ranks = [Rank(task, number, told, room) for number in task.numbers]
    threads = [threading.Thread(target=rank.run, daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, task.began + task.end_seconds - time.monotonic()))
    with told.lock:
        missing = sum(thread.is_alive() for thread in threads)
        if missing:
            told.errors["ranks that had no weights at the end"] += missing
        answer = {
            "call_seconds": told.call_seconds,
            "errors": told.errors,
            "ready": list(told.ready.items()),
            "noticed": told.noticed,
            "read": told.read,
            "loading_calls": told.loading_calls,
            "loading_seconds": told.loading_seconds,
            "live": told.live,
        }
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()  # heartbeats go on until all have told


if __name__ == "__main__":
    main()
