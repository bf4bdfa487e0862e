"""`mx bench peer` over RDMA ports: the link by NIXL's one descriptor, and the product, which goes over the same ports.

Soft-RoCE knows the first network namespace alone, so that the listener is on another node by its own namespaces of
processes, of their memory and of the host's name, as all workers here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.rdma.conftest import ENDS, packets_sent
from tests.transfer.conftest import OTHER_NODE, RDMA_PORTS

pytestmark = pytest.mark.rdma
PACKET_BYTES = 1024
MIB = 4
MX_BENCH = [sys.executable, "-c", "from mxcore.cli.main import main; main()", "bench"]


def test_the_link_and_the_product_by_rdma() -> None:
    address = ENDS["mxa"][0]
    there = {**os.environ, "UCX_NET_DEVICES": f"{RDMA_PORTS[0]},lo"}
    here = {**os.environ, "UCX_NET_DEVICES": f"{RDMA_PORTS[-1]},lo"}
    listen = [*OTHER_NODE, *MX_BENCH, "peer", "--listen", "--address", address, "--once"]
    before = packets_sent(RDMA_PORTS[0])
    with subprocess.Popen(listen, stderr=subprocess.PIPE, text=True, env=there) as listener:
        assert listener.stderr is not None
        assert "listening on" in listener.stderr.readline()
        words = ["--transport", "rdma", "--direction", "take", "--shape", "few", "--rounds", "1", "--seconds", "0.5"]
        connect = [*MX_BENCH, "peer", "--connect", address, "--mib", str(MIB), *words, "--json"]
        ran = subprocess.run(connect, capture_output=True, text=True, env=here)
        listener.kill()
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["figures"]["take_link_nixl_rdma_gbps"] > 0
    assert told["figures"]["take_rdma_few_gbps"] > 0
    assert packets_sent(RDMA_PORTS[0]) - before >= 2 * (MIB << 20) // PACKET_BYTES
    assert all("ACTIVE" in port["state"] for port in told["hosts"]["here"]["rdma_ports"])
