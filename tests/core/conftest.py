"""Every test of the core leaves nothing behind: no host memory, no exports, no open file."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

from mxcore.memory.host_buffer import live_host_buffers, live_host_bytes
from mxcore.reading.file_set import live_file_descriptors

settings.register_profile("no-deadline", deadline=None)  # this machine is shared: time says nothing
settings.load_profile("no-deadline")


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    if live_host_buffers():
        gc.collect()  # an exception's traceback may still hold a buffer in a cycle
    assert (live_host_buffers(), live_host_bytes(), live_file_descriptors()) == (0, 0, 0)
