"""Debian packages that make the machine: found by apt, downloaded and extracted beside the build, never installed.

What the system has installed already is used where it lies; only the rest is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tools.soft_rdma.errors import SoftRdmaError

__all__ = ["extracted_packages", "kernel_packages", "packages_to_install"]

PROGRAMS = ("qemu-system-x86", "busybox-static", "kmod", "iproute2", "util-linux", "ibverbs-providers")
KERNELS = ("linux-image-amd64", "linux-image-generic")  # Debian's, Ubuntu's
_DOWNLOAD_SECONDS = 600


def packages_to_install(simulation: str) -> list[str]:
    """The names in what `apt-get --simulate install` prints."""
    return re.findall(r"^Inst (\S+)", simulation, re.MULTILINE)


def kernel_packages(dependencies: str) -> list[str]:
    """The versioned kernel in what `apt-cache depends` prints of a meta package, and where its modules may be apart."""
    found = re.search(r"Depends: (linux-image-(\d\S*))", dependencies)
    if found is None:
        return []
    return [found[1], f"linux-modules-{found[2]}", f"linux-modules-extra-{found[2]}"]


def extracted_packages(folder: Path) -> Path:
    """The root under which everything lies, downloaded unless `folder` has it from an earlier run.

    Raises SoftRdmaError: no apt, no package lists, no network.
    """
    root = folder / "root"
    complete = folder / "complete"  # written last: a download that was cut short begins anew
    if complete.exists():
        return root
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise SoftRdmaError(f"no {program}: the machine is made of Debian's or Ubuntu's packages; run it there")
    for old in (root, folder / "packages"):
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir(parents=True)
    names = _names()
    print(f"downloading {len(names)} packages ({names[-1]} and others) into {folder}", flush=True)
    _apt(["apt-get", "download", *names], cwd=folder / "packages")
    for package in sorted((folder / "packages").glob("*.deb")):
        _apt(["dpkg", "-x", str(package), str(root)])
    shutil.rmtree(folder / "packages")
    complete.touch()
    return root


def _names() -> list[str]:
    try:
        simulation = _simulated()
    except SoftRdmaError:
        if os.geteuid() != 0:
            raise
        _apt(["apt-get", "update", "-qq"])  # a fresh container has no lists
        simulation = _simulated()
    for meta in KERNELS:
        shown = subprocess.run(["apt-cache", "depends", meta], capture_output=True, text=True, check=False)
        if named := kernel_packages(shown.stdout):
            return [*packages_to_install(simulation), *_known(named[1:]), named[0]]
    raise SoftRdmaError(f"apt knows none of {', '.join(KERNELS)}: only amd64 is supported")


def _simulated() -> str:
    return _apt(["apt-get", "--simulate", "install", "--no-install-recommends", *PROGRAMS])


def _known(names: Iterable[str]) -> list[str]:
    """Those that apt knows."""
    shown = {name: subprocess.run(["apt-cache", "show", name], capture_output=True, check=False) for name in names}
    return [name for name, result in shown.items() if result.returncode == 0 and result.stdout]


def _apt(command: list[str], cwd: Path | None = None) -> str:
    ran = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=_DOWNLOAD_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    if ran.returncode != 0:
        said = (ran.stderr.strip() or ran.stdout.strip() or str(ran.returncode)).splitlines()
        do = f"run `apt-get update`, or install {' '.join(PROGRAMS)} where no mirror is reachable"
        raise SoftRdmaError(
            f"`{' '.join(command[:3])} ...` failed: {said[-1]}. It needs package lists and mirror: {do}"
        )
    return ran.stdout
