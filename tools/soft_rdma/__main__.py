"""Builds the machine, runs pytest in it, exits with pytest's status.

    python -m tools.soft_rdma [--limit-seconds 1800] [--memory-mib 6144] [pytest arguments]

pytest runs what is marked `rdma`, in the folders that have such tests unless its arguments name others: `-k cut` runs
those with this name.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tools.soft_rdma import initramfs, modules
from tools.soft_rdma.errors import SoftRdmaError
from tools.soft_rdma.job import job_script, library_folders, verbs_environment
from tools.soft_rdma.machine import qemu_arguments, run_machine, status_of
from tools.soft_rdma.packages import extracted_packages

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
CACHE = CHECKOUT / "build" / "soft_rdma"
# A later -m wins, and so do paths over testpaths. A test takes minutes where others use the processors too.
PYTEST_ARGUMENTS = ("-m", "rdma", "-o", "testpaths=tests/rdma tests/transfer", "-o", "timeout=900")


def kernel_and_initramfs(root: Path, job: str) -> tuple[Path, Path]:
    """The kernel of the extracted packages, and an archive of its modules, our init and `job`."""
    folder = next((path.parent for path in sorted(root.rglob("modules.order"))), None)
    if folder is None:
        raise SoftRdmaError(f"no kernel under {root}: remove {CACHE} and run again")
    if not (folder / "modules.dep").exists():
        _depmod(root, folder.name)
    builtin = (folder / "modules.builtin").read_text().split()
    order = modules.load_order(modules.dependencies((folder / "modules.dep").read_text()), builtin)
    files = initramfs.first_files(
        program(root, "busybox").read_bytes(),
        (HERE / "init.sh").read_bytes(),
        job.encode(),
        [(path.partition(".ko")[0] + ".ko", modules.module_bytes(folder / path)) for path in order],
    )
    archive = CACHE / "initramfs.cpio"
    archive.write_bytes(initramfs.archive(files))
    return root / "boot" / f"vmlinuz-{folder.name}", archive


def _depmod(root: Path, version: str) -> None:
    """Writes modules.dep, which an installed kernel package would have made."""
    kmod = program(root, "kmod")  # depmod by another name, which it goes by
    environment = own_environment(root) if kmod.is_relative_to(root) else None
    command = ["depmod", "-b", str(root), version]
    ran = subprocess.run(command, executable=kmod, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise SoftRdmaError(f"depmod for {version} failed: {ran.stderr.strip()}")


def own_environment(root: Path) -> dict[str, str]:
    """For programs out of the extracted packages: with their libraries."""
    return {**os.environ, "LD_LIBRARY_PATH": library_folders(root)}


def program(root: Path, name: str) -> Path:
    """An executable of the extracted packages, or else of the system. Raises SoftRdmaError."""
    for folder in ("usr/bin", "bin", "usr/sbin", "sbin"):
        if (root / folder / name).is_file():
            return root / folder / name
    if (found := shutil.which(name)) is None:
        raise SoftRdmaError(f"no {name}, neither installed nor among the packages: remove {CACHE} and run again")
    return Path(found)


def run(pytest_arguments: list[str], *, limit_seconds: float, memory_mib: int) -> int:
    """One boot; pytest's exit status. Raises SoftRdmaError."""
    if platform.machine() != "x86_64":
        raise SoftRdmaError(f"only x86_64 is supported, this is {platform.machine()}")
    CACHE.mkdir(parents=True, exist_ok=True)
    root = extracted_packages(CACHE)
    network = (HERE / "network.sh").read_text()
    verbs = verbs_environment(root, CACHE)
    job = job_script(CHECKOUT, Path(sys.executable), root, network, verbs, pytest_arguments)
    kernel, archive = kernel_and_initramfs(root, job)
    status = CACHE / "status"
    status.unlink(missing_ok=True)
    qemu = program(root, "qemu-system-x86_64")
    own = qemu.is_relative_to(root)
    firmware = [root / "usr/share/qemu", root / "usr/share/seabios", root / "usr/lib/ipxe/qemu"] if own else []
    arguments = qemu_arguments(kernel, archive, status, memory_mib=memory_mib, firmware=firmware)
    began = time.monotonic()
    environment = own_environment(root) if own else dict(os.environ)
    run_machine([str(qemu), *arguments], environment, CACHE / "console.log", limit_seconds)
    code = status_of(status)
    print(f"soft-rdma: pytest ended with {code}; the machine ran for {time.monotonic() - began:.0f} s")
    return code


def main() -> int:
    """Usage as above; 3 when the machine itself cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m tools.soft_rdma", description=__doc__)
    parser.add_argument("--limit-seconds", type=float, default=1800.0)
    parser.add_argument("--memory-mib", type=int, default=6144)
    chosen, rest = parser.parse_known_args()
    try:
        tests = [*PYTEST_ARGUMENTS, *rest]
        return run(tests, limit_seconds=chosen.limit_seconds, memory_mib=chosen.memory_mib)
    except SoftRdmaError as error:
        print(f"soft-rdma: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
