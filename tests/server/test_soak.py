"""Workers that come and go: nothing of a server grows with how many there were.

A hundred of them in `make test`, 10,000 by `make soak-server`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2
from tests.server.conftest import ServerProcess
from tests.server.stores import READY, STALE

JOINS = int(os.environ.get("SOAK_JOINS", "120"))
AT_ONCE = 4
MODELS = 7
MORE_MIB = 24  # the allocator's own ups and downs, however many workers there were
MORE_DESCRIPTORS = 8  # of connections that were closed a moment ago


class Weight(NamedTuple):
    """What a process holds."""

    threads: int
    descriptors: int
    mib: float


def weight_of(pid: int) -> Weight:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.split()}
    return Weight(int(fields["Threads"]), len(os.listdir(f"/proc/{pid}/fd")), int(fields["VmRSS"]) / 1024)  # noqa: PTH208


def join_and_leave(address: str, number: int) -> None:
    """A worker's life, over a connection of its own."""
    identity = p2p_pb2.SourceIdentity(mx_version="mx-1", model_name=f"soak/model-{number % MODELS}")
    metadata = p2p_pb2.WorkerMetadata(nixl_metadata=os.urandom(20_000), worker_grpc_endpoint="10.0.0.1:6555")
    name = f"worker-{number}"
    with ServerClient(address) as client:
        joined = client.publish(identity, metadata, name)
        client.update_status(joined.mx_source_id, name, 0, READY, epoch=joined.epoch)
        assert name in {row.worker_id for row in client.list_sources(identity, status=READY)}
        assert client.get_metadata(joined.mx_source_id, name) is not None
        client.update_status(joined.mx_source_id, name, 0, STALE, epoch=joined.epoch)


def until_gone(address: str) -> None:
    """Until the records of those who left were deleted."""
    pause = threading.Event()
    with ServerClient(address) as client:
        for _ in range(1200):
            if not client.list_sources():
                return
            pause.wait(0.1)
    raise AssertionError("records of workers that left are still there after two minutes")


@pytest.mark.timeout(3600)
def test_nothing_grows_with_workers_that_came_and_went(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--heartbeat-timeout", "60", "--gc-timeout", "1")
    weights = []
    with ThreadPoolExecutor(AT_ONCE) as workers:
        for part in (range(JOINS // 3), range(JOINS // 3, JOINS)):  # the first third has opened what stays open
            list(workers.map(lambda number: join_and_leave(server.address, number), part))
            until_gone(server.address)
            weights.append(weight_of(server.process.pid))
    before, after = weights
    assert after.threads <= before.threads + 4 * AT_ONCE, weights  # four kinds of calls get threads as they need them
    assert after.descriptors <= before.descriptors + MORE_DESCRIPTORS, weights
    assert after.mib <= before.mib + MORE_MIB, weights
