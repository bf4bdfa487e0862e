"""Other loaders to a CUDA device, each in a process of its own: python -m mxbench.gpu.peers NAME DEVICE ROUNDS FILE...

Prints the seconds of its fastest round. Each loads once before, which pays for imports, contexts and pinned memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

NEEDS = {
    "safetensors": "safetensors",
    "safetensors_prefetch": "safetensors",  # from 0.9 on
    "runai": "runai_model_streamer",
    "fastsafetensors": "fastsafetensors",
    "instanttensor": "instanttensor",
}
TIMEOUT_SECONDS = 300


def missing() -> dict[str, str]:
    """Peers that cannot run here, and why; all of them without a torch that has CUDA."""
    if importlib.util.find_spec("torch") is None:
        return dict.fromkeys(NEEDS, "torch is not installed")
    probe = [sys.executable, "-c", "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 3)"]
    if subprocess.run(probe, capture_output=True, timeout=TIMEOUT_SECONDS).returncode:
        return dict.fromkeys(NEEDS, "this torch has no CUDA device")
    left_out = {
        name: f"{module} is not installed" for name, module in NEEDS.items() if not importlib.util.find_spec(module)
    }
    if "safetensors" not in left_out and (version := _without_prefetch()):
        left_out["safetensors_prefetch"] = f"safetensors {version} has no safe_open(...).prefetch: 0.9 has"
    return left_out


def _without_prefetch() -> str:
    """The version of a safetensors that has no prefetch; empty for one that has."""
    import safetensors

    return "" if hasattr(safetensors.safe_open, "prefetch") else str(safetensors.__version__)


def seconds(name: str, device: int, rounds: int, files: list[Path]) -> float:
    """Of its fastest round. Raises ValueError with the last line that it said."""
    command = [sys.executable, "-m", "mxbench.gpu.peers", name, str(device), str(rounds), *map(str, files)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{name}: no end within {TIMEOUT_SECONDS} s") from None
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or [f"it ended with {ran.returncode}"]
        raise ValueError(f"{name}: {said[-1]}")
    return float(ran.stdout.split()[-1])


def _safetensors(files: list[str], device: int) -> object:
    from safetensors.torch import load_file

    return [load_file(file, device=f"cuda:{device}") for file in files]


def _safetensors_prefetch(files: list[str], device: int) -> object:
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        loaders = [stack.enter_context(one.prefetch(device=f"cuda:{device}")) for one in opened]  # all run at once
        return [tensor for loader in loaders for _, tensor in loader]


def _runai(files: list[str], device: int) -> object:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files)
        return [tensor.to(f"cuda:{device}") for _, tensor in streamer.get_tensors()]


def _fastsafetensors(files: list[str], device: int) -> object:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), f"cuda:{device}", nogds=True)
    loader.add_filenames({0: files})
    buffers = loader.copy_files_to_device()
    kept = [buffers.get_tensor(name).clone() for name in loader.get_keys()]
    buffers.close()
    loader.close()
    return kept


def _instanttensor(files: list[str], device: int) -> object:
    from instanttensor import safe_open

    with safe_open(files, framework="pt", device=device, process_group=None, copy=True) as opened:
        return [tensor for _, tensor in opened.tensors()]


_LOADERS: dict[str, Callable[[list[str], int], object]] = {
    "safetensors": _safetensors,
    "safetensors_prefetch": _safetensors_prefetch,
    "runai": _runai,
    "fastsafetensors": _fastsafetensors,
    "instanttensor": _instanttensor,
}


def main() -> None:
    """One peer."""
    import torch

    name, device, rounds, files = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    taken = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        kept = _LOADERS[name](files, device)
        torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
        del kept
        torch.cuda.empty_cache()
    print(min(taken[1:]))


if __name__ == "__main__":
    main()
