"""Device memory of another process, on the stand-in: what is exported, proven and mapped; what is taken instead.

Where it is WRITten instead, NIXL moves the stand-in's memory as host memory.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mxcore.cuda import DeviceBuffer, OpenedMemory, address_range, context_of, export_memory
from mxcore.cuda.ipc import HANDLE_BYTES
from mxcore.errors import CudaError, SourceBusy, SourceRefused
from mxcore.nixl.agent import live_agents
from mxcore.transfer.layout import ChunkRequest, Layout, Placement, all_chunks, build_layout
from mxcore.transfer.move import Source, SourceClient, StagedMover
from mxcore.transfer.receive import ReceiveReport
from mxcore.transfer.route import (
    DeviceProbeTarget,
    UcxPolicy,
    cannot_read,
    choose_route,
    release_devices,
    same_device,
    same_host,
)
from mxserver.wire.proto import mx_pb2
from tests.cuda.device_tensors import MADE, DeviceTensors
from tests.cuda.holder import SEED, member
from tests.cuda.stand_in import ROOT, StandIn
from tests.transfer.memory import HostTensors, model_specs

BY_TCP = "tcp,self"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("UCX_", "MX_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")


@contextmanager
def holder(driver: StandIn, mode: str, *, share: bool = True, checked: bool = False) -> Iterator[str]:
    """What a holder's process says, while it lives; it has to end well, if `checked` with the weights that it had."""
    task = json.dumps({"library": str(driver.path), "mode": mode, "share": share, "tls": BY_TCP})
    command = [sys.executable, "-m", "tests.cuda.holder", task]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline()
            if checked:
                process.stdin.write("changed\n")
                process.stdin.flush()
                assert json.loads(process.stdout.readline()) == {"changed": 0}
        finally:
            process.stdin.close()
            assert process.wait(120) == 0


def probe_of(line: str) -> mx_pb2.DeviceProbe:
    return mx_pb2.DeviceProbe.FromString(bytes.fromhex(line))


def test_what_the_driver_does_not_export_is_an_error(driver: StandIn) -> None:
    context = context_of(0)
    mapped = DeviceBuffer(context, 5000)
    driver.share()
    allocated = DeviceBuffer(context, 5000)
    handle, offset = export_memory(context, allocated.address + 100)
    assert (len(handle), offset) == (HANDLE_BYTES, 100) == (64, 100)
    with pytest.raises(CudaError, match="cuIpcGetMemHandle"):
        export_memory(context, mapped.address)
    mapped.close()
    allocated.close()


def test_memory_of_this_process_is_not_opened_and_nothing_is_left(driver: StandIn) -> None:
    context = context_of(0)
    driver.share()
    allocated = DeviceBuffer(context, 5000)
    handle, _ = export_memory(context, allocated.address)
    with pytest.raises(CudaError, match="cuIpcOpenMemHandle failed with CUDA_ERROR_INVALID_CONTEXT"):
        OpenedMemory(context, handle)
    with pytest.raises(CudaError, match="cuIpcOpenMemHandle"):
        OpenedMemory(context, bytes(HANDLE_BYTES))
    with pytest.raises(ValueError, match="63 bytes"):
        OpenedMemory(context, handle[1:])
    allocated.close()


def test_another_processes_bytes_are_read(driver: StandIn) -> None:
    with holder(driver, "probe") as line:
        probe = probe_of(line)
        assert cannot_read(probe, 0) == ""
        assert cannot_read(probe, 1) == ""  # from another device, as peers do
        opened = OpenedMemory(context_of(0), probe.handle)
        assert driver.counts().opened == 1
        assert opened.address
        opened.close()
        opened.close()
        assert opened.address == 0
        assert driver.counts().opened == 0
    assert "cuIpcOpenMemHandle failed with CUDA_ERROR_MAP_FAILED" in cannot_read(probe, 0), "its process is gone"


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"boot_id": "another"}, "another machine"),
        ({"pid_namespace": 1}, "another PID namespace"),
        ({"nonce": b"\1" * 32}, "other bytes"),
        ({"nonce": b"short"}, "no bytes"),
        ({"handle": b"\0" * 64}, "cuIpcOpenMemHandle failed"),
        ({"handle": b"short"}, "a handle of 5 bytes"),
        ({"offset": (2 << 20) - 31}, "begin at 2097121 of 2097152"),
    ],
)
def test_a_probe_that_is_not_so_is_no_proof(driver: StandIn, change: dict[str, Any], because: str) -> None:
    with holder(driver, "probe") as line:
        probe = probe_of(line)
        for name, value in change.items():
            setattr(probe, name, value)
        assert because in cannot_read(probe, 0)


@pytest.mark.parametrize("function", ["cuIpcOpenMemHandle_v2", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"])
def test_a_device_that_fails_meanwhile_is_no_proof(driver: StandIn, function: str) -> None:
    with holder(driver, "probe") as line:
        driver.fail(function, 719)
        assert "CUDA_ERROR_LAUNCH_FAILED" in cannot_read(probe_of(line), 0)
        assert cannot_read(probe_of(line), 0) == ""


def test_from_another_pid_namespace_it_is_not_even_tried(driver: StandIn) -> None:
    namespaced = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*namespaced, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("making a PID namespace needs CAP_SYS_ADMIN")
    code = """
import sys
from mxcore.cuda import driver as cuda_driver
from mxcore.transfer.route.same_device import cannot_read
from mxserver.wire.proto import mx_pb2
cuda_driver._load_stand_in(sys.argv[1])
print(cannot_read(mx_pb2.DeviceProbe.FromString(bytes.fromhex(sys.argv[2])), 0))
"""
    with holder(driver, "probe") as line:
        command = [*namespaced, sys.executable, "-c", code, str(driver.path), line.strip()]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "it runs in another PID namespace", ran.stderr


def test_a_target_that_cannot_be_made_leaves_nothing(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CudaError, match="cuIpcGetMemHandle"):
        DeviceProbeTarget(context_of(0))  # memory as cuMemCreate's
    driver.share()
    driver.fail("cuMemcpyHtoDAsync_v2", 700)
    with pytest.raises(CudaError):
        DeviceProbeTarget(context_of(0))
    target = DeviceProbeTarget(context_of(0))
    monkeypatch.setattr(same_host, "_BOOT_ID", same_host._BOOT_ID.parent / "nobody")
    assert not target.to_proto().nonce
    assert "does not know where it runs" in cannot_read(mx_pb2.DeviceProbe(nonce=b"1" * 32), 0)
    target.close()
    target.close()


def test_what_a_holder_offers(driver: StandIn) -> None:
    """Whatever made its weights: the memory that it shows, and stages chunks in, is an allocation of its own."""
    mapped = DeviceBuffer(context_of(1), 5000)
    weights = Placement((mapped.address,), (1,), "cuda")
    target, because = same_device.device_offer(weights)
    assert target is None
    assert "cuIpcGetMemHandle failed" in because
    driver.share()
    target, because = same_device.device_offer(weights)
    assert target is not None
    assert because == ""
    target.close()
    mapped.close()


def test_the_route_follows_the_proof(driver: StandIn) -> None:
    policy = UcxPolicy.from_environment("auto", {})
    with holder(driver, "probe") as line:
        offer = mx_pb2.TransportOffer(device_memory=True, staging_probe=probe_of(line), rdma_device=True)
        route = choose_route(policy, offer, device_index=0)
        assert (route.operation, route.transport, route.by_nixl, route.because) == ("stage", "cuda-ipc", False, "")
        offer.staging_probe.nonce = b"\1" * 32
        route = choose_route(policy, offer, device_index=0)
        assert (route.operation, route.because) == ("write", "other bytes are there than it shows")
        assert not UcxPolicy("auto", route.tls).allows("cuda_ipc")
        older = mx_pb2.TransportOffer(device_memory=True, device_probe=probe_of(line))
        route = choose_route(policy, older, device_index=0)
        assert route.operation == "write"
        assert "of a release that only lets its weights be mapped" in route.because


@pytest.fixture
def receiving(driver: StandIn) -> Iterator[DeviceTensors]:
    tensors = DeviceTensors(model_specs(1), None)
    yield tensors
    release_devices()
    MADE.remove(tensors)
    tensors.close()
    assert live_agents() == 0


@pytest.mark.parametrize(
    ("share", "expected", "said"),
    [(True, ("stage", "cuda-ipc"), ""), (False, ("write", "tcp"), "write by tcp instead of cuda_ipc: cuIpcGetMem")],
)
def test_weights_on_one_machine(
    driver: StandIn,
    receiving: DeviceTensors,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    share: bool,
    expected: tuple[str, str],
    said: str,
) -> None:
    """Out of a buffer of the holder's, where that can be mapped; else the holder WRITEs."""
    report = received(driver, receiving, monkeypatch, caplog, share=share)
    assert (report.operation, report.transport) == expected
    assert said in caplog.text
    caplog.clear()  # its records hold the error, and that the frames it went through


@pytest.mark.parametrize("function", ["cuIpcOpenMemHandle_v2", "cuMemcpyDtoDAsync_v2"])
def test_a_device_that_fails_meanwhile_is_written_to(
    driver: StandIn,
    receiving: DeviceTensors,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
) -> None:
    real = StagedMover.__init__

    def fail_once(mover: StagedMover, *arguments: Any, **named: Any) -> None:
        driver.fail(function, 719)
        real(mover, *arguments, **named)

    monkeypatch.setattr(StagedMover, "__init__", fail_once)
    report = received(driver, receiving, monkeypatch, caplog)
    assert (report.operation, report.transport) == ("write", "tcp")
    assert "CUDA_ERROR_LAUNCH_FAILED" in caplog.text
    caplog.clear()


def received(
    driver: StandIn,
    receiving: DeviceTensors,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    share: bool = True,
) -> ReceiveReport:
    """A receive from a holder in another process; the bytes were compared."""
    for name in ("device_fenceable", "serving_device"):
        monkeypatch.setattr(UcxPolicy, name, BY_TCP)
    with holder(driver, "serve", share=share) as line, caplog.at_level(logging.INFO):
        membership = member()
        report = membership.receive(*build_layout("raw", receiving.local_tensors()), {}, [source_of(line)])
        membership.close()
    receiving.fetch()
    assert receiving.equal_bytes(HostTensors(model_specs(1), SEED))
    return report


def source_of(line: str) -> Source:
    return Source(worker_rank=0, **json.loads(line))


def test_a_reader_maps_nothing_of_the_weights(driver: StandIn) -> None:
    """Whatever it writes to what it maps, and whatever it asks for."""
    with holder(driver, "serve", checked=True) as line, SourceClient(source_of(line), timeout_seconds=60) as client:
        layout = client.get_layout("another")
        chunks = -(-Layout.from_proto(layout.layout).total_bytes // layout.chunk_bytes)
        lease = client.prepare()

        def opened(operation: Any) -> mx_pb2.OpenTransferResponse:
            return client.open_transfer(lease, layout.fingerprint, b"", (), operation, device_memory=True)

        with pytest.raises(SourceRefused, match="would not be one-sided"):
            opened(mx_pb2.OPERATION_READ)  # as older releases
        with pytest.raises(SourceBusy, match="has no buffer for chunks"):
            client.stage_chunk(lease, 0, 0).result()
        answer = opened(mx_pb2.OPERATION_STAGE)
        assert (answer.nixl_metadata, answer.agent_name, list(answer.extents)) == (b"", "", [])
        assert opened(mx_pb2.OPERATION_STAGE).staging == answer.staging
        memory = OpenedMemory(context_of(0), answer.staging.handle)
        base, size_bytes = address_range(memory.address)
        for granted, chunk, slot in ((False, 0, 0), (True, chunks, 0), (True, 0, 2)):
            if granted:
                client.ask(lease, ChunkRequest(all_chunks(chunks), 0, chunks), chunks).result()
            with pytest.raises(SourceRefused, match="was not granted, or there is no such slot"):
                client.stage_chunk(lease, chunk, slot).result()
        for chunk in range(chunks):
            ctypes.memset(base, 0xA5, size_bytes)
            client.stage_chunk(lease, chunk, chunk % 2).result()
            ctypes.memset(base, 0xA5, size_bytes)
        with pytest.raises(SourceRefused, match="was not granted"):
            client.stage_chunk(lease, 0, 0).result()  # once each
        client.release(lease)
        ctypes.memset(base, 0xA5, size_bytes)
        memory.close()


def test_a_fence_waits_for_the_device_before_the_agent_goes(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxcore.transfer.move import agent_session

    done: list[str] = []

    class Agent:
        destroyed = False

        def destroy(self) -> None:
            done.append("agent")

    class Device:
        class context:  # noqa: N801
            @staticmethod
            def synchronize() -> None:
                done.append("device")

    session = agent_session.AgentSession.__new__(agent_session.AgentSession)
    session._agent, session._device = Agent(), Device()  # type: ignore[assignment]
    session._fence, session._fence_lock, session._fence_timeout_seconds = None, threading.Lock(), 60.0
    session._agent.name = "tried"  # type: ignore[misc]
    session.fence()
    assert done == ["device", "agent", "device"]
