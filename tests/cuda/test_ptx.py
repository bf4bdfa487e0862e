"""The shipped PTX is what the sources make, and assembles for every architecture."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.cuda.stand_in import ROOT


def test_the_ptx_is_made_of_the_sources() -> None:
    if not (shutil.which("nvcc") and shutil.which("ptxas")):
        pytest.skip("no nvcc on this machine: the shipped PTX is compared with its sources where there is one")
    ran = subprocess.run(
        [sys.executable, "tools/make_ptx.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 bytes spilled" in ran.stdout
