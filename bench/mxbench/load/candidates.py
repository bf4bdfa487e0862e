"""The ways to load that are compared: each ends with every tensor in memory that exists already.

A candidate is a function of (files, destinations by name). It runs in a process of its own, after one small load that
pays for imports and threads.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

Destinations = Mapping[str, torch.Tensor]
READ_BYTES = 8 * 1024 * 1024


class Candidate(NamedTuple):
    run: Callable[[list[Path], Destinations], None]
    environment: Mapping[str, str] = {}
    states: tuple[str, ...] = ("warm", "cold")
    checked: bool = True  # False: a limit of the machine, which leaves no tensors


def ours(mode: str) -> Callable[[list[Path], Destinations], None]:
    def run(files: list[Path], destinations: Destinations) -> None:
        from mxcore.storage.checkpoint import open_checkpoint
        from mxcore.storage.load import load

        load(open_checkpoint(files), destinations, mode=mode)

    return run


def safetensors(backend: str) -> Callable[[list[Path], Destinations], None]:
    def run(files: list[Path], destinations: Destinations) -> None:
        from safetensors import safe_open

        for file in files:
            with safe_open(file, "pt", backend=backend) as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    destinations[name].copy_(opened.get_tensor(name))

    return run


def runai(files: list[Path], destinations: Destinations) -> None:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in files])
        for name, tensor in streamer.get_tensors():
            destinations[name].copy_(tensor)


def fastsafetensors(files: list[Path], destinations: Destinations) -> None:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    try:
        loader.add_filenames({0: [str(file) for file in files]})
        buffers = loader.copy_files_to_device()
        for name in loader.get_keys():
            destinations[name].copy_(buffers.get_tensor(name))
        buffers.close()
    finally:
        loader.close()


def readinto(files: list[Path], destinations: Destinations) -> None:
    for file in files:
        with file.open("rb", buffering=0) as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                opened.seek(8 + length + entry["data_offsets"][0])
                view = memoryview(destinations[name].reshape(-1).view(torch.uint8).numpy())
                while view:
                    view = view[opened.readinto(view) :]


def memcpy(files: list[Path], destinations: Destinations) -> None:
    """Copies as many bytes within memory, from one buffer of 256 MiB, by torch's threads."""
    source = _memcpy_source()
    for tensor in destinations.values():
        flat = tensor.reshape(-1).view(torch.uint8)
        for begin in range(0, flat.numel(), source.numel()):
            part = flat[begin : begin + source.numel()]
            part.copy_(source[: part.numel()])


_source: list[torch.Tensor] = []


def _memcpy_source() -> torch.Tensor:
    if not _source:
        _source.append(torch.ones(256 * 1024 * 1024, dtype=torch.uint8))
    return _source[0]


def disk_limit(depth: int) -> Callable[[list[Path], Destinations], None]:
    """The disk's rate past the page cache: this many reads of 8 MiB in flight, into reused memory (huge pages,
    touched by the small load before). No parsing, no copies."""

    def run(files: list[Path], destinations: Destinations) -> None:
        buffers = _limit_buffers(depth)
        descriptors = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
        try:
            sizes = [file.stat().st_size for file in files]
            jobs = iter([(place, at) for place, size in enumerate(sizes) for at in range(0, size, READ_BYTES)])

            def read(buffer: memoryview) -> int:
                total = 0
                for file, offset in jobs:  # a list's iterator: each job goes to one thread
                    total += os.preadv(descriptors[file], [buffer], offset)
                return total

            with ThreadPoolExecutor(depth) as pool:
                if sum(pool.map(read, buffers)) != sum(sizes):
                    raise ValueError("the disk gave fewer bytes than the files have")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    return run


_buffers: list[memoryview] = []


def _limit_buffers(count: int) -> list[memoryview]:
    while len(_buffers) < count:
        memory = mmap.mmap(-1, READ_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared is never huge
        memory.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(memory)
        view[::4096] = bytes(len(view[::4096]))
        _buffers.append(view)
    return _buffers[:count]


BEST_RUNAI = {"RUNAI_STREAMER_FS_STRATEGY": "sync_buffered", "RUNAI_STREAMER_CONCURRENCY": "2"}

CANDIDATES: dict[str, Candidate] = {
    "ours": Candidate(ours("auto")),
    "ours_mapped": Candidate(ours("mapped"), states=("warm",)),
    "ours_buffered": Candidate(ours("buffered")),
    "ours_direct": Candidate(ours("direct"), states=("cold",)),
    "ours_uring": Candidate(ours("uring"), states=("cold",)),
    "safetensors_mmap": Candidate(safetensors("mmap")),
    "safetensors_pread": Candidate(safetensors("pread")),
    "runai": Candidate(runai),
    "runai_best": Candidate(runai, BEST_RUNAI),
    "fastsafetensors": Candidate(fastsafetensors),
    "readinto": Candidate(readinto),
    "memcpy": Candidate(memcpy, states=("warm",), checked=False),
    "disk_limit": Candidate(disk_limit(4), states=("cold",), checked=False),
    "disk_limit_deep": Candidate(disk_limit(8), states=("cold",), checked=False),
}

NEEDS = {"runai": "runai_model_streamer", "runai_best": "runai_model_streamer", "fastsafetensors": "fastsafetensors"}
