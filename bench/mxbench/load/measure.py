"""One load in a process of its own: seconds, memory beyond the destinations, and whether the content is right."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import re
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from mxbench.load import made


class Measured(NamedTuple):
    seconds: float
    extra_bytes: int  # the peak of resident memory during the load, less what was resident before
    cpu_seconds: float


def measure(name: str, state: str, files: list[Path], small: list[Path], digests: dict[str, int]) -> Measured:
    """Runs a candidate once, in a fresh process; raises RuntimeError with its output if it failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors.torch", "mxbench.load.candidates"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, name, state, files, small, digests))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = "the process ended without a word"
    process.join()
    if not isinstance(answer, Measured):
        raise RuntimeError(f"{name} ({state}): {answer}")
    return answer


def _run(
    pipe: Connection, name: str, state: str, files: list[Path], small: list[Path], digests: dict[str, int]
) -> None:
    import torch

    from mxbench.load.candidates import CANDIDATES

    candidate = CANDIDATES[name]
    os.environ.update(candidate.environment)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        candidate.run(small, _destinations(small))
        destinations = _destinations(files)
        if state == "cold":
            drop(files)
        else:
            warm(files)
        gc.collect()  # what came before is no candidate's: the first to make some objects would pay for it (0.08 s)
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
        cpu, started = time.process_time(), time.perf_counter()
        candidate.run(files, destinations)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        extra_bytes = _memory("VmHWM") - before
        if candidate.checked:
            _check(destinations, digests)
        pipe.send(Measured(seconds, max(0, extra_bytes), cpu))
    except Exception as error:  # noqa: BLE001 - the parent raises it
        pipe.send(f"{type(error).__name__}: {error}")


def _destinations(files: list[Path]) -> dict[str, object]:
    import torch

    from mxcore.storage.checkpoint import open_checkpoint

    infos = open_checkpoint(files).tensors.values()
    tensors: dict[str, object] = {info.name: torch.zeros(info.shape, dtype=torch.bfloat16) for info in infos}
    for tensor in tensors.values():
        tensor.fill_(1)  # type: ignore[attr-defined]  # zeros() may leave pages untouched
    return tensors


def _check(destinations: dict[str, object], digests: dict[str, int]) -> None:
    import torch

    from mxcore.digest import xxh3_64

    wrong = [
        name
        for name, tensor in destinations.items()
        if isinstance(tensor, torch.Tensor) and xxh3_64(tensor.view(torch.uint8).numpy()) != digests[name]
    ]
    if wrong or set(destinations) != set(digests):
        raise ValueError(f"{len(wrong)} tensors are wrong, {wrong[:3]}")


def _memory(what: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{what}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def drop(files: list[Path]) -> None:
    """Takes the files out of the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        with contextlib.closing(_Descriptor(descriptor)):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class _Descriptor:
    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        os.close(self.number)


def warm(files: list[Path]) -> None:
    """Reads the files into the page cache; files that are already there are not read again."""
    buffer = bytearray(made.ROWS * 1024)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def header_us(count: int, rounds: int) -> float:
    """Microseconds a tensor for parsing and validating a header of that many, the best of the rounds."""
    from mxcore.safetensors import parse_header

    data = made.header_of(count)
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        header = parse_header(data, len(data) + 256 * count)
        best = min(best, time.perf_counter() - started)
        assert len(header) == count
        del header
    return best / count * 1e6


def trim() -> None:
    """Gives this process' freed memory back to the machine, so that candidates can use it."""
    ctypes.CDLL(None).malloc_trim(0)
