"""The kit that runs vLLM on a GPU machine: that it can be made for that Python, is complete, and fits; packed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.transfer.conftest import ROOT
from tools.gpu_vllm import pack, vllm_part
from tools.gpu_vllm.wheels import KitError, download, missing

pytestmark = pytest.mark.vllm  # it packs real vLLM, and builds a model of what it packed

THERE = set((ROOT / "tools/gpu_vllm/machine_packages.txt").read_text().split())
NOT_IMPORTED = {"dnspython"}  # by an engine: email-validator asks for it where it looks a domain up


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu-kit") / "kit"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_HUB_OFFLINE", "1")  # as packing sets it, for a process of its own
        pack.pack(folder)
    return folder


def test_it_fits_beside_the_checkout(kit: Path) -> None:
    manifest = json.loads((kit / "kit.json").read_text())
    sizes = manifest["bytes"]
    on_disk = sum(file.stat().st_size for file in kit.rglob("*") if file.is_file() and file.name != "kit.json")
    assert sizes["total"] == on_disk + sizes["checkout"] <= 64 << 20
    assert manifest["nixl"]
    assert 20 << 20 < sizes["of wheels, NIXL"] < 30 << 20


def test_every_requirement_is_carried_or_there(kit: Path) -> None:
    wheels = [*(kit / "wheels").glob("*.whl"), *(kit / "peers").glob("*.whl")]
    asked = [line for name in ("gpu-vllm", "gpu-vllm-peers") for line in _lines(ROOT / f"requirements/{name}.txt")]
    assert len(wheels) == len(asked) + 1, "NIXL beside them"
    assert set(missing(wheels, THERE)) == NOT_IMPORTED


def test_wheels_are_for_that_python_or_any(kit: Path) -> None:
    for wheel in (kit / "wheels").glob("*.whl"):
        python, abi, platform = wheel.stem.split("-")[-3:]
        assert "cp312" in python or "abi3" in abi or python.endswith("py3") or "py3" in python.split("."), wheel.name
        assert platform == "any" or "x86_64" in platform, wheel.name


def test_the_project_is_there_and_compiled(kit: Path) -> None:
    with tarfile.open(kit / "project.tar.xz") as packed:
        names = {Path(name) for name in packed.getnames()}
    assert names == {*pack.tracked(), *pack.compiled()}
    assert Path("tests/vllm/engine_host.py") in names
    assert any(name.match("digest.abi3.so") for name in names)


def test_what_has_no_wheel_is_told(tmp_path: Path) -> None:
    with pytest.raises(KitError, match=r"no wheels for Python 3\.12 of pydantic-core==0\.0\.0"):
        download(tmp_path, "pydantic-core==0.0.0")


def test_too_much_is_refused(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "LIMIT_BYTES", 1 << 20)
    with pytest.raises(KitError, match="1048576 may"):
        pack._manifest(kit)


def test_vllm_is_its_python_part_and_two_modules_of_ours(kit: Path) -> None:
    with tarfile.open(kit / "vllm.tar.xz") as packed:
        names = set(packed.getnames())
    assert set(vllm_part.STUBS) < names
    assert f"vllm-{vllm_part.version()}.dist-info/METADATA" in names
    assert not [name for name in names if name.endswith(".so")]


@pytest.fixture(scope="session")
def on_a_faked_platform(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM out of the kit says on a CUDA platform that is none; with this Python's packages beside it."""
    folder = tmp_path_factory.mktemp("overlay")
    with tarfile.open(kit / "vllm.tar.xz") as packed:
        packed.extractall(folder, filter="data")
    command = [sys.executable, "-m", "tools.gpu_vllm.faked_platform", str(kit / "tiny")]
    environ = {**os.environ, "PYTHONPATH": str(folder), "VLLM_CACHE_ROOT": str(folder / "cache")}
    ran = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert found["vllm"].startswith(str(folder))
    return found


def test_vllm_without_kernels_builds_a_model_for_cuda(on_a_faked_platform: dict[str, Any]) -> None:
    assert on_a_faked_platform["platform"] == "NvmlCudaPlatform"
    [model] = on_a_faked_platform["models"].values()
    assert model["class"] == "LlamaForCausalLM"
    assert model["device"] == "cuda"
    assert model["worker"] == "vllm.v1.worker.gpu_worker.Worker"
    assert model["attention"] == ["TritonAttentionImpl"]
    assert model["parameters_processed"] == model["parameters"] > 0
    assert not model["v2_runner"]


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
