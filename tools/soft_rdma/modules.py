"""Which kernel modules are loaded, in which order: by depmod's modules.dep."""

from __future__ import annotations

import lzma
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from tools.soft_rdma.errors import SoftRdmaError

__all__ = ["dependencies", "load_order", "module_bytes", "module_name"]

WANTED = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "veth", "rdma_rxe", "ib_uverbs", "sch_netem")
WHERE_APART = ("crc32_generic",)  # rdma_rxe asks the crypto API for crc32; newer kernels have it built in


def module_name(path: str) -> str:
    """`kernel/a/rdma-rxe.ko.xz` is the module rdma_rxe."""
    return Path(path).name.partition(".ko")[0].replace("-", "_")


def dependencies(text: str) -> dict[str, list[str]]:
    """The lines of modules.dep: a module's path to the paths that it needs, in depmod's order."""
    lines = (line.partition(":") for line in text.splitlines() if line.strip())
    return {path.strip(): needed.split() for path, _, needed in lines}


def load_order(needs: Mapping[str, list[str]], builtin: Iterable[str]) -> list[str]:
    """Paths of all that is wanted, each after what it needs. Raises SoftRdmaError for one that the kernel lacks."""
    paths = {module_name(path): path for path in needs}
    inside = {module_name(path) for path in builtin}
    order: dict[str, None] = {}

    def add(path: str) -> None:
        if path in order:
            return
        for needed in needs[path]:
            add(needed)
        order[path] = None

    for name in (*WANTED, *WHERE_APART):
        if name in paths:
            add(paths[name])
        elif name not in inside and name in WANTED:
            raise SoftRdmaError(f"this kernel has no module {name}; Debian's linux-image-amd64 has it")
    return list(order)


def module_bytes(path: Path) -> bytes:
    """The module as insmod takes it: not compressed."""
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        if shutil.which("zstd") is None:
            raise SoftRdmaError(f"{path.name} is compressed with zstd: install zstd")
        return subprocess.run(["zstd", "-dc", str(path)], capture_output=True, check=True).stdout
    return path.read_bytes()
