"""`mx bench cluster` over RDMA ports: two machines in namespaces of their own, as in `test_bench_peer`; every step."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from mxbench.hosts import DEFAULT_PORT
from tests.rdma.conftest import ENDS, packets_sent
from tests.rdma.test_bench_peer import MX_BENCH, PACKET_BYTES
from tests.transfer.conftest import OTHER_NODE, RDMA_PORTS

pytestmark = pytest.mark.rdma
MIB = 2
MODELS_BY_RDMA = 4  # fan-out, storage, update: each version once


def test_every_step_by_rdma(tmp_path: Path) -> None:
    address, other = ENDS["mxa"]
    hosts, run = tmp_path / "hosts", tmp_path / "run"
    hosts.write_text(f"a agent={address}:{DEFAULT_PORT}\nb here address={other}\n")
    there = {**os.environ, "UCX_NET_DEVICES": f"{RDMA_PORTS[0]},lo"}
    here = {**os.environ, "UCX_NET_DEVICES": f"{RDMA_PORTS[-1]},lo"}
    words = ["--mib", str(MIB), "--chunk-mib", "1", "--seconds", "0.2", "--connections", "1", "--strategy", "swarm"]
    cluster = [*MX_BENCH, "cluster", "--hosts", str(hosts), "--run", str(run), *words, "--transport", "rdma"]
    before = sum(packets_sent(port) for port in RDMA_PORTS)
    listen = [*OTHER_NODE, *MX_BENCH, "peer", "--listen", "--address", address]
    with subprocess.Popen(listen, stderr=subprocess.PIPE, text=True, env=there) as listener:
        assert listener.stderr is not None
        assert "listening on" in listener.stderr.readline()
        ran = subprocess.run([*cluster, "--json"], stdout=subprocess.PIPE, text=True, env=here)
        listener.kill()
        heard = listener.stderr.read()
    assert ran.returncode == 0, heard + "".join(file.read_text() for file in run.rglob("*.failed"))
    told = json.loads(ran.stdout)
    assert (told["failed"], told["not_begun"]) == ([], [])
    assert told["figures"]["storage_readers"] == 1
    assert told["figures"]["t1_seconds"] > 0
    assert sum(packets_sent(port) for port in RDMA_PORTS) - before >= MODELS_BY_RDMA * (MIB << 20) // PACKET_BYTES
