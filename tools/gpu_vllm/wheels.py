"""Wheels for another Python than ours, from the package index, and what their METADATA says that they want."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTHON = "3.12"
GLIBC_MINOR = 39  # of the machine's 2.39; pip takes each only by its name
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC_MINOR, 4, -1)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
MARKERS = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.3", "extra": ""}


class KitError(Exception):
    """The kit cannot be made; the message says why."""


def download(folder: Path, *wanted: str) -> list[Path]:
    """Wheels of requirements (`name==version`, or `-r`, `file`) for the GPU machine. Raises KitError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    ran = subprocess.run([*command, "--dest", str(folder), *wanted], capture_output=True, text=True)
    if ran.returncode:
        raise KitError(f"no wheels for Python {PYTHON} of {' '.join(wanted)}: {ran.stderr[-1500:]}")
    return sorted(folder.glob("*.whl"))


def requirements(wheel: Path) -> list[Requirement]:
    """What a wheel wants on the GPU machine, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    wanted = [Requirement(line) for line in lines]
    return [one for one in wanted if one.marker is None or one.marker.evaluate(MARKERS)]


def missing(wheels: Sequence[Path], there: set[str]) -> dict[str, str]:
    """Requirements that neither these wheels nor the machine's packages meet → who wants them."""
    carried = {canonicalize_name(wheel.name.split("-")[0]) for wheel in wheels}
    names = carried | {canonicalize_name(name) for name in there}
    return {
        canonicalize_name(one.name): wheel.name
        for wheel in wheels
        for one in requirements(wheel)
        if canonicalize_name(one.name) not in names
    }
