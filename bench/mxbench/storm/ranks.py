"""One process of ranks that start together: `python -m mxbench.storm.ranks`, told what to do by a JSON line on stdin.

Each rank is the product's own client code (record, heartbeat, load report, what is told, directory, wait, election)
over a connection of its own; only the bytes are left out: reading storage and receiving are time that passes, and
places at holders are counted here. The streams are read by one thread, for grpcio wakes some threads for each of them
several times a second, which hundreds in one process do not bear; for the same reason who waits looks only when told.
All workers of one rank are in one process. Moments are of the monotonic clock, which all processes of a machine share.
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

from mxbench.control.idle_streams import raise_file_limit
from mxbench.storm.connections import own_connections
from mxbench.storm.http2_stream import Watch, WatchReader
from mxbench.storm.places import OF_A_HOLDER, OF_A_RECEIVER, Moment, Places
from mxcore.transfer.member import source_wait
from mxcore.transfer.member.directory import Directory
from mxcore.transfer.member.place import Place
from mxcore.transfer.member.record import Served, WorkerRecord
from mxcore.transfer.member.source_wait import wait_for_source
from mxcore.transfer.member.storage_election import StorageElection
from mxcore.transfer.member.watched_sources import WatchedSources
from mxcore.transfer.move import Source
from mxserver.wire import WireError
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import load_pb2, mx_pb2, p2p_pb2, watch_pb2

CALL_SECONDS = 30.0
SLOW_SECONDS = 0.5  # calls that take longer are told one by one
_LOOK_SECONDS = 10.0  # at what was told; a receive looks when it is told, and each second, which no server notices
_WAIT_SECONDS = 5.0  # until who waits looks without being told, for the same reason
_SWITCH_SECONDS = 0.2  # threads that wait for Python wake so often
_MOMENTS: tuple[Moment, ...] = ("waiting", "receiving", "serving")


@dataclass(frozen=True)
class Task:
    """What this process does: `numbers` are those of its ranks in all, `ranks` those of the model. Times: seconds."""

    addresses: list[str]
    numbers: list[int]
    ranks: int
    began: float
    start_seconds: float
    read_seconds: float
    receive_seconds: float
    dying: int
    heartbeat_seconds: float
    end_seconds: float


@dataclass
class Told:
    """What all ranks of this process tell. `lock` guards it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    call_seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    slow_calls: list[tuple[float, str, float]] = field(default_factory=list)  # moment of the end, name, seconds
    loading_calls: Counter[str] = field(default_factory=Counter)  # by name, those of ranks that receive
    loading_seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    ready: dict[int, float] = field(default_factory=dict)  # rank -> when its reader was READY
    noticed: list[tuple[int, float]] = field(default_factory=list)  # rank, when a waiter asked a holder
    read: list[tuple[int, float, float]] = field(default_factory=list)  # rank, from, until: whose turn it was
    live: list[tuple[str, str]] = field(default_factory=list)  # source and worker of who lives at the end
    died: int = 0
    refused: int = 0

    def answer(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        with self.lock:
            found = {name: value for name, value in vars(self).items() if name != "lock"}
            return json.loads(json.dumps({**found, "ready": list(self.ready.items())}))  # type: ignore[no-any-return]


class CountingClient(ServerClient):
    """A client that tells of its calls."""

    def __init__(self, address: str, told: Told, reader: WatchReader) -> None:
        super().__init__(address, timeout_seconds=CALL_SECONDS)
        self._reader = reader
        self._tally = told
        self.loads = False  # whether its rank receives now

    def _call(self, name: str, method: Callable[..., Any], request: Any) -> Any:
        began = time.perf_counter()
        try:
            return super()._call(name, method, request)
        except WireError as error:
            with self._tally.lock:
                self._tally.errors[f"{name}: {error}"[:160]] += 1
            raise
        finally:
            with self._tally.lock:
                seconds = time.perf_counter() - began
                self._tally.call_seconds[name].append(seconds)
                if seconds > SLOW_SECONDS:
                    self._tally.slow_calls.append((time.monotonic(), name, seconds))
                self._tally.loading_calls[name] += self.loads

    def watch_sources(self, request: watch_pb2.WatchSourcesRequest) -> Watch:  # type: ignore[override]
        with self._tally.lock:
            self._tally.loading_calls["WatchSources"] += self.loads
        return self._reader.open(self.address, request)


class Rank:
    """One worker of one rank, from its start to the end of the run."""

    def __init__(self, task: Task, number: int, told: Told, places: Places, reader: WatchReader) -> None:
        self._task, self._told, self._places = task, told, places
        self._chance = random.Random(number)
        self.rank, self._host = number % task.ranks, number // task.ranks
        self._dies: Moment = _MOMENTS[number // 100 % 3] if number % 100 == 99 and number // 100 < task.dying else ""
        self._identity = p2p_pb2.SourceIdentity(model_name="bench/storm", tensor_parallel_size=task.ranks)
        self._client = CountingClient(task.addresses[number % len(task.addresses)], told, reader)
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
        self._turn_at = 0.0
        self._leaving = threading.Event()

    def run(self) -> None:
        """Returns when it is READY, or dead."""
        task = self._task
        time.sleep(max(0.0, task.began + task.start_seconds * self._chance.random() - time.monotonic()))
        self._record.keep()
        if self._dies == "waiting":
            threading.Timer(0.5 * task.read_seconds, self._leaving.set).start()
        sources = self._wait()
        if self._leaving.is_set() or (self._dies == "waiting" and not sources):
            self._die()
            return
        if sources:
            if not self._receive():
                self._die()
                return
        else:
            time.sleep(task.read_seconds)
        self._serve(read=not sources)
        if self._dies == "serving":
            self._die()
            return
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
            self._election, self._turn_at = election, time.monotonic()
        return answer if answer.turn == mx_pb2.STORAGE_TURN_WAIT else None

    def _receive(self) -> bool:
        """Finds a place, serves what it has, and looks for others, as a receive does. False: it died meanwhile."""
        with self._told.lock:
            self._told.noticed.append((self.rank, time.monotonic()))
        while again_seconds := self._places.take(self._worker_id):
            time.sleep(again_seconds * (0.75 + 0.5 * self._chance.random()))
        began, task = time.monotonic(), self._task
        until = began + task.receive_seconds * (
            0.25 if self._dies == "receiving" else 0.75 + 0.5 * self._chance.random()
        )
        self._client.loads, gives = True, False
        self._endpoint = f"10.0.{self._host % 250}.{self.rank}:6555"
        self._record.keep()
        loading = self._record.loads.loading(load_pb2.LOAD_PATH_PEER_TCP)
        with loading as step, WatchedSources(self._client, self._directory, self._identity) as watched:
            while (now := time.monotonic()) < until:
                step(int(100 * (now - began)), int(100 * (until - began)))
                with suppress(WireError):  # counted
                    watched.holders()
                time.sleep(min(until - now, _LOOK_SECONDS * (0.5 + self._chance.random())))
                if not gives:  # by now it has something that others want
                    gives = True
                    self._places.give(OF_A_RECEIVER)
        self._client.loads = False
        with self._told.lock:
            self._told.loading_seconds += time.monotonic() - began
        self._places.give(1)
        return self._dies != "receiving"

    def _serve(self, *, read: bool) -> None:
        self._endpoint = f"10.0.{self._host % 250}.{self.rank}:6555"
        self._record.mark_ready()
        self._record.keep()
        now = time.monotonic()
        self._places.give(OF_A_HOLDER)
        if read:
            with self._told.lock:
                self._told.ready.setdefault(self.rank, now)
                self._told.read.append((self.rank, self._turn_at, now))
        if self._election is not None:
            self._election.end(shared=True)

    def _die(self) -> None:
        """As a process that is killed: without a goodbye, and the kernel closes its connections."""
        if self._election is not None:
            self._election._stepped_down.set()
        self._record.end()
        self._client.close()
        with self._told.lock:
            self._told.died += 1


def main() -> None:
    task = Task(**json.loads(sys.stdin.readline()))
    own_connections()
    threading.stack_size(256 * 1024)
    sys.setswitchinterval(_SWITCH_SECONDS)
    source_wait._FIRST_RETRY_SECONDS = _WAIT_SECONDS
    raise_file_limit()
    told, reader = Told(), WatchReader()
    places: dict[int, Places] = defaultdict(Places)
    ranks = [Rank(task, number, told, places[number % task.ranks], reader) for number in task.numbers]
    threads = [threading.Thread(target=rank.run, daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, task.began + task.end_seconds - time.monotonic()))
    with told.lock:
        told.refused = sum(each.refusals for each in places.values())
        if missing := sum(thread.is_alive() for thread in threads):
            told.errors["ranks that had no weights at the end"] += missing
    sys.stdout.write(json.dumps(told.answer()) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()  # heartbeats go on until all have told


if __name__ == "__main__":
    main()
