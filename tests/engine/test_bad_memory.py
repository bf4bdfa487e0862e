"""A byte of an engine's weights changes in memory while they are served: MX_ON_BAD_MEMORY, in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

pytest.importorskip("torch", reason="torch is the engine's")

from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2, p2p_pb2_grpc
from tests.engine.plain_engine import write_checkpoint
from tests.engine.test_plain_engine import ROOT, options
from tests.transfer.conftest import wait_for
from tests.web.conftest import WebServer, start_web, web

__all__ = ["start_web", "web"]  # fixtures


def flip_a_byte(client: ServerClient, process: int) -> None:
    """In the first tensor that the only worker serves, by its own word."""
    [found] = client.list_sources(status=p2p_pb2.SOURCE_STATUS_READY)
    record = client.get_metadata(found.mx_source_id, found.worker_id)
    assert record is not None
    with grpc.insecure_channel(record.worker.worker_grpc_endpoint) as channel:
        request = p2p_pb2.GetTensorManifestRequest(mx_source_id=found.mx_source_id)
        tensor = p2p_pb2_grpc.WorkerServiceStub(channel).GetTensorManifest(request).tensors[0]
    with Path(f"/proc/{process}/mem").open("r+b", buffering=0) as memory:
        memory.seek(tensor.addr)
        byte = memory.read(1)[0] ^ 1
        memory.seek(tensor.addr)
        memory.write(bytes([byte]))


@pytest.mark.parametrize("on_bad_memory", ["withdraw", "end"])
def test_an_engine_with_bad_memory_goes_on_or_ends(web: WebServer, tmp_path: Path, on_bad_memory: str) -> None:
    command = {
        "folder": str(write_checkpoint(tmp_path / "model")),
        "role": "both",
        "options": options(web.address, on_bad_memory=on_bad_memory),
        "processed": True,
        "report": str(tmp_path / "report.json"),
    }
    with (
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.plain_worker", json.dumps(command)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
        ServerClient(web.address) as client,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline()
        flip_a_byte(client, process.pid)
        assert wait_for(client.doubts)
        assert client.list_sources(status=p2p_pb2.SOURCE_STATUS_READY) == []
        if on_bad_memory == "withdraw":
            process.stdin.close()  # what it waits for
        assert process.wait(60) == (0 if on_bad_memory == "withdraw" else -signal.SIGTERM)
    assert web.metric('mxserver_doubts_total{kind="own_memory"}') == 1
