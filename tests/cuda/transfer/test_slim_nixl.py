"""The smaller wheel of NIXL that is carried to a machine with a GPU."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cuda.stand_in import ROOT
from tools.slim_nixl import is_kept, slim

KEPT = [
    ".nixl_cu13.mesonpy.libs/libnixl_capi.so",
    ".nixl_cu13.mesonpy.libs/plugins/libplugin_UCX.so",
    "nixl_cu13.libs/ucx/libuct_cuda.so.0.0.0",
    "nixl_cu13/__init__.py",
    "nixl_cu13-1.5.1.dist-info/METADATA",
]
GONE = [
    ".nixl_cu13.mesonpy.libs/plugins/libplugin_OBJ.so",
    "nixl_ep_cu13/nixl_ep.so",
    "nixl_cu13/_bindings.cpython-312-x86_64-linux-gnu.so",
]


def wheel(folder: Path) -> Path:
    made = folder / "nixl_cu13-1.5.1-cp312-cp312-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for name in (*KEPT, *GONE):
            archive.writestr(name, f"what {name} holds")
        record = "".join(f"{name},sha256=x,9\n" for name in (*KEPT, *GONE))
        archive.writestr("nixl_cu13-1.5.1.dist-info/RECORD", record + "nixl_cu13-1.5.1.dist-info/RECORD,,\n")
    return made


def test_what_workers_use_stays(tmp_path: Path) -> None:
    source = wheel(tmp_path)
    made = slim(source, tmp_path / "slim")
    assert made.name == source.name
    with zipfile.ZipFile(made) as archive:
        assert sorted(archive.namelist()) == sorted([*KEPT, "nixl_cu13-1.5.1.dist-info/RECORD"])
        assert archive.read(KEPT[0]).decode() == f"what {KEPT[0]} holds"
        listed = archive.read("nixl_cu13-1.5.1.dist-info/RECORD").decode().splitlines()
    assert [row.split(",")[0] for row in listed] == [*KEPT, "nixl_cu13-1.5.1.dist-info/RECORD"]
    assert all(is_kept(name) for name in KEPT)
    assert not any(is_kept(name) for name in GONE)


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"numpy-2\.whl is no wheel of nixl"):
        slim(tmp_path / "numpy-2.whl", tmp_path)


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    command = [sys.executable, "tools/slim_nixl.py", str(wheel(tmp_path)), str(tmp_path / "slim")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.rstrip().endswith("0.0 MiB")
