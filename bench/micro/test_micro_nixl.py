"""Registration of a model's memory with NIXL: 2,000 tensors of 64 KiB with gaps, merged and one by one."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import pytest

from bench.micro.conftest import Measure
from mxcore.nixl import NixlAgent
from mxcore.transfer.layout import Placement, merge_regions
from mxcore.transfer.route import ucx_settings

TENSORS = 2_000
TENSOR_BYTES = 64 * 1024
GAP_BYTES = 512

pytestmark = pytest.mark.benchmark(group="registration of 2,000 tensors (128 MiB)")


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    step = TENSOR_BYTES + GAP_BYTES
    memory = np.ones(TENSORS * step, np.uint8)
    first = int(memory.ctypes.data)
    yield Placement(tuple(first + step * n for n in range(TENSORS)), (0,) * TENSORS, "cpu")
    del memory


@pytest.fixture
def agent() -> Iterator[NixlAgent]:
    with ucx_settings("tcp,self") as parameters:
        made = NixlAgent("mx-micro", backend_params=parameters)
    yield made
    made.destroy()


def test_merged(measure: Measure, agent: NixlAgent, placement: Placement) -> None:
    def register_all() -> None:
        registered = [
            agent.register(regions.addresses, regions.lengths)
            for regions in merge_regions(placement, [TENSOR_BYTES] * TENSORS)
        ]
        for registration in registered:
            agent.deregister(registration)

    measure(register_all, times=TENSORS)


def test_limit_one_region(measure: Measure, agent: NixlAgent, placement: Placement) -> None:
    """All of it as one stretch, which is as cheap as it can be."""
    first = placement.addresses[0]
    address, length = array("Q", [first]), array("Q", [placement.addresses[-1] + TENSOR_BYTES - first])
    measure(lambda: agent.deregister(agent.register(address, length)), times=TENSORS)


def test_one_by_one(measure: Measure, agent: NixlAgent, placement: Placement) -> None:
    """What it would cost without merging."""
    length = array("Q", [TENSOR_BYTES])
    arrays = [array("Q", [address]) for address in placement.addresses]

    def register_all() -> None:
        for registration in [agent.register(address, length) for address in arrays]:
            agent.deregister(registration)

    measure(register_all, fresh=tuple, rounds=5, times=TENSORS)
