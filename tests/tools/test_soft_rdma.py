"""The parts of `make test-rdma` that need no virtual machine: packages, module order, archive, arguments, ends."""

from __future__ import annotations

import lzma
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.transfer.conftest import ROOT
from tools.soft_rdma import __main__ as command
from tools.soft_rdma import packages
from tools.soft_rdma.errors import SoftRdmaError
from tools.soft_rdma.initramfs import Entry, archive, first_files
from tools.soft_rdma.job import job_script, verbs_environment
from tools.soft_rdma.machine import qemu_arguments, run_machine, status_of
from tools.soft_rdma.modules import WANTED, dependencies, load_order, module_bytes, module_name

SIMULATION = """\
Reading package lists...
Inst libfdt1 (1.6.1-4+b1 Debian:12.15/oldstable [amd64])
Inst qemu-system-x86 [1:7.2] (1:7.2+dfsg-7 Debian:12.15/oldstable [amd64])
Conf libfdt1 (1.6.1-4+b1 Debian:12.15/oldstable [amd64])
"""
NEEDS = """\
kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_ring.ko:
kernel/net/9p/9pnet.ko:
kernel/net/9p/9pnet_virtio.ko: kernel/net/9p/9pnet.ko kernel/drivers/virtio/virtio.ko
kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko
kernel/fs/overlayfs/overlay.ko:
kernel/drivers/infiniband/sw/rxe/rdma_rxe.ko: kernel/drivers/infiniband/core/ib-uverbs.ko
kernel/drivers/infiniband/core/ib-uverbs.ko:
kernel/net/sched/sch_netem.ko:
kernel/sound/unrelated.ko: kernel/sound/other.ko
"""


def test_what_apt_would_install_is_what_is_downloaded() -> None:
    assert packages.packages_to_install(SIMULATION) == ["libfdt1", "qemu-system-x86"]
    assert packages.packages_to_install("Reading package lists...\n") == []


def test_the_kernel_behind_the_meta_package() -> None:
    shown = "linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n"
    assert packages.kernel_packages(shown) == [
        "linux-image-6.1.0-56-amd64",
        "linux-modules-6.1.0-56-amd64",
        "linux-modules-extra-6.1.0-56-amd64",
    ]
    assert packages.kernel_packages("linux-image-amd64\n  Depends: <none>\n") == []


def test_packages_that_are_there_are_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get
    with pytest.raises(SoftRdmaError, match="no apt-get"):
        packages.extracted_packages(tmp_path / "cache")
    (tmp_path / "complete").touch()
    assert packages.extracted_packages(tmp_path) == tmp_path / "root"


def test_an_apt_that_fails_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apt-get", "dpkg"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'E: Unable to locate package qemu' >&2\nexit 100\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(packages.os, "geteuid", lambda: 1000)
    with pytest.raises(SoftRdmaError, match=r"Unable to locate package qemu.*run `apt-get update`"):
        packages.extracted_packages(tmp_path / "cache")
    assert not (tmp_path / "cache" / "complete").exists()


def test_every_module_comes_after_what_it_needs() -> None:
    needs = dependencies(NEEDS)
    order = load_order(needs, builtin=["kernel/drivers/net/veth.ko"])
    assert {module_name(path) for path in order} >= set(WANTED) - {"veth"}
    assert len(order) == len(set(order)) == 10
    for path in order:
        assert all(order.index(needed) < order.index(path) for needed in needs[path])


def test_a_kernel_without_a_module_is_refused_by_name() -> None:
    with pytest.raises(SoftRdmaError, match="no module veth"):
        load_order(dependencies(NEEDS), builtin=[])


def test_modules_are_unpacked(tmp_path: Path) -> None:
    for name, data in (("a.ko", b"\x7fELF"), ("b.ko.xz", lzma.compress(b"\x7fELF"))):
        (tmp_path / name).write_bytes(data)
        assert module_bytes(tmp_path / name) == b"\x7fELF"


def listed(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Reads an archive back, by the format's own description: name -> mode, data."""
    found, at = {}, 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name_at = at + 110
        name = data[name_at : name_at + fields[11] - 1].decode()
        data_at = name_at + fields[11] + (-(110 + fields[11]) % 4)
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], data[data_at : data_at + fields[6]])
        at = data_at + fields[6] + (-fields[6] % 4)


def test_the_archive_holds_what_was_given() -> None:
    entries = [
        Entry("bin", stat.S_IFDIR | 0o755),
        *(Entry(f"bin/{n}", stat.S_IFREG | 0o755, b"x" * n) for n in range(6)),
    ]
    assert listed(archive(entries)) == {entry.path: (entry.mode, entry.data) for entry in entries}


def test_the_first_files_are_complete_and_in_order(tmp_path: Path) -> None:
    files = first_files(b"box", b"init", b"job", [("kernel/fs/z.ko", b"z"), ("kernel/net/a.ko", b"a")])
    found = listed(archive(files))
    assert found["order"][1] == b"z.ko\na.ko\n"
    assert found["modules/z.ko"][1] == b"z"
    assert stat.S_ISCHR(found["dev/console"][0])
    assert found["init"] == (stat.S_IFREG | 0o755, b"init")
    script = (command.HERE / "init.sh").read_text()
    for name in ("mount", "insmod", "mkdir", "chroot", "cat", "poweroff"):
        assert f"{name} " in script
        assert found[f"bin/{name}"][1] == b"busybox"
    paths = [entry.path for entry in files]
    assert all(path.rpartition("/")[0] in ("", *paths[: paths.index(path)]) for path in paths)
    if shutil.which("cpio"):
        result = subprocess.run(["cpio", "-t"], input=archive(files), capture_output=True, check=True)
        assert result.stdout.decode().split() == paths


def test_scripts_are_shell(tmp_path: Path) -> None:
    arguments = ["-k", "a name with 'quotes'"]
    script = job_script(tmp_path, Path(sys.executable), tmp_path / "root", "true\n", {"IBV_DRIVERS": "/a b"}, arguments)
    assert shlex.split(script.splitlines()[-1])[-2:] == arguments
    assert "export IBV_DRIVERS='/a b'" in script
    for text in (script, *((command.HERE / name).read_text() for name in ("init.sh", "network.sh"))):
        subprocess.run(["sh", "-n"], input=text, text=True, check=True)


def test_the_driver_and_the_wheels_library_are_one(tmp_path: Path) -> None:
    driver = tmp_path / "usr/lib/x86_64-linux-gnu/libibverbs/librxe-rdmav34.so"
    driver.parent.mkdir(parents=True)
    driver.touch()
    environment = verbs_environment(tmp_path, tmp_path)
    assert environment["IBV_DRIVERS"] == str(driver.with_name("librxe"))
    link = Path(environment["LD_LIBRARY_PATH"]) / "libibverbs.so.1"
    assert link.resolve().name.startswith("libibverbs-")
    assert verbs_environment(tmp_path, tmp_path) == environment  # again, over the old link


def test_the_machine_has_no_disk_and_no_network_and_a_read_only_root() -> None:
    arguments = qemu_arguments(Path("/k"), Path("/i"), Path("/s"), memory_mib=512, firmware=[Path("/f")])
    assert "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap" in arguments
    assert arguments[arguments.index("-m") + 1] == "512M"
    assert arguments[-2:] == ["-L", "/f"]
    assert "-nodefaults" in arguments
    assert not {"-drive", "-netdev", "-nic", "-hda"} & set(arguments)


def test_a_machine_that_ends_is_copied_and_one_that_does_not_is_ended(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    console = tmp_path / "console.log"
    run_machine([sys.executable, "-c", r"print('\x1b[?7lone\r')"], {}, console, limit_seconds=60)
    assert capfdbinary.readouterr().out == b"one\n"
    assert console.read_bytes() == b"\x1b[?7lone\r\n"
    with pytest.raises(SoftRdmaError, match="QEMU ended with 4"):
        run_machine([sys.executable, "-c", "raise SystemExit(4)"], {}, console, limit_seconds=60)
    with pytest.raises(SoftRdmaError, match=r"ended after 0\.2 s"):
        run_machine([sys.executable, "-c", "import time; time.sleep(600)"], {}, console, limit_seconds=0.2)


@pytest.mark.parametrize(("text", "status"), [("0\n", 0), ("5\r\n", 5), ("", None), ("half", None)])
def test_the_guests_status(tmp_path: Path, text: str, status: int | None) -> None:
    file = tmp_path / "status"
    file.write_text(text)
    if status is not None:
        assert status_of(file) == status
        return
    with pytest.raises(SoftRdmaError, match="without an exit status"):
        status_of(file)
    file.unlink()
    with pytest.raises(SoftRdmaError, match="without an exit status"):
        status_of(file)


def test_arguments_choose_among_what_is_marked() -> None:
    def collected(*arguments: str) -> list[str]:
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", *command.PYTEST_ARGUMENTS, *arguments],
            cwd=ROOT,
            env={**os.environ, "TEST_RDMA": "rxea:1,rxeb:1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return [line for line in ran.stdout.splitlines() if "::" in line]

    everything = collected()
    assert {name.split("/")[1] for name in everything} == {"rdma", "transfer"}
    assert all(name.startswith("tests/rdma/") or "rdma" in name.partition("[")[2] for name in everything)
    assert collected("-k", "two_receivers") == ["tests/transfer/test_exchange.py::test_two_receivers_at_once[rdma]"]


def test_another_processor_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(sys, "argv", ["soft_rdma"])
    assert command.main() == 3
    assert "only x86_64 is supported, this is aarch64" in capsys.readouterr().err
