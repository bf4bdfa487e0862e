"""`publish` and `fetch` of device memory without torch, on the stand-in: what has `__cuda_array_interface__`.

A real server and NIXL over host memory; not shown: cupy itself and GPUDirect, which want a GPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mxbench.demo.workers import Server
from mxcore import fetch, publish
from mxcore.cuda import DeviceBuffer, context_of
from mxcore.errors import ChunksMissing, DestinationMismatch, LayoutMismatch, LayoutUnsupported
from mxcore.nixl.agent import live_agents
from mxcore.transfer.route import UcxPolicy, release_devices
from mxcore.transfer.serve import SelfCheck
from tests.cuda.stand_in import StandIn

At = dict[str, Any]


class DeviceArray:
    """As cupy's: a numpy array's shape, strides and type, its bytes in memory of a device."""

    made: list[DeviceArray] = []  # noqa: RUF012 - freed after the test

    def __init__(self, like: np.ndarray[Any, Any], device: int = 0, **changes: Any) -> None:
        self.dtype, self.shape, self.strides = like.dtype, like.shape, like.strides
        self._span = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.strides, strict=True)) // like.itemsize
        self.buffer = DeviceBuffer(context_of(device), max(1, self._span * like.itemsize))
        self._changes = changes
        self.on_host()[...] = like
        DeviceArray.made.append(self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        steps = None if np.empty(self.shape, self.dtype).strides == self.strides else self.strides
        whole = {"shape": self.shape, "typestr": self.dtype.str, "data": (self.buffer.address, False), "version": 3}
        return {**whole, "strides": steps, "stream": 1, **self._changes}

    def on_host(self) -> Any:
        """On the stand-in the host reaches device memory."""
        memory = (ctypes.c_uint8 * self.buffer.size_bytes).from_address(self.buffer.address)
        flat = np.frombuffer(memory, self.dtype, self._span if self.shape else 1)
        return np.lib.stride_tricks.as_strided(flat, self.shape, self.strides)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process = Server(tmp_path_factory.mktemp("server"))
    try:
        yield process.start()
    finally:
        process.child.stop()


@pytest.fixture
def at(server: str, driver: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[At]:
    for name in [name for name in os.environ if name.startswith(("UCX_", "MX_", "MODEL_EXPRESS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("UCX_TLS", "tcp,self")  # the stand-in's devices are no CUDA to UCX
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    monkeypatch.setattr(UcxPolicy, "device_fenceable", "tcp,self")
    monkeypatch.setattr(UcxPolicy, "serving_device", "tcp,self")
    patient = {"MX_STALL_TIMEOUT_SECS": 20, "MX_SERVER_TIMEOUT_SECS": 60, "MX_DRAIN_TIMEOUT_SECS": 5}
    yield {"server": server, "settings": {"MX_WORKER_HOST": "127.0.0.1", "MX_TRANSPORT": "tcp", **patient}}
    caplog.get_records("call").clear()  # errors in them hold what a receive was made of
    release_devices()
    while DeviceArray.made:
        DeviceArray.made.pop().buffer.close()
    assert live_agents() == 0


@pytest.fixture
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A name that nobody else publishes under."""
    return f"{request.node.name}/{tmp_path.name}"


def arrays() -> dict[str, Any]:
    random = np.random.default_rng(7)
    return {
        "layer": random.standard_normal((512, 257), dtype=np.float32),
        "half": random.standard_normal((3, 5)).astype(np.float16),
        "transposed": random.integers(0, 255, (16, 9), np.uint8).T,
        "scale": np.array(0.5),
    }


def on_device(tensors: dict[str, Any], device: int = 0) -> dict[str, DeviceArray]:
    return {key: DeviceArray(array, device) for key, array in tensors.items()}


def empty(tensors: dict[str, Any], device: int = 0) -> dict[str, DeviceArray]:
    return on_device({key: np.zeros_like(array) for key, array in tensors.items()}, device)


def assert_equal(found: Any, wanted: dict[str, Any]) -> None:
    assert sorted(found) == sorted(wanted)
    for key, array in wanted.items():
        there = found[key].on_host() if isinstance(found[key], DeviceArray) else found[key]
        np.testing.assert_array_equal(there, array, err_msg=key)


def test_from_device_to_device_and_to_host(at: At, name: str) -> None:
    weights = arrays()
    given, into = on_device(weights), empty(weights, device=1)
    with publish(name, given, version=1, **at) as published:
        found = fetch(name, 1, into=into, **at)
        assert found.report.bytes == published.total_bytes == sum(array.nbytes for array in weights.values())
        assert all(found[key] is into[key] for key in weights)
        assert_equal(into, weights)
        assert_equal(fetch(name, 1, framework="numpy", **at), weights)


def test_from_host_to_device(at: At, name: str) -> None:
    """Straight where it lies alike; by a copy where it does not, and for some names."""
    weights = arrays()
    alike, contiguous = empty(weights), empty({key: array.copy(order="C") for key, array in weights.items()})
    with publish(name, weights, version=1, **at):
        assert_equal(fetch(name, 1, into=alike, **at), weights)
        assert_equal(fetch(name, 1, into=contiguous, **at), weights)
        part = empty({"half": weights["half"]})
        assert_equal(fetch(name, 1, into=part, names=["half"], **at), {"half": weights["half"]})
        with pytest.raises(DestinationMismatch, match=r"half: .* not contiguous"):
            fetch(name, 1, into={"half": DeviceArray(np.zeros((5, 3), "f2").T)}, names=["half"], **at)
        with pytest.raises(LayoutMismatch, match=r"half: torch.float32 \(3, 5\) here, torch.float16"):
            fetch(name, 1, into=empty({"half": np.zeros((3, 5), "f4")}), names=["half"], **at)


def test_a_copy_in_host_memory_is_served(at: At, name: str) -> None:
    weights = arrays()
    given = on_device(weights)
    with publish(name, given, version=1, copy=True, **at):
        given["layer"].on_host()[...] = 0
        assert_equal(fetch(name, 1, framework="numpy", **at), weights)


def test_a_flipped_byte_in_device_memory_is_refused(at: At, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SelfCheck, "start", lambda check: None)  # else the publisher may be the first to notice
    weights = arrays()
    given = on_device(weights)
    with publish(name, given, version=1, **at):
        given["layer"].on_host().view(np.uint8)[300, 77] ^= 1
        with pytest.raises(ChunksMissing, match="is not what its digest promises"):
            fetch(name, 1, into=empty(weights, device=1), **at)


def test_what_cannot_be_moved_is_named(at: At, name: str) -> None:
    four = np.arange(4.0)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mask": four}, "it has a mask"),
        ({"typestr": ">f8"}, "dtype >f8"),
        ({"strides": (-8,)}, "a negative stride"),
        ({"data": (four.ctypes.data, False)}, "is no device memory"),
        ({"strides": (16,), "shape": (2,)}, "gaps between its elements"),
    ]
    for changes, said in wrong:
        with pytest.raises(LayoutUnsupported, match=rf"'a' \(.*{said}"):
            publish(name, {"a": DeviceArray(four, **changes)}, 1, **at)
    read_only = DeviceArray(four)
    read_only._changes = {"data": (read_only.buffer.address, True)}
    with pytest.raises(LayoutUnsupported, match=r"'a' .*read-only"):
        fetch(name, 1, into={"a": read_only}, **at)
