"""The cost of registering a model's memory: by merged regions, and tensor by tensor."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from mxbench.transfer.shapes import GAP_BYTES
from mxcore.nixl import NixlAgent
from mxcore.transfer.layout import Placement, merge_regions
from mxcore.transfer.route import ucx_settings

_ROUNDS = 5


@dataclass(frozen=True)
class Registration:
    """Seconds, and bytes of the agent's metadata: merged first, then one by one."""

    merged_seconds: float
    single_seconds: float
    merged_metadata_bytes: int
    single_metadata_bytes: int


def measure(tensors: int, tensor_bytes: int) -> Registration:
    """Both ways with the same memory: tensors side by side with a small gap, as an allocator places them."""
    step = tensor_bytes + GAP_BYTES
    memory = np.ones(tensors * step, np.uint8)
    first = int(memory.ctypes.data)
    placement = Placement(tuple(first + step * i for i in range(tensors)), (0,) * tensors, "cpu")

    def merged(agent: NixlAgent) -> None:
        for regions in merge_regions(placement, [tensor_bytes] * tensors):
            agent.register(regions.addresses, regions.lengths)

    def single(agent: NixlAgent) -> None:
        for address in placement.addresses:
            agent.register(array("Q", [address]), array("Q", [tensor_bytes]))

    merged_seconds, merged_bytes = _timed(merged)
    single_seconds, single_bytes = _timed(single)
    return Registration(merged_seconds, single_seconds, merged_bytes, single_bytes)


def _timed(register: Callable[[NixlAgent], None]) -> tuple[float, int]:
    """The median of some, each with an agent of its own."""
    seconds, metadata_bytes = [], 0
    for _ in range(_ROUNDS):
        with ucx_settings("tcp,self") as told:
            agent = NixlAgent("mx-bench-registration", backend_params=told)
        started = time.perf_counter()
        register(agent)
        seconds.append(time.perf_counter() - started)
        metadata_bytes = len(agent.metadata())
        agent.destroy()
    return median(seconds), metadata_bytes
