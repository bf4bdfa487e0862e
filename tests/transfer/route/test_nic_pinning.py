"""Which network card goes with which device, in trees that look like /sys."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxcore.process import c_getenv
from mxcore.transfer.route import choose_nic, nic_pinning, pin_nic, rdma_devices, ucx_settings


@pytest.fixture(autouse=True)
def nothing_pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rdma_devices.resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    yield
    nic_pinning._pinned.clear()


class Machine:
    """A tree with PCI devices below bridges, and RDMA cards among them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._cards = 0

    def _pci(self, where: str, address: str, node: int, kind: str, vendor: str) -> Path:
        device = self.root / "sys/devices" / where / address
        device.mkdir(parents=True)
        for name, text in {"class": kind, "vendor": vendor, "numa_node": str(node)}.items():
            (device / name).write_text(text + "\n")
        listed = self.root / "sys/bus/pci/devices" / address
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.symlink_to(device)
        return device

    def gpu(self, where: str, address: str, node: int = 0) -> str:
        self._pci(where, address, node, "0x030200", "0x10de")
        return address

    def card(
        self, where: str, address: str, node: int = 0, rate: str = "400 Gb/sec (4X NDR)", usable: bool = True
    ) -> str:
        name = f"mlx5_{self._cards}"
        infiniband = self.root / "sys/class/infiniband" / name
        (infiniband / "ports/1").mkdir(parents=True)
        (infiniband / "ports/1/state").write_text("4: ACTIVE\n")
        (infiniband / "ports/1/rate").write_text(f"{rate}\n")
        (infiniband / "device").symlink_to(self._pci(where, address, node, "0x020700", "0x15b3"))
        verbs = self.root / f"sys/class/infiniband_verbs/uverbs{self._cards}"
        verbs.mkdir(parents=True)
        (verbs / "ibdev").write_text(f"{name}\n")
        (self.root / "dev/infiniband").mkdir(parents=True, exist_ok=True)
        if usable:
            (self.root / f"dev/infiniband/uverbs{self._cards}").touch()
        self._cards += 1
        return f"{name}:1"

    def chosen(self, gpu: str, told: str = "auto", least_gbps: float | None = None) -> str:
        return choose_nic(gpu, told, least_gbps=least_gbps, root=self.root).port


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_each_device_has_the_card_behind_its_switch(machine: Machine) -> None:
    gpus = [machine.gpu(f"pci{n}/switch", f"0000:{n}b:00.0", n // 2) for n in range(4)]
    cards = [machine.card(f"pci{n}/switch", f"0000:{n}c:00.0", n // 2) for n in (3, 1, 0, 2)]
    assert [machine.chosen(gpu) for gpu in gpus] == [cards[2], cards[1], cards[3], cards[0]]
    assert machine.chosen(gpus[0].upper()) == cards[2]


def test_a_card_behind_the_same_processor_is_better_than_one_behind_the_other(machine: Machine) -> None:
    gpus = [machine.gpu(f"pci{n}", f"0000:{n}b:00.0", n // 2) for n in range(4)]
    near_1 = machine.card("pci8", "0000:8c:00.0", 1)
    near_0 = machine.card("pci9", "0000:9c:00.0", 0)
    assert [machine.chosen(gpu) for gpu in gpus] == [near_0, near_0, near_1, near_1]


def test_no_card_has_more_devices_than_it_must(machine: Machine) -> None:
    """All four are nearest to one card: every rank alone would take it."""
    gpus = [machine.gpu("pci0/switch", f"0000:0{n}:00.0") for n in range(4)]
    near = machine.card("pci0/switch", "0000:0c:00.0")
    far = machine.card("pci1", "0000:1c:00.0", 1)
    assert sorted(machine.chosen(gpu) for gpu in gpus) == sorted(2 * [near] + 2 * [far])


def test_slow_and_foreign_cards_are_left_out(machine: Machine) -> None:
    gpu = machine.gpu("pci0/switch", "0000:01:00.0")
    slow = machine.card("pci0/switch", "0000:02:00.0", rate="25 Gb/sec (1X EDR)")
    machine.card("pci0/switch", "0000:03:00.0", usable=False)  # the host's, not given to this container
    fast = machine.card("pci1", "0000:11:00.0", 1)
    assert machine.chosen(gpu) == fast
    assert machine.chosen(gpu, least_gbps=10) == slow
    assert "no usable RDMA port has 800 Gb/s" in choose_nic(gpu, "auto", least_gbps=800, root=machine.root).because


def test_what_is_told_goes_by_the_order_of_addresses(machine: Machine) -> None:
    gpus = [machine.gpu("pci0", f"0000:0{n}:00.0") for n in range(3)]
    cards = [machine.card("pci0", f"0000:1{n}:00.0", rate="1 Gb/sec") for n in range(2)]
    assert [machine.chosen(gpu, "mlx5_1, mlx5_0:1") for gpu in gpus] == [cards[1], cards[0], cards[1]]
    wrong = choose_nic(gpus[0], "mlx5_7", root=machine.root)
    assert (wrong.port, wrong.because.partition(" is no")[0]) == ("", "mlx5_7:1")


def test_nothing_is_chosen_where_nothing_is_known(machine: Machine) -> None:
    assert "not among the devices" in choose_nic("0000:01:00.0", "auto", root=machine.root).because
    gpu = machine.gpu("pci0", "0000:01:00.0")
    assert choose_nic(gpu, "auto", root=machine.root).port == ""
    assert choose_nic(gpu, ",", root=machine.root).port == ""


def test_agents_are_made_with_the_pinned_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody else of this process sees it; what the user has set stays."""
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    with ucx_settings("all"):
        assert c_getenv("UCX_NET_DEVICES") is None
    pin_nic("mlx5_3:1")
    with ucx_settings("all"):
        found = (c_getenv("UCX_NET_DEVICES") or "").split(",")
    assert found[0] == "mlx5_3:1"
    assert "lo" in found  # TCP goes on
    assert c_getenv("UCX_NET_DEVICES") is None
    monkeypatch.setenv("UCX_NET_DEVICES", "mlx5_0:1")
    with ucx_settings("all"):
        assert c_getenv("UCX_NET_DEVICES") == "mlx5_0:1"
