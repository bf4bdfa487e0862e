"""`vllm serve --load-format mx`, as users run it: the goodbye that the server sees."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxbench.demo import processes
from mxbench.demo.workers import Worker
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2

SEEN_SECONDS = 60.0  # less than a lease, after which it would be stale without a goodbye


@pytest.fixture
def client(server: str) -> Iterator[ServerClient]:
    with ServerClient(server) as connected:
        yield connected


def status(client: ServerClient, report: dict[str, str]) -> p2p_pb2.SourceStatus.ValueType:
    record = client.get_metadata(report["source_id"], report["worker_id"])
    assert record is not None
    return record.worker.status


def wait_for_stale(client: ServerClient, report: dict[str, str]) -> None:
    deadline = time.monotonic() + SEEN_SECONDS
    while status(client, report) != p2p_pb2.SOURCE_STATUS_STALE:
        assert time.monotonic() < deadline, f"worker {report['worker_id']} is still {status(client, report)}"
        time.sleep(0.05)


@pytest.mark.parametrize("separate_engine", ["0", "1"])
def test_sigterm_is_a_goodbye(
    separate_engine: str,
    folder: Path,
    server: str,
    client: ServerClient,
    model_paths: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM kills its engine and workers right after SIGTERM; the server must hear of it all the same."""
    monkeypatch.setitem(processes.ENGINE_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING", separate_engine)
    worker = Worker(
        f"serve-{separate_engine}", model_paths["llama"], folder, load_format="mx", pooling=False, server=server
    )
    try:
        worker.start()
        report = worker.report()
        assert status(client, report) == p2p_pb2.SOURCE_STATUS_READY
        os.kill(worker.child.pid, signal.SIGTERM)
        wait_for_stale(client, report)
    finally:
        worker.child.stop()
