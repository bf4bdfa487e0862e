"""What the steps run on: a GPU with the kit's vLLM, or this machine with vLLM's CPU build and counterparts."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLE_MS = 100
MIB = 1 << 20
QUERY = ("nvidia-smi", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Machine:
    """`stand_in` is the tests' driver, for benches where there is no GPU; `peers` a folder of packages for them."""

    gpu: bool
    stand_in: Path | None = None
    peers: Path | None = None

    @property
    def transport(self) -> str:
        """How weights come from a worker of the same machine."""
        return "cuda-ipc" if self.gpu else "same-host"

    @property
    def counterparts(self) -> list[str]:
        """What stands for something else here; empty on a GPU."""
        if self.gpu:
            return []
        return [
            "vLLM's CPU build, its linear layers not packed, instead of a CUDA platform without kernels",
            "host memory and same-host READs instead of device memory and cuda_ipc",
            "files read into host memory instead of through the pinned ring",
            "peak of the host's memory instead of the device's",
            "the tests' CUDA driver without a GPU for the benches",
        ]

    def facts(self) -> dict[str, Any]:
        """Versions, and the device by nvidia-smi."""
        names = ("torch", "triton", "transformers", "tokenizers", "vllm", "nixl-cu13", "nixl-cu12")
        found: dict[str, Any] = {"python": platform.python_version(), "kernel": platform.release()}
        for name in names:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = None
        if self.gpu:
            query = [*QUERY, "--query-gpu=name,driver_version,memory.total"]
            found["device"] = subprocess.run(
                query, capture_output=True, text=True, timeout=60, check=True
            ).stdout.strip()
        return found

    @contextmanager
    def watched(self) -> Iterator[DeviceMemory]:
        """What of the device is in use meanwhile, by all processes."""
        memory = DeviceMemory()
        if not self.gpu:
            yield memory
            return
        command = [*QUERY, "--query-gpu=memory.used", f"--loop-ms={SAMPLE_MS}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sampler:
            reader = threading.Thread(target=memory.read, args=(sampler.stdout,), daemon=True)
            reader.start()
            try:
                yield memory
            finally:
                sampler.terminate()
        reader.join()


@dataclass
class DeviceMemory:
    """Bytes in use on the device, of all its processes, as nvidia-smi counts them."""

    samples: list[int] = field(default_factory=list)

    def read(self, lines: Any) -> None:
        """Until its end."""
        for line in lines:
            if line.strip().isdigit():
                self.samples.append(int(line) * MIB)

    def found(self) -> dict[str, int]:
        """At the beginning and at most; empty without a GPU."""
        return {"used_before": self.samples[0], "used_at_most": max(self.samples)} if self.samples else {}
