"""What an engine's load and its readers count, as a scrape sees it: real workers, a real server, real transfers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is the engine's")

from mxbench.fleet.free_ports import free_port  # noqa: E402
from mxcore.engine import load  # noqa: E402
from tests.engine.plain_engine import LAYERS, SIZE, PlainEngine, write_checkpoint  # noqa: E402
from tests.engine.plain_worker import ROLES  # noqa: E402
from tests.metrics.test_counted_events import Counted, counted  # noqa: E402
from tests.metrics.test_metrics import end_exporters, exposition, metric  # noqa: E402
from tests.web.conftest import wait_for  # noqa: E402

__all__ = ["counted"]  # a fixture
ROOT = Path(__file__).parents[2]
BYTES = LAYERS * SIZE * SIZE * 4


@pytest.fixture
def ports(tmp_path: Path, server: str) -> Iterator[tuple[int, int]]:
    """Those of a worker that read storage, and of one that took its weights; both serve."""
    folder = write_checkpoint(tmp_path / "model")
    given = (free_port(), free_port())
    running = []
    for index, port in enumerate(given):
        options = {
            "server_address": server,
            "worker_host": "127.0.0.1",
            "worker_grpc_port": 0,
            "metrics_port": port,
            "load_paths": ["engine"] if index == 0 else ["p2p"],
        }
        command = {
            "folder": str(folder),
            "role": "both",
            "options": options,
            "processed": True,
            "report": str(tmp_path / f"report-{index}.json"),
        }
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.engine.plain_worker", json.dumps(command)],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(tmp_path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert running[-1].stdout is not None
        assert running[-1].stdout.readline()
    yield given
    for process in running:
        process.kill()
        process.communicate()
    end_exporters(tmp_path)


def test_what_moved_is_counted_on_both_sides(ports: tuple[int, int]) -> None:
    source, receiver = ports
    for port in ports:
        wait_for(lambda port=port: metric(port, "mxworker_ranks") == 1)  # type: ignore[misc]
    assert metric(source, 'mxworker_loads_total{path="storage"}') == 1
    assert metric(receiver, 'mxworker_loads_total{path="p2p"}') == 1
    came = {
        transport: metric(receiver, f'mxworker_received_bytes_total{{path="p2p",transport="{transport}"}}')
        for transport in ("same-host", "tcp", "rdma", "cuda-ipc")
    }
    [transport] = [name for name, count in came.items() if count]
    assert came[transport] == BYTES
    assert metric(source, f'mxworker_given_bytes_total{{transport="{transport}"}}') == BYTES
    verified = metric(receiver, "mxworker_chunks_verified_total")
    assert verified is not None
    assert verified > 0
    assert metric(receiver, "mxworker_wrong_chunks_total") == 0
    wait_for(lambda: metric(source, "mxworker_readers") == 0)
    assert metric(source, 'mxworker_leases_total{event="granted"}') == metric(
        source, 'mxworker_leases_total{event="released"}'
    )
    for port in ports:
        assert metric(port, "mxworker_serving") == 1
        text = exposition(port)
        assert 'mx_load_phase_seconds_count{phase="process"} 1.0' in text
        whole = sum(map(float, re.findall(r"^mx_load_seconds_sum\{.*\} (\S+)$", text, re.MULTILINE)))
        phases = sum(map(float, re.findall(r"^mx_load_phase_seconds_sum\{.*\} (\S+)$", text, re.MULTILINE)))
        assert 0 < phases <= whole + 0.001, "they are parts of it; the whole is rounded to milliseconds"
        wait_for(lambda port=port: (metric(port, "mxworker_self_checked_chunks_total") or 0) > 0)  # type: ignore[misc]
        assert metric(port, "mxworker_self_checked_wrong_chunks_total") == 0


def test_a_load_that_fails_is_counted_as_one_that_failed(counted: Counted, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights"):
        load(PlainEngine(tmp_path / "nothing", {}), ROLES["both"])
    assert counted("mx_load_seconds_count", path="none", outcome="error") == 1
    assert counted("mx_load_seconds_count", path="storage", outcome="success") == 0
