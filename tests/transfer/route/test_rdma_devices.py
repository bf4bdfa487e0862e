"""Which RDMA ports count, in a tree that looks like /sys and /dev."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from mxcore.transfer.route import (
    pinnable_bytes,
    pinning_advice,
    pins_too_little,
    rdma_devices,
    rdma_ports,
    usable_ports,
)
from mxcore.transfer.route.rdma_devices import RdmaPort


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two ports of mlx5_0, one of them down; mlx5_1 is there, but not given to this container."""
    files = {
        "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
        "sys/class/infiniband/mlx5_0/ports/2/state": "1: DOWN\n",
        "sys/class/infiniband/mlx5_1/ports/1/state": "4: ACTIVE\n",
        "sys/class/infiniband_verbs/uverbs0/ibdev": "mlx5_0\n",
        "sys/class/infiniband_verbs/uverbs1/ibdev": "mlx5_1\n",
        "sys/class/infiniband_verbs/abi_version": "6\n",
        "dev/infiniband/uverbs0": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.fixture(autouse=True)
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's own limit says nothing about the tree."""
    monkeypatch.setattr(rdma_devices.resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)


def give_limit(root: Path, monkeypatch: pytest.MonkeyPatch, limit_bytes: int, capabilities: str = "0") -> None:
    monkeypatch.setattr(rdma_devices.resource, "getrlimit", lambda kind: (limit_bytes, limit_bytes))
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/status").write_text(f"Name:\tx\nCapEff:\t{capabilities}\n")


@pytest.mark.parametrize(
    ("limit_bytes", "capabilities", "pinnable", "usable"),
    [
        (resource.RLIM_INFINITY, "0", None, True),
        (8 << 20, "4000", None, True),  # CAP_IPC_LOCK
        (8 << 20, "2000", 8 << 20, False),
        (2 << 30, "0", 2 << 30, True),
    ],
)
def test_a_port_is_of_no_use_where_hardly_anything_may_be_pinned(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit_bytes: int,
    capabilities: str,
    pinnable: int | None,
    usable: bool,
) -> None:
    give_limit(root, monkeypatch, limit_bytes, capabilities)
    assert pinnable_bytes(root) == pinnable
    assert usable_ports(root, {}) == ["mlx5_0:1"] * usable
    assert pins_too_little(root) == (not usable)
    advice = pinning_advice(1234, root)
    assert ("1234 bytes" in advice and f"allows {pinnable} bytes" in advice) == (pinnable is not None)


def test_a_limit_is_no_reason_without_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_limit(tmp_path, monkeypatch, 65536)
    assert not pins_too_little(tmp_path)
    assert pinning_advice(1234, tmp_path) == ""


def test_a_machine_without_rdma(tmp_path: Path) -> None:
    assert rdma_ports(tmp_path) == []
    assert usable_ports(tmp_path, {}) == []


def test_every_port_is_named_with_what_holds_of_it(root: Path) -> None:
    assert rdma_ports(root) == [
        RdmaPort("mlx5_0:1", "4: ACTIVE", openable=True),
        RdmaPort("mlx5_0:2", "1: DOWN", openable=True),
        RdmaPort("mlx5_1:1", "4: ACTIVE", openable=False),
    ]


@pytest.mark.parametrize(
    ("chosen", "usable"),
    [
        (None, True),
        ("all", True),
        ("mlx5_0:1", True),
        ("eth0, mlx5_0", True),
        ("^eth0", True),
        ("eth0", False),
        ("mlx5_1:1", False),
        ("^eth0,mlx5_0:1", False),
    ],
)
def test_only_what_is_active_openable_and_chosen_is_used(root: Path, chosen: str | None, usable: bool) -> None:
    assert usable_ports(root, {} if chosen is None else {"UCX_NET_DEVICES": chosen}) == ["mlx5_0:1"] * usable
