"""Packages beside the environment, for tests that need other versions; installed once and kept in the environment."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path(sys.prefix) / "test-installs"


def installed(name: str, *packages: str, dependencies: bool = True) -> Path:
    """A folder for PYTHONPATH that holds these packages; made by the first test that asks for it."""
    folder = CACHE / name
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = CACHE / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--disable-pip-version-check",
                "--target",
                unfinished,
            ]
            if not dependencies:
                command.append("--no-deps")
            subprocess.run([*command, *packages], check=True)
            unfinished.rename(folder)
    return folder
