"""The CUDA path on the stand-in driver. Every test leaves no handle, no memory and no broken rule behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from mxcore.cuda_memory import live_device_bytes, live_pinned_bytes
from mxcore.host_buffer import live_host_buffers
from tests.cuda.stand_in import StandIn, build


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return StandIn(build(tmp_path_factory.mktemp("cuda-driver")))


@pytest.fixture
def driver(loaded: StandIn, request: pytest.FixtureRequest) -> Iterator[StandIn]:
    """The stand-in, reset; a test that breaks a rule on purpose ends with `driver.reset()`."""
    loaded.reset()
    yield loaded
    request.node.funcargs.clear()  # what the other fixtures made
    gc.collect()  # tracebacks hold frames in cycles
    counts = loaded.counts()
    assert counts.violations == 0, loaded.violation()
    loaded.reset()
    assert counts.live == (0,) * 8, counts
    assert (live_pinned_bytes(), live_device_bytes(), live_host_buffers()) == (0, 0, 0)
