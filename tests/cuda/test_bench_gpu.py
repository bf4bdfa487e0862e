"""`mx bench gpu` on the stand-in: every part of it runs, and no figure of it comes out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.cuda.stand_in import ROOT, StandIn

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
    assert document["left_out"]["safetensors"] == "this torch has no CUDA device"
    assert list(tmp_path.iterdir()) == []


def test_without_a_driver_it_says_so(tmp_path: Path) -> None:
    code = """
import mxcore.cuda_driver as driver
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
