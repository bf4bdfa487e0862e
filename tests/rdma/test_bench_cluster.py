"""`mx bench cluster` over RDMA ports: two machines, one of them another node as the workers here are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rdma.conftest import ENDS, packets_sent
from tests.transfer.conftest import OTHER_NODE, RDMA_PORTS

pytestmark = pytest.mark.rdma
PACKET_BYTES = 1024
MIB = 4
MX = [sys.executable, "-c", "from mxcore.cli.main import main; main()", "bench"]
SMALL = ["--mib", str(MIB), "--chunk-mib", "1", "--connections", "1", "--seconds", "0.5", "--strategy", "swarm"]


def test_a_model_goes_around_by_rdma(tmp_path: Path) -> None:
    there, here = ENDS["mxa"]
    (tmp_path / "hosts").write_text(f"there agent={there}:6570 address={there}\nhere here address={here}\n")
    names = {**os.environ, "UCX_NET_DEVICES": f"{RDMA_PORTS[0]},lo"}
    listen = [*OTHER_NODE, *MX, "peer", "--listen", "--address", there]
    before = packets_sent(RDMA_PORTS[0])
    with subprocess.Popen(listen, stderr=subprocess.PIPE, text=True, env=names) as listener:
        assert listener.stderr is not None
        assert "listening on" in listener.stderr.readline()
        words = ["--hosts", str(tmp_path / "hosts"), "--run", str(tmp_path / "run"), "--transport", "rdma", *SMALL]
        ran = subprocess.run(
            [*MX, "cluster", *words],
            capture_output=True,
            text=True,
            env={**os.environ, "UCX_NET_DEVICES": f"{RDMA_PORTS[-1]},lo"},
        )
        listener.kill()
    assert ran.returncode == 0, ran.stderr
    for step in ("fan-out-swarm-1", "update"):
        [file] = (tmp_path / "run/steps").glob(f"*-{step}.json")
        done = json.loads(file.read_text())["done"]["here"]
        assert (done["path"], done["transport"], done["right"]) == ("p2p", "rdma", True), step
    assert packets_sent(RDMA_PORTS[0]) - before >= 3 * (MIB << 20) // PACKET_BYTES  # fan-out, both versions
