"""A source behind a slow link: real workers in network namespaces, and the count that a scrape of the receiver sees."""

from __future__ import annotations

import http.client
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from mxbench.fleet.fleet import Network
from tests.metrics.test_metrics import end_exporters
from tests.transfer.conftest import StartWorker, start_worker
from tests.transfer.test_exchange import SEED
from tests.web.conftest import wait_for

__all__ = ["start_worker"]  # a fixture

FAST, SLOW, RECEIVER = range(3)
MEGABITS = [400.0, 1.0, 400.0]
MODEL_MEGABYTES, CHUNK_BYTES = 60, 1 << 20  # a second by the fast link, eight minutes by the slow one
PORT = 9402  # in the receiver's namespace


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("network namespaces need root and iproute2")
    with Network(3, MEGABITS) as made:
        yield made
    end_exporters(tmp_path)


def counted(network: Network, series: str) -> float | None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with (
        suppress(OSError, http.client.HTTPException),
        direct.open(f"http://{network.address(RECEIVER)}:{PORT}/metrics", timeout=60) as answer,
    ):
        for line in answer.read().decode().splitlines():
            if line.startswith(series + " "):
                return float(line.rpartition(" ")[2])
    return None


def test_a_source_behind_a_slow_link_is_one_straggler(
    network: Network, start_worker: StartWorker, tmp_path: Path
) -> None:
    """It sends all the time, only too little: the other source gives what it was asked for."""
    workers = [
        start_worker(
            "tcp",
            {"MX_WORKER_HOST": network.address(place), "TMPDIR": str(tmp_path)},
            network.prefix(place),
            seed=None if place == RECEIVER else SEED,
            megabytes=MODEL_MEGABYTES,
            chunk_bytes=CHUNK_BYTES,
            metrics_port=PORT if place == RECEIVER else 0,
        )
        for place in (FAST, SLOW, RECEIVER)
    ]
    fast, slow = (workers[place].serve() for place in (FAST, SLOW))
    assert slow.endpoint.startswith(network.address(SLOW))
    wait_for(lambda: counted(network, "mxworker_stragglers_total") == 0)
    told = workers[RECEIVER].ask(do="receive", sources=[asdict(slow), asdict(fast)])
    assert told["equal"]
    assert [slow.worker_id in failure for failure in told["failures"] if "MX_SOURCE_SLOW" in failure] == [True]
    assert told["bytes_again"] >= CHUNK_BYTES, "what was in flight there came from the other"
    assert told["bytes_from"][fast.worker_id] > 0.9 * sum(told["bytes_from"].values())
    assert counted(network, "mxworker_stragglers_total") == 1
    assert counted(network, "mxworker_wrong_chunks_total") == 0
