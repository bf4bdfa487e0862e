"""Which transport, which operation, and the proof that memory can be read on this host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from mxcore.process import c_getenv
from mxcore.transfer.route import ProbeTarget, UcxPolicy, can_read, choose_route, ucx_settings
from mxcore.transfer.route import routes as transports
from mxcore.transfer.route.routes import UCX_DEFAULTS, Transport
from mxserver.wire.proto import mx_pb2
from tests.transfer.conftest import ROOT

READ_PROBE = (
    "import sys; from mxcore.transfer.route.same_host import can_read; from mxserver.wire.proto import mx_pb2; "
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
        ("ib,sm", ["rc", "cma", "sysv"], ["tcp"]),
        ("^sm", ["rc", "tcp"], ["cma", "xpmem", "posix"]),
        ("^ib", ["tcp", "cma"], ["rc"]),
        ("rc,mm", ["rc", "xpmem", "posix"], ["cma", "tcp"]),
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
        ("rdma", "", "^tcp,sysv,posix", "^tcp,sysv,posix,cma,knem,xpmem"),
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


@pytest.fixture
def no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "usable_ports", list)


@pytest.fixture
def a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "usable_ports", lambda: ["mlx5_0:1"])


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
        (("rdma", ""), ("auto", ""), "write", "tcp"),
        (("rdma", "tcp"), ("rdma", ""), "write", "tcp"),  # TCP is there: a READ could be emulated
        (("rdma", "^tcp"), ("rdma", ""), "write", "tcp"),  # or over shared memory
        (("rdma", ""), ("rdma", "all"), "write", "tcp"),
    ],
)
@pytest.mark.usefixtures("no_port")
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


@pytest.mark.parametrize(
    ("receiver", "tcp_transfer", "operation"),
    [
        (("tcp", ""), "sockets", "send"),
        (("tcp", ""), "nixl", "write"),
        (("auto", "^cma"), "sockets", "send"),
        (("auto", "^cma,tcp"), "sockets", "write"),  # the user leaves TCP out
        (("rdma", ""), "sockets", "write"),
        (("auto", ""), "sockets", "read"),  # by cross-memory attach
    ],
)
@pytest.mark.usefixtures("no_port")
def test_host_memory_is_sent_over_tcp_from_where_there_is_a_chunk_port(
    receiver: tuple[Transport, str], tcp_transfer: Literal["sockets", "nixl"], operation: str
) -> None:
    transport, tls = receiver
    here = UcxPolicy.from_environment(transport, {"UCX_TLS": tls}, tcp_transfer=tcp_transfer)
    target = ProbeTarget()
    there = offer(policy("auto"), target)
    there.chunk_port = 4711
    route = choose_route(here, there)
    assert route.operation == operation
    assert route.by_nixl == (operation == "write")
    assert choose_route(here, there, device_index=0).operation == "write"  # from the host into a device: staged by UCX
    tried = here.fallback_route(there, device_memory=False, without_rdma=True, without_sockets=True)
    assert tried.operation == "write"
    there.chunk_port = 0
    assert choose_route(here, there).operation in ("read", "write")


@pytest.mark.usefixtures("no_port")
def test_a_list_for_rdma_leaves_our_sockets_where_there_is_no_port() -> None:
    assert policy("auto", "rc,cuda_copy,cuda_ipc").sends
    assert policy("tcp", "rc").sends
    assert not policy("rdma", "rc").sends


@pytest.mark.usefixtures("a_port")
def test_a_list_for_rdma_keeps_our_sockets_out_where_there_is_a_port() -> None:
    assert not policy("auto", "rc,cuda_copy,cuda_ipc").sends


@pytest.mark.parametrize(
    ("receiver", "holder", "tls"),
    [
        (("auto", ""), ("auto", "^cma"), "^tcp,sysv,posix"),
        (("rdma", ""), ("auto", ""), "^tcp,sysv,posix"),
        (("rdma", "all"), ("auto", ""), "^tcp,sysv,posix"),
        (("auto", "^cma"), ("rdma", ""), "^cma,tcp,sysv,posix"),
        (("auto", "rc,tcp,sm,self"), ("auto", ""), "rc,self"),
        (("tcp", ""), ("auto", ""), None),
        (("auto", "tcp"), ("auto", ""), None),
        (("auto", "^cma"), ("same-host", ""), None),
        (("auto", "^ib,cma"), ("auto", ""), None),
    ],
)
@pytest.mark.usefixtures("a_port")
def test_with_ports_on_both_sides_a_read_goes_by_nothing_that_emulates_it(
    receiver: tuple[str, str], holder: tuple[str, str], tls: str | None
) -> None:
    route = choose_route(policy(*receiver), offer(policy(*holder), ProbeTarget()))
    if tls is None:
        assert (route.operation, route.transport) == ("write", "tcp")
    else:
        assert (route.operation, route.transport, route.tls) == ("read", "rdma", tls)
        assert not any(UcxPolicy("auto", route.tls).allows(name) for name in ("tcp", "sysv", "posix"))
        assert policy(*receiver).likely_tls(same_host=False) == tls  # the agent that is made ahead is of use


@pytest.mark.parametrize(
    ("tls", "written"),
    [
        ("", "^cma,knem,xpmem,ib"),
        ("^tcp", "^tcp,cma,knem,xpmem,ib"),
        ("rc_mlx5,ud,tcp,self", "tcp,self"),
        ("ib,tcp,cma", "tcp"),
    ],
)
def test_where_rdma_was_tried_in_vain_it_is_left_out(tls: str, written: str) -> None:
    route = policy("auto", tls).write_route(without_rdma=True)
    assert (route.operation, route.transport, route.tls) == ("write", "tcp", written)


@pytest.mark.usefixtures("a_port")
def test_on_one_host_memory_is_read_there_and_not_through_the_port() -> None:
    assert choose_route(policy("auto"), offer(policy("auto"), ProbeTarget())).transport == "same-host"
    assert policy("auto").likely_tls(same_host=True) is None
    assert policy("auto").serving("cpu") == ("all", True)  # a reader over the port connects when it likes


def test_where_too_little_may_be_pinned_nothing_touches_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX would open it, complain on every turn, and register nothing."""
    monkeypatch.setattr(transports, "pins_too_little", lambda: True)
    monkeypatch.setattr(transports, "usable_ports", list)
    assert policy("auto").tls == "^ib"
    assert policy("auto").fenceable == "^ib,cma,knem,xpmem"
    assert not policy("auto").allows("rc")
    assert policy("auto", "rc,self").tls == "rc,self"  # the user's wins
    assert policy("rdma").tls == "^tcp,sysv,posix"  # fails with advice, rather than by TCP in silence


@pytest.mark.usefixtures("a_port")
def test_device_memory_is_read_over_a_port() -> None:
    for tls, expected in (("", "^tcp,sysv,posix"), ("rc,tcp,self", "rc,self,cuda_copy")):
        receiver = policy("auto", tls)
        promised = offer(policy("auto"), ProbeTarget())
        route = choose_route(receiver, promised, device_index=0)
        assert (route.operation, route.transport, route.tls) == ("read", "rdma", expected)
        assert receiver.likely_tls(same_host=False, device_memory=True) == expected


@pytest.mark.usefixtures("no_port")
def test_without_proof_no_read() -> None:
    target = ProbeTarget()
    promised = offer(policy("auto"), target)
    promised.probe.nonce = b"\0" * 32
    assert choose_route(policy("auto"), promised).operation == "write"
    assert choose_route(policy("auto"), mx_pb2.TransportOffer(same_host_read=True)).operation == "write"


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*UCX_DEFAULTS, "TLS", "NET_DEVICES"):
        monkeypatch.delenv(f"UCX_{name}", raising=False)


def ucx_names() -> dict[str, str]:
    """What another user of UCX in this process would read now."""
    names = [f"UCX_{name}" for name in (*UCX_DEFAULTS, "TLS", "NET_DEVICES", "WARN_UNUSED_ENV_VARS")]
    return {name: value for name in names if (value := c_getenv(name)) is not None}


@pytest.mark.usefixtures("no_settings")
@pytest.mark.parametrize(("tls", "seen"), [("^ib", {}), ("tcp", {}), ("tcp,self", {"UCX_TLS": "tcp,self"})])
def test_other_users_of_ucx_see_their_own_environment(tls: str, seen: dict[str, str]) -> None:
    with ucx_settings(tls) as parameters:
        assert ucx_names() == seen  # a list cannot be told otherwise
        told = dict(part.split("=") for part in parameters["engine_config"].split(","))
    assert told == UCX_DEFAULTS | ({} if seen else {"TLS": tls})
    assert ucx_names() == {}
    with ucx_settings(tls, "GDS") as parameters:
        assert (parameters, ucx_names()) == ({}, {})


@pytest.mark.usefixtures("no_settings")
def test_what_the_user_set_for_ucx_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"UCX_TCP_TX_SEG_SIZE": "1m", "UCX_TLS": "rc"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with ucx_settings("tcp"):
        assert ucx_names() == {**own, "UCX_TLS": "tcp"}  # which NIXL would leave as it is
        assert UcxPolicy.from_environment("auto").tls == "rc"  # on another thread, say: what the user chose is known
    assert ucx_names() == own
    monkeypatch.delenv("UCX_TLS")
    with ucx_settings("tcp,self"):
        assert not UcxPolicy.from_environment("auto").chosen


def test_nixl_hands_our_settings_to_ucx(tmp_path: Path) -> None:
    """As NIXL's own log says; a setting of the user's it leaves alone."""
    code = (
        "from mxcore.transfer.move import AgentSession\nAgentSession('w', tls='tcp', progress_thread=False).fence()\n"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    log = tmp_path / "log"
    with log.open("wb") as into:  # NIXL and UCX write to both
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            env={**environ, "NIXL_LOG_LEVEL": "debug", "UCX_NET_DEVICES": "lo", "UCX_RC_RETRY_COUNT": "2"},
            stdout=into,
            stderr=into,
        )
    told = set(re.findall(r"Modified UCX config: (\S+)", log.read_text()))
    expected = {f"{name}={value}" for name, value in (UCX_DEFAULTS | {"TLS": "tcp"}).items()}
    assert expected - told == {"RC_RETRY_COUNT=3"}


@pytest.mark.parametrize(
    ("transport", "tls", "fenceable", "serving", "maps"),
    [
        ("auto", None, "^cma,knem,xpmem,cuda_ipc", "all", True),
        ("same-host", None, "tcp,self,cuda_copy", "tcp,cma,self,cuda_copy", True),
        ("tcp", None, "tcp,self,cuda_copy", "tcp,self,cuda_copy", False),
        ("rdma", None, "^tcp,sysv,posix,cma,knem,xpmem,cuda_ipc", "^tcp,sysv,posix", False),
        ("auto", "tcp,self", "tcp,self,cuda_copy", "tcp,self,cuda_copy", False),
        ("auto", "tcp,cma,cuda_ipc,cuda_copy", "tcp,cuda_copy", "tcp,cma,cuda_ipc,cuda_copy", True),
        ("auto", "tcp,cuda", "tcp,cuda_copy", "tcp,cuda", True),
        ("auto", "^tcp", "^tcp,cma,knem,xpmem,cuda_ipc", "^tcp", True),
        ("auto", "^cuda_ipc", "^cuda_ipc,cma,knem,xpmem", "^cuda_ipc", False),
    ],
)
@pytest.mark.usefixtures("no_port")
def test_device_memory_is_written_by_ways_that_can_be_fenced_or_staged_where_the_settings_allow(
    transport: str, tls: str | None, fenceable: str, serving: str, maps: bool
) -> None:
    chosen = policy(transport, tls or "")
    assert chosen.device_fenceable == fenceable
    assert chosen.serving_device == serving
    assert chosen.maps_devices == maps
    if maps:
        assert chosen.likely_tls(same_host=True, device_memory=True) is None
    assert chosen.likely_tls(same_host=False, device_memory=True) == (
        "^tcp,sysv,posix" if transport == "rdma" else fenceable
    )


@pytest.mark.parametrize("where", ["receiver", "holder", "both"])
@pytest.mark.usefixtures("no_port")
def test_device_memory_is_written_or_read_over_rdma(where: str) -> None:
    """Without a probe of the holder's device."""
    device = None if where == "holder" else 0
    offer = mx_pb2.TransportOffer(same_host_read=True, device_memory=where != "receiver", no_device_read="it is asleep")
    route = choose_route(policy("auto"), offer, device_index=device)
    assert (route.operation, route.transport, route.tls) == ("write", "tcp", "^cma,knem,xpmem,cuda_ipc")
    assert route.because == ("it is asleep" if where == "both" else "only one side's memory is on a device")
    offer = mx_pb2.TransportOffer(rdma_only=True, device_memory=where != "receiver")
    route = choose_route(policy("rdma"), offer, device_index=device)
    assert (route.operation, route.transport, route.tls) == ("read", "rdma", "^tcp,sysv,posix")


@pytest.mark.usefixtures("no_port")
def test_settings_that_leave_cuda_ipc_out_are_named() -> None:
    offer = mx_pb2.TransportOffer(device_memory=True, staging_probe=mx_pb2.DeviceProbe(nonce=b"1" * 32))
    for transport, tls in (("tcp", ""), ("auto", "tcp,cuda_copy"), ("auto", "^cuda_ipc")):
        route = choose_route(policy(transport, tls), offer, device_index=0)
        assert (route.operation, "MX_TRANSPORT, UCX_TLS" in route.because) == ("write", True)
