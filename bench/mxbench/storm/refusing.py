"""What a holder whose places are all taken costs its process: its readers come back when they are told to."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

from mxbench.control.processes import cpu_seconds
from mxbench.fleet.fleet import Fleet
from mxbench.storm.connections import own_connections
from mxcore.errors import SourceBusy, TransferError
from mxcore.transfer.move import Source, SourceClient
from mxserver.wire.calls import ServerClient

MIB = 1 << 20
PLACES = 8
SETTLE_SECONDS = 15.0  # until each was refused once, and was told when to come back
SECONDS = 20.0
RENEW_SECONDS = 5.0


@dataclass(frozen=True)
class Refusing:
    """The share of a core while so many are refused, and eight have leases; the same while nobody calls; how often one
    was refused in all, and how many readers failed.
    """

    core_share: float
    idle_core_share: float
    refusals: int
    failed: int


def measured(refused: int) -> Refusing:
    own_connections()
    task = {
        "model": "bench/refusing",
        "content": 5,
        "model_bytes": 64 * MIB,
        "chunk_bytes": MIB,
        "strategy": "star",
        "role": "seed",
        "settings": {"MX_SOURCE_MAX_READERS": PLACES},
    }
    with Fleet() as fleet:
        process = fleet.add(task)
        process.expect("serving")
        with ServerClient(fleet.address) as client:
            [ref] = client.list_sources()
        source = Source(ref.mx_source_id, ref.worker_id, ref.worker_rank, ref.worker_grpc_endpoint)
        idle = _share(process.popen.pid, SECONDS / 4)
        over, refusals, failed = threading.Event(), list[float](), list[str]()
        threads = [
            threading.Thread(target=_read, args=(source, number, over, refusals, failed), daemon=True)
            for number in range(PLACES + refused)
        ]
        for thread in threads:
            thread.start()
            if len([each for each in threads if each.ident]) == PLACES:
                time.sleep(1.0)  # these have the places
        over.wait(SETTLE_SECONDS)
        share = _share(process.popen.pid, SECONDS)
        over.set()
        for thread in threads:
            thread.join()
    return Refusing(share, idle, len(refusals), len(failed))


def _share(pid: int, seconds: float) -> float:
    began, used = time.monotonic(), cpu_seconds(pid)
    time.sleep(seconds)
    return (cpu_seconds(pid) - used) / (time.monotonic() - began)


def _read(source: Source, number: int, over: threading.Event, refusals: list[float], failed: list[str]) -> None:
    """One reader, as a receive is one: it keeps its connection, and its lease once it has one."""
    chance = random.Random(number)
    try:
        with SourceClient(source, timeout_seconds=30.0) as client:
            while not over.is_set():
                try:
                    lease = client.prepare()
                    while not over.wait(RENEW_SECONDS):
                        client.renew(lease)
                except SourceBusy as error:  # also whose place went to another, since it reads nothing
                    refusals.append(error.again_seconds)
                    over.wait(error.again_seconds * (0.75 + 0.5 * chance.random()))
    except TransferError as error:
        failed.append(str(error))
