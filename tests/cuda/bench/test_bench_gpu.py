"""`mx bench gpu` on the stand-in: every part of it runs, and no figure of it comes out."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mxbench.gpu import peers, sections
from tests.cuda.stand_in import ROOT, StandIn
from tests.installs import installed

MAIN = [sys.executable, "-c", "from mxcore.cli.main import main; main()", "bench", "gpu"]


def test_all_of_it_runs_and_no_figure_comes_out(loaded: StandIn, tmp_path: Path) -> None:
    command = [*MAIN, "--size-mib", "24", "--rounds", "1", "--folder", str(tmp_path), "--stand-in", str(loaded.path)]
    ran = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["stand_in"] is True
    assert document["figures"] == {}
    assert {"tmpfs_vs_pinned_copy", "digest_tb_per_second", "nixl_vs_device_copy", "extra_device_bytes"} <= set(
        document["ran"]
    ), document["left_out"]
    assert "no GPU" in document["device"]["name"]
    assert "GPUDirect Storage is not used: " in document["left_out"]["gpudirect"]
    assert document["left_out"]["safetensors"] == "this torch has no CUDA device"
    assert list(tmp_path.iterdir()) == []


ALL = {
    "copies": {"pinned": 50e9, "device": 2e12},
    "load": {"bytes_per_second": 45e9, "first_seconds": 1.0, "ring_bytes": 1.0, "extra_device_bytes": 0.0,
             "extra_host_bytes": 0.0, "bytes": 4e9},
    "digest": {"bytes_per_second": 2e12},
    "nixl": {"bytes_per_second": 1e12},
    "gpudirect": {"bytes_per_second": 12e9, "ring": 10e9, "share": 0.99},
}  # fmt: skip
NEED = {
    "tmpfs_vs_pinned_copy": {"copies", "load"},
    "digest_tb_per_second": {"digest"},
    "nixl_vs_device_copy": {"copies", "nixl"},
    "pinned_copy_gbps": {"copies"},
    "ring_bytes": {"load"},
    "gpudirect_vs_ring": {"gpudirect"},
}


@pytest.mark.parametrize("failed", list(sections.PARTS))
def test_a_part_that_fails_costs_its_own_figures(failed: str) -> None:
    assert sections.figures(ALL)["tmpfs_vs_pinned_copy"] == 0.9
    assert sections.figures(ALL)["gpudirect_vs_ring"] == 1.2
    assert sections.figures(ALL)["nixl_vs_device_copy"] == 0.5
    left = sections.figures({name: found for name, found in ALL.items() if name != failed})
    assert {name for name in NEED if name in left} == {name for name, parts in NEED.items() if failed not in parts}


def test_a_part_in_its_process(loaded: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    task = sections.Task(0, 8 << 20, 1, tmp_path, str(loaded.path))
    assert sections.run("digest", task)["bytes_per_second"] > 0
    with pytest.raises(ValueError, match="there is no device 7"):
        sections.run("digest", task._replace(device=7))
    with pytest.raises(ValueError, match="OUT_OF_MEMORY"):
        sections.run("copies", task._replace(size_bytes=1 << 40))
    monkeypatch.setattr(sections, "TIMEOUT_SECONDS", 0.001)
    with pytest.raises(ValueError, match=r"no end within 0.001 s"):
        sections.run("digest", task)
    monkeypatch.setattr(peers, "TIMEOUT_SECONDS", 0.001)
    with pytest.raises(ValueError, match="safetensors: no end"):
        peers.seconds("safetensors", 0, 1, [])


def test_prefetch_is_a_peer_where_safetensors_has_it() -> None:
    newer = installed("safetensors-0.9.0rc1", "safetensors==0.9.0rc1", dependencies=False)
    code = "from mxbench.gpu import peers; print(peers._without_prefetch())"
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT / 'bench'}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for folder in (newer, ROOT)
    ]
    assert said == ["", importlib.metadata.version("safetensors")]


def test_without_a_driver_it_says_so(tmp_path: Path) -> None:
    code = """
import mxcore.cuda.driver as driver
driver.CANDIDATES = ("libcuda_of_nobody.so.1",)
from mxcore.cli.main import main
main()
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, "bench", "gpu", "--folder", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 1
    assert "no usable CUDA driver" in ran.stderr
    assert "libcuda_of_nobody.so.1" in ran.stderr
    assert list(tmp_path.iterdir()) == []
