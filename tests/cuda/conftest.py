"""The CUDA path on the stand-in driver. Every test leaves no handle, no memory and no broken rule behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxcore.cuda.memory import live_device_bytes, live_pinned_bytes
from mxcore.memory.host_buffer import live_host_buffers
from mxcore.reading import cufile
from mxcore.storage.load import device_direct
from tests.cuda.stand_in import StandIn, build


@pytest.fixture(scope="session", autouse=True)
def _no_gpudirect_storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever this machine has: the stand-in's memory is none for the real libcufile."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(device_direct, "ROOT", tmp_path_factory.mktemp("no-nvidia-fs"))
        yield


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return StandIn(build(tmp_path_factory.mktemp("cuda-driver")))


@pytest.fixture(scope="session")
def loaded_cufile(loaded: StandIn) -> StandIn:
    cufile._load_stand_in(str(loaded.path))
    return loaded


@pytest.fixture
def gpudirect(
    driver: StandIn, loaded_cufile: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[StandIn]:
    """The stand-in, with cuFile and signs of its kernel module; the process that tries cuFile first is left out."""
    (tmp_path / "root/proc/driver/nvidia-fs").mkdir(parents=True)
    (tmp_path / "root/dev").mkdir()
    (tmp_path / "root/dev/nvidia-fs0").touch()
    monkeypatch.setattr(device_direct, "ROOT", tmp_path / "root")
    monkeypatch.setattr(device_direct, "trial", lambda file: "")
    device_direct.forget_verdicts()
    cufile._forget_refusal()
    yield driver
    device_direct.forget_verdicts()
    cufile._forget_refusal()


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
    assert not any(counts.live), counts
    assert (live_pinned_bytes(), live_device_bytes(), live_host_buffers()) == (0, 0, 0)
