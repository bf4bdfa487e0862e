"""`mx doctor`'s findings of CUDA, on the stand-in and without a driver."""

from __future__ import annotations

import json
import sys

import pytest

from mxcore.cli.doctor import cuda as doctor_cuda
from mxcore.errors import CuFileMissing
from mxcore.storage.load import device_direct
from mxcore.transfer.route import UcxPolicy
from tests.cuda.stand_in import ROOT, StandIn


def holder(driver: StandIn, share: bool) -> list[str]:
    task = json.dumps({"library": str(driver.path), "mode": "probe", "share": share})
    return [sys.executable, "-m", "tests.cuda.holder", task]


@pytest.fixture(autouse=True)
def _on_the_stand_in(monkeypatch: pytest.MonkeyPatch, loaded: StandIn) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor_cuda, "_holder_command", lambda: holder(loaded, share=True))
    monkeypatch.setattr(UcxPolicy, "device_fenceable", "tcp,self")  # the stand-in's devices are no CUDA to UCX


def test_all_is_well(driver: StandIn) -> None:
    found = {finding.name: finding for finding in doctor_cuda.look()}
    assert list(found) == ["cuda", "pinned memory", "device 0", "device 1", "cuda_ipc", "gpudirect storage"]
    assert found["cuda"].fact.startswith("2 devices (stand-in 0 (no GPU), stand-in 1 (no GPU)), driver for CUDA 12.8")
    assert [finding.state for finding in found.values()] == ["ok", "ok", "ok", "ok", "ok", "note"]
    assert "not used" in found["gpudirect storage"].fact


def test_what_does_not_work_is_told_with_what_to_do(driver: StandIn) -> None:
    driver.fail("cuMemHostRegister_v2", 2)
    driver.fail_later("launch", 719)
    found = {finding.name: finding for finding in doctor_cuda.look()}
    assert found["pinned memory"].state == "warn"
    assert "IPC_LOCK" in found["pinned memory"].do
    assert (found["device 0"].state, found["device 1"].state) == ("warn", "ok")
    assert "digests of known bytes failed" in found["device 0"].fact
    assert "load from storage" in found["device 0"].do
    driver.reset()
    driver.devices(0)
    [only] = doctor_cuda.look()
    assert (only.state, "CUDA_VISIBLE_DEVICES" in only.do) == ("warn", True)
    driver.reset()


def test_device_memory_between_processes(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_cuda._between_processes(holder(driver, share=True)).state == "ok"
    failing = doctor_cuda._between_processes([sys.executable, "-c", ""])
    assert (failing.state, failing.fact.rpartition(": ")[2]) == ("warn", "none can be exported")
    driver.fail("cuIpcOpenMemHandle_v2", 101)
    failing = doctor_cuda._between_processes(holder(driver, share=True))
    assert "CUDA_ERROR_INVALID_DEVICE" in failing.fact
    assert "TCP" in failing.do
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native,expandable_segments:True")
    mapped = doctor_cuda._between_processes(["/nobody"])
    assert (mapped.state, "expandable_segments" in mapped.do) == ("note", True)


def test_a_process_of_its_own_tells_it() -> None:
    found = doctor_cuda.all_findings()
    assert found[0].name == "cuda"
    assert found[0].state in ("ok", "note", "warn")  # whatever this machine has
    assert all(finding.state == "ok" or finding.do for finding in found)


def test_a_probe_that_crashes_or_hangs_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_cuda.sys, "executable", "/bin/false")
    [finding] = doctor_cuda.all_findings()
    assert (finding.state, finding.fact) == ("warn", "the probe ended with 1")
    monkeypatch.setattr(doctor_cuda.sys, "executable", "/usr/bin/env")

    def hang(*_: object, **__: object) -> None:
        raise doctor_cuda.subprocess.TimeoutExpired("probe", 1)

    monkeypatch.setattr(doctor_cuda.subprocess, "run", hang)
    [finding] = doctor_cuda.all_findings()
    assert "no answer within" in finding.fact


def test_direct_storage_is_looked_for_in_this_order(
    gpudirect: StandIn, loaded_cufile: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str | None] = []
    monkeypatch.setattr("mxcore.storage.load.trial", lambda file: tried.append(file) or "it does not open")
    assert "it does not open" in doctor_cuda._direct_storage().fact
    monkeypatch.setattr("mxcore.storage.load.trial", lambda file: "")
    found = doctor_cuda._direct_storage()
    assert (found.state, "cuFile 1.14 opens" in found.fact) == ("ok", True)
    monkeypatch.setenv("MX_GPUDIRECT_STORAGE", "off")
    assert doctor_cuda._direct_storage().fact == "not used: MX_GPUDIRECT_STORAGE=off"
    monkeypatch.delenv("MX_GPUDIRECT_STORAGE")
    (device_direct.ROOT / "dev/nvidia-fs0").unlink()
    assert "/dev/nvidia-fs* are not here" in doctor_cuda._direct_storage().fact
    (device_direct.ROOT / "proc/driver/nvidia-fs").rmdir()
    found = doctor_cuda._direct_storage()
    assert (found.state, "nvidia-fs is not loaded" in found.fact) == ("note", True)
    assert "/run/udev" in found.do
    assert tried == [None]


def test_direct_storage_without_a_library(gpudirect: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[int, int]:
        raise CuFileMissing("no usable libcufile (libcufile.so.0: not found)")

    monkeypatch.setattr(device_direct.cufile, "version", missing)
    assert "no usable libcufile" in doctor_cuda._direct_storage().fact
