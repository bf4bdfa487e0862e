"""Writes deploy/images/*-requirements.txt: exact versions with the hashes of x86-64's and aarch64's wheels.

    python tools/lock_images.py

pip resolves what pyproject.toml asks for, once for each platform, for the Python of the images. tests/deploy holds that
every dependency of ours is locked within its bounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "images"
PYTHON = "3.11"
MACHINES = ("x86_64", "aarch64")


def wanted() -> dict[str, list[str]]:
    """File -> what has to be in it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needs, extras = project["project"]["dependencies"], project["project"]["optional-dependencies"]
    stores = [one for one in extras["s3"] if one.startswith("obstore")]
    return {
        "build-requirements.txt": [*project["build-system"]["requires"], "wheel"],
        "server-requirements.txt": [*needs, *extras["redis"], *extras["otel"], *stores],
        "worker-requirements.txt": [*needs, *stores],
    }


def resolved(requirements: list[str], machine: str) -> dict[str, tuple[str, str]]:
    """Name -> version and hash of what pip would install there."""
    platforms = [f"--platform=manylinux{tag}_{machine}" for tag in ("_2_34", "_2_28", "_2_17", "2014")]
    with tempfile.TemporaryDirectory() as target:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report=-"]
        command += [f"--target={target}", "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
        command += ["--abi=cp311", "--abi=abi3", "--abi=none", *platforms, *requirements]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        one["metadata"]["name"].lower().replace("_", "-"): (
            one["metadata"]["version"],
            one["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for one in report["install"]
    }


def locked(requirements: list[str]) -> str:
    """The text of a file."""
    versions: dict[str, str] = {}
    hashes: dict[str, set[str]] = {}
    for machine in MACHINES:
        for name, (version, digest) in resolved(requirements, machine).items():
            if versions.setdefault(name, version) != version:
                raise SystemExit(f"{name}: {versions[name]} and {version} on {machine}")
            hashes.setdefault(name, set()).add(digest)
    entries = [
        " \\\n".join([f"{name}=={versions[name]}", *(f"    --hash=sha256:{digest}" for digest in sorted(hashes[name]))])
        for name in sorted(versions)
    ]
    return "# Made by tools/lock_images.py: change pyproject.toml.\n" + "\n".join(entries) + "\n"


if __name__ == "__main__":
    for file, requirements in wanted().items():
        (FOLDER / file).write_text(locked(requirements))
