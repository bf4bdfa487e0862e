"""The parts of the bench, each in a process of its own; one that fails, crashes or hangs costs its own figures.

python -m mxbench.gpu.sections NAME DEVICE BYTES ROUNDS FOLDER [STAND-IN]   prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mxbench.gpu import measure, nixl_pair
from mxcore.cuda import Context, DeviceBuffer, DeviceDigest, context_of
from mxcore.cuda import driver as cuda_driver
from mxcore.reading import cufile
from mxcore.storage.checkpoint import Checkpoint, open_checkpoint
from mxcore.storage.load import release_rings

TIMEOUT_SECONDS = 240
Found = dict[str, float]


class Task(NamedTuple):
    """What a part is told."""

    device: int
    size_bytes: int
    rounds: int
    folder: Path
    stand_in: str | None

    @property
    def context(self) -> Context:
        """The device's."""
        return context_of(self.device)

    @property
    def checkpoint(self) -> Checkpoint:
        """The bench's, by its headers."""
        return open_checkpoint(sorted(self.folder.iterdir()))


def _copies(task: Task) -> Found:
    target = DeviceBuffer(task.context, task.size_bytes)
    try:
        return {
            "pinned": measure.pinned_copy(task.context, target, task.rounds),
            "device": measure.device_copy(task.context, target, task.rounds),
        }
    finally:
        target.close()


def _load(task: Task) -> Found:
    checkpoint = task.checkpoint
    target = DeviceBuffer(task.context, measure.arena_rows(checkpoint, 0)[2])
    digester = DeviceDigest(task.context)
    try:
        loaded = measure.load(checkpoint, target, task.rounds)
        measure.check(checkpoint, digester, target)
        return {**loaded, "bytes": float(sum(info.size_bytes for info in checkpoint.tensors.values()))}
    finally:
        digester.close()
        target.close()
        release_rings()


def _gpudirect(task: Task) -> Found:
    checkpoint = task.checkpoint
    target = DeviceBuffer(task.context, measure.arena_rows(checkpoint, 0)[2])
    digester = DeviceDigest(task.context)
    try:
        found = measure.gpudirect(checkpoint, target, task.rounds)
        measure.check(checkpoint, digester, target)
        return found
    finally:
        digester.close()
        target.close()
        release_rings()


def _digest(task: Task) -> Found:
    target = DeviceBuffer(task.context, task.size_bytes)
    digester = DeviceDigest(task.context)
    try:
        return {"bytes_per_second": measure.digest(digester, target, task.rounds)}
    finally:
        digester.close()
        target.close()


def _nixl(task: Task) -> Found:
    return {"bytes_per_second": nixl_pair.read(task.context, task.size_bytes // 2, task.rounds, task.stand_in)}


PARTS: dict[str, Callable[[Task], Found]] = {
    "copies": _copies,
    "load": _load,
    "digest": _digest,
    "nixl": _nixl,
    "gpudirect": _gpudirect,
}


def run(name: str, task: Task) -> Found:
    """One part's figures. Raises ValueError with its last words."""
    command = [sys.executable, "-m", "mxbench.gpu.sections", name, *map(str, task[:4])]
    command += [task.stand_in] if task.stand_in else []
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"no end within {TIMEOUT_SECONDS} s") from None
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or [f"its process ended with {ran.returncode}"]
        raise ValueError(said[-1])
    found: Found = json.loads(ran.stdout.splitlines()[-1])
    return found


def figures(found: dict[str, Found]) -> Found:
    """What those parts that came to an end give."""
    copies, load, digest, nixl, gpudirect = (found.get(name) for name in PARTS)
    made: Found = {}
    if copies:
        made |= {"pinned_copy_gbps": copies["pinned"] / 1e9, "device_copy_gbps": copies["device"] / 1e9}
    if load:
        made["tmpfs_gbps"] = load["bytes_per_second"] / 1e9
        made |= {name: load[name] for name in ("first_seconds", "ring_bytes", "extra_device_bytes", "extra_host_bytes")}
    if digest:
        made["digest_tb_per_second"] = digest["bytes_per_second"] / 1e12
    if nixl:
        made["nixl_gbps"] = nixl["bytes_per_second"] / 1e9
    if gpudirect:
        made["gpudirect_gbps"] = gpudirect["bytes_per_second"] / 1e9
        made["gpudirect_share"] = gpudirect["share"]
        made["gpudirect_vs_ring"] = gpudirect["bytes_per_second"] / gpudirect["ring"]
    if copies and load:
        made["tmpfs_vs_pinned_copy"] = load["bytes_per_second"] / copies["pinned"]
    if copies and nixl:
        made["nixl_vs_device_copy"] = nixl["bytes_per_second"] / copies["device"]
    return made


def main() -> None:
    """One part."""
    name, device, size_bytes, rounds, folder, *stand_in = sys.argv[1:]
    if stand_in:
        cuda_driver._load_stand_in(stand_in[0])
        cufile._load_stand_in(stand_in[0])
    task = Task(int(device), int(size_bytes), int(rounds), Path(folder), stand_in[0] if stand_in else None)
    print(json.dumps(PARTS[name](task)))


if __name__ == "__main__":
    main()
