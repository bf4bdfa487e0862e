"""`mx bench load` on a small checkpoint: every figure is there, and every candidate's content was checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

NAMES = (
    "ours",
    "ours_mapped",
    "ours_uring",
    "safetensors_mmap",
    "safetensors_pread",
    "readinto",
    "memcpy",
    "disk_limit",
)


def test_the_figures_and_the_chart(tmp_path: Path) -> None:
    only = [word for name in NAMES for word in ("--only", name)]
    code = "from mxcore.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "bench",
        "load",
        "--size-mib",
        "16",
        "--rounds",
        "1",
        "--json",
        *only,
        "--odd-tensors",
        "100",
    ]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path), "--chart", str(tmp_path / "bars.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(done.stdout)
    wanted = {
        "warm_vs_safetensors_mmap",
        "warm_vs_safetensors_pread",
        "cold_vs_disk_limit",
        "cold_vs_best",
        "warm_auto_vs_best_forced",
        "cold_auto_vs_best_forced",
        "auto_vs_best_forced",
        "extra_memory_bytes",
        "header_us_per_tensor",
        "odd_warm_us_per_tensor",
        "odd_warm_vs_safetensors_pread",
        "odd_cold_vs_readinto",
    }
    assert wanted <= set(document["figures"])
    assert all(isinstance(value, int | float) for value in document["figures"].values())
    assert set(document["seconds"]["warm"]) == set(NAMES) - {"disk_limit", "ours_uring"}
    assert set(document["seconds"]["cold"]) == set(NAMES) - {"memcpy", "ours_mapped"}
    with Image.open(tmp_path / "bars.png") as chart:
        assert chart.size[0] == 960
        assert {(0x25, 0x63, 0xEB), (0x94, 0xA3, 0xB8)} <= set(
            chart.convert("RGB").get_flattened_data()
        )  # ours, and others
    assert list(tmp_path.iterdir()) == [tmp_path / "bars.png"]


def test_an_unknown_candidate_is_a_usage_error() -> None:
    code = "from mxcore.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", "load", "--only", "magic"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no candidate magic" in done.stderr
