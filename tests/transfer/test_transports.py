"""Which transport, which operation, and the proof that memory can be read on this host."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mxcore.transfer.same_host import ProbeTarget, can_read
from mxcore.transfer.transports import UCX_DEFAULTS, UcxPolicy, choose_route, has_rdma_device, ucx_environment
from mxserver.wire import mx_pb2
from tests.transfer.conftest import ROOT

READ_PROBE = (
    "import sys; from mxcore.transfer.same_host import can_read; from mxserver.wire import mx_pb2; "
    "sys.exit(0 if can_read(mx_pb2.SameHostProbe.FromString(bytes.fromhex(sys.argv[1]))) else 3)"
)


def policy(transport: str, tls: str = "") -> UcxPolicy:
    return UcxPolicy.from_environment(transport, {"UCX_TLS": tls} if tls else {})  # type: ignore[arg-type]


def test_another_process_reads_the_probe() -> None:
    target = ProbeTarget()
    message = target.to_proto().SerializeToString().hex()
    assert subprocess.run([sys.executable, "-c", READ_PROBE, message], cwd=ROOT, check=False).returncode == 0


def test_a_process_that_may_not_read_is_not_fooled() -> None:
    target = ProbeTarget()
    message = target.to_proto().SerializeToString().hex()
    namespaced = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*namespaced, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("making a PID namespace needs CAP_SYS_ADMIN")
    result = subprocess.run([*namespaced, sys.executable, "-c", READ_PROBE, message], cwd=ROOT, check=False)
    assert result.returncode == 3


@pytest.mark.parametrize(
    "change",
    [
        {"boot_id": "another host"},
        {"pid_namespace": 1},
        {"nonce": b"\1" * 32},
        {"nonce": b"short"},
        {"address": 8},
        {"pid": 0},
        {"pid": 2**22 + 1},
    ],
)
def test_a_probe_that_is_not_so_is_no_proof(change: dict[str, object]) -> None:
    target = ProbeTarget()
    probe = target.to_proto()
    assert can_read(probe)
    for name, value in change.items():
        setattr(probe, name, value)
    assert not can_read(probe)


@pytest.mark.parametrize(
    ("tls", "allowed", "forbidden"),
    [
        ("all", ["cma", "tcp", "rc"], []),
        ("tcp,self", ["tcp"], ["cma", "rc"]),
        ("^tcp", ["cma", "rc"], ["tcp"]),
        ("^cma,tcp", ["rc"], ["cma", "tcp"]),
        ("rc_mlx5,self", ["rc"], ["cma", "tcp"]),
        ("ib,sm", ["rc", "cma"], ["tcp"]),
    ],
)
def test_what_a_list_of_transports_allows(tls: str, allowed: list[str], forbidden: list[str]) -> None:
    chosen = policy("auto", tls)
    assert all(chosen.allows(name) for name in allowed)
    assert not any(chosen.allows(name) for name in forbidden)


@pytest.mark.parametrize(
    ("transport", "tls", "effective", "fenceable"),
    [
        ("auto", "", "all", "^cma,knem,xpmem"),
        ("tcp", "", "tcp,self", "tcp,self"),
        ("same-host", "", "tcp,cma,self", "tcp,self"),
        ("rdma", "", "^tcp", "^tcp,cma,knem,xpmem"),
        ("tcp", "rc,tcp,cma", "rc,tcp,cma", "rc,tcp"),
        ("auto", "^cma", "^cma", "^cma,knem,xpmem"),
    ],
)
def test_the_users_list_wins_and_writes_come_by_fenceable_ways(
    transport: str, tls: str, effective: str, fenceable: str
) -> None:
    chosen = policy(transport, tls)
    assert chosen.tls == effective
    assert chosen.fenceable == fenceable
    assert not UcxPolicy("auto", chosen.fenceable).allows("cma")


def offer(holder: UcxPolicy, target: ProbeTarget) -> mx_pb2.TransportOffer:
    return holder.to_proto(target.to_proto())


@pytest.mark.parametrize(
    ("receiver", "holder", "operation", "transport"),
    [
        (("auto", ""), ("auto", ""), "read", "same-host"),
        (("same-host", ""), ("auto", ""), "read", "same-host"),
        (("tcp", ""), ("auto", ""), "write", "tcp"),
        (("auto", ""), ("tcp", ""), "write", "tcp"),
        (("auto", "tcp,self"), ("auto", ""), "write", "tcp"),
        (("auto", ""), ("auto", "^cma"), "write", "tcp"),
        (("rdma", ""), ("rdma", ""), "read", "rdma"),
        (("rdma", ""), ("auto", ""), "write", "rdma" if has_rdma_device() else "tcp"),
        (("rdma", "tcp"), ("rdma", ""), "write", "tcp"),  # TCP is there: a READ could be emulated
        (("rdma", ""), ("rdma", "all"), "write", "rdma" if has_rdma_device() else "tcp"),
    ],
)
def test_read_only_where_it_is_one_sided_for_certain(
    receiver: tuple[str, str], holder: tuple[str, str], operation: str, transport: str
) -> None:
    target = ProbeTarget()
    route = choose_route(policy(*receiver), offer(policy(*holder), target))
    assert (route.operation, route.transport) == (operation, transport)
    if operation == "write":
        assert not UcxPolicy("auto", route.tls).allows("cma")
    if transport == "same-host":
        assert not UcxPolicy("auto", route.tls).allows("rc")  # nothing one-sided but what was proven


def test_without_proof_no_read() -> None:
    target = ProbeTarget()
    promised = offer(policy("auto"), target)
    promised.probe.nonce = b"\0" * 32
    assert choose_route(policy("auto"), promised).operation == "write"
    assert choose_route(policy("auto"), mx_pb2.TransportOffer(same_host_read=True)).operation == "write"


def test_the_environment_of_an_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*UCX_DEFAULTS, "UCX_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UCX_TCP_TX_SEG_SIZE", "1m")
    with ucx_environment("tcp"):
        assert os.environ["UCX_TLS"] == "tcp"
        assert os.environ["UCX_TCP_TX_SEG_SIZE"] == "1m"  # the user's
        assert os.environ["UCX_TCP_USER_TIMEOUT"] == "4s"
    assert "UCX_TLS" not in os.environ
    monkeypatch.setenv("UCX_TLS", "rc")
    with ucx_environment("tcp"):
        assert os.environ["UCX_TLS"] == "tcp"
    assert os.environ["UCX_TLS"] == "rc"
    for name in UCX_DEFAULTS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("tls", "fenceable", "serving"),
    [
        (None, "^cma,knem,xpmem,cuda_ipc", "all"),
        ("tcp,self", "tcp,self,cuda_copy", "tcp,self,cuda_copy"),
        ("tcp,cma,cuda_ipc,cuda_copy", "tcp,cuda_copy", "tcp,cma,cuda_ipc,cuda_copy"),
        ("^tcp", "^tcp,cma,knem,xpmem,cuda_ipc", "^tcp"),
        ("^cuda_ipc", "^cuda_ipc,cma,knem,xpmem", "^cuda_ipc"),
    ],
)
def test_device_memory_goes_by_ways_that_can_be_fenced(tls: str | None, fenceable: str, serving: str) -> None:
    policy = UcxPolicy.from_environment("auto", {"UCX_TLS": tls} if tls else {})
    assert policy.device_fenceable == fenceable
    assert policy.serving_device == serving
    assert policy.likely(same_host=True, device_memory=True) == fenceable


@pytest.mark.parametrize("where", ["receiver", "holder"])
def test_device_memory_is_written_or_read_over_rdma(where: str) -> None:
    policy = UcxPolicy.from_environment("auto", {})
    offer = mx_pb2.TransportOffer(same_host_read=True, device_memory=where == "holder")
    route = choose_route(policy, offer, device_memory=where == "receiver")
    assert (route.operation, route.transport, route.tls) == ("write", "tcp", "^cma,knem,xpmem,cuda_ipc")
    rdma = UcxPolicy.from_environment("rdma", {})
    offer = mx_pb2.TransportOffer(rdma_only=True, device_memory=where == "holder")
    route = choose_route(rdma, offer, device_memory=where == "receiver")
    assert (route.operation, route.transport, route.tls) == ("read", "rdma", "^tcp")
