"""Weights in device memory from worker to worker, on the stand-in: digests by kernels, NIXL over host memory.

What is shown: regions, devices, routes, digests of both kinds, the proof of a device and its failures. Not shown:
NIXL's VRAM segments, cuda_ipc and GPUDirect, which want a GPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator

import pytest

from mxcore.cuda import DeviceBuffer, context_of
from mxcore.cuda import driver as cuda_driver
from mxcore.digest import mixsum_64_many, xxh3_64_many
from mxcore.errors import CudaError, DigestMismatch, LayoutUnsupported, SourceRefused, TransferError
from mxcore.nixl import NixlAgent
from mxcore.nixl.agent import live_agents
from mxcore.settings import load_settings
from mxcore.storage.plan import budget
from mxcore.transfer.layout import (
    MIXSUM,
    XXH3,
    ChunkDigests,
    HostDigester,
    Layout,
    Placement,
    Regions,
    build_layout,
    scalars_digest,
)
from mxcore.transfer.member import Membership
from mxcore.transfer.move import Source
from mxcore.transfer.receive import ReceivedChunks
from mxcore.transfer.route import (
    UcxPolicy,
    allocation_regions,
    device_proof,
    digester_of,
    proven_device,
    release_devices,
    require_movable,
)
from mxcore.transfer.serve import SelfCheck
from mxserver.wire.proto import mx_pb2
from tests.cuda.device_tensors import MADE, DeviceTensors
from tests.cuda.stand_in import StandIn
from tests.transfer.memory import HostTensors, identity, model_specs

CHUNK_BYTES = 65_536
SPECS = model_specs(1)


@pytest.fixture(autouse=True)
def _tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("UCX_", "MX_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("UCX_TLS", "tcp,self")  # the stand-in's devices are no CUDA to UCX: no cuda_copy
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    monkeypatch.setattr(UcxPolicy, "device_fenceable", "tcp,self")
    monkeypatch.setattr(UcxPolicy, "serving_device", "tcp,self")


@pytest.fixture
def devices(driver: StandIn) -> Iterator[StandIn]:
    held = budget().held_bytes
    yield driver
    release_devices()
    while MADE:
        MADE.pop().close()
    assert budget().held_bytes == held
    assert live_agents() == 0


@pytest.fixture
def new_member() -> Iterator[Callable[[], Membership]]:
    made: list[Membership] = []

    def new() -> Membership:
        settings = load_settings({"MX_WORKER_GRPC_PORT": 0, "MX_WORKER_HOST": "127.0.0.1", "MX_TRANSPORT": "tcp"}, {})
        made.append(Membership(settings, identity(), 0, "cuda", chunk_bytes=CHUNK_BYTES))
        return made[-1]

    yield new
    for member in made:
        member.close()


def serve(member: Membership, tensors: HostTensors, digests: ChunkDigests | None = None) -> Source:
    layout, placement = build_layout("raw", tensors.local_tensors())
    member.serve(layout, placement, {}, digests, keep_alive=tensors)
    assert member.endpoint is not None
    return Source(member.source_id, member.worker_id, 0, member.endpoint)


def placed(tensors: HostTensors) -> tuple[Layout, Placement]:
    return build_layout("raw", tensors.local_tensors())


@pytest.mark.parametrize(("from_device", "to_device"), [(True, True), (True, False), (False, True)])
def test_weights_move_between_any_memory(
    devices: StandIn, new_member: Callable[[], Membership], from_device: bool, to_device: bool
) -> None:
    source = DeviceTensors(SPECS, 5) if from_device else HostTensors(SPECS, 5)
    target = DeviceTensors(SPECS, None, device=1) if to_device else HostTensors(SPECS, None)
    offered = serve(new_member(), source)
    member = new_member()
    report = member.receive(*placed(target), {}, [offered])
    assert (report.operation, report.transport) == ("write", "tcp")
    assert report.digests.kind == (MIXSUM if from_device else XXH3)
    if isinstance(target, DeviceTensors):
        target.fetch()
    assert target.equal_bytes(HostTensors(SPECS, 5))
    onward = serve(member, target, report.digests)  # with the digests it came with, of whatever kind
    third = HostTensors(SPECS, None)
    again = new_member().receive(*placed(third), {}, [onward])
    assert again.digests == report.digests
    assert third.equal_bytes(HostTensors(SPECS, 5))


@pytest.mark.parametrize("kind", [XXH3, MIXSUM])
def test_a_wrong_bit_on_the_device_is_refused(devices: StandIn, kind: str) -> None:
    source, target = HostTensors(SPECS, 5), DeviceTensors(SPECS, 5)
    layout, placement = placed(target)
    received = ReceivedChunks(layout, placement, scalar_names=[], progress=None, chunk_bytes=CHUNK_BYTES)
    many = {XXH3: xxh3_64_many, MIXSUM: mixsum_64_many}[kind]
    addresses = received.chunks.local_addresses(placed(source)[1])
    digests = many(addresses, received.chunks.lengths, received.chunks.segment_starts)
    answer = mx_pb2.GetLayoutResponse(
        fingerprint=layout.fingerprint, chunk_bytes=CHUNK_BYTES, digest_kind=kind, digests=digests,
        scalars_digest=scalars_digest({}),
    )  # fmt: skip
    received.admit("a holder", answer)
    assert all(received.verify(chunk) for chunk in range(len(received.chunks)))
    assert received.digests_here(kind) == ChunkDigests(digests, kind)
    chunk = 3
    at = received.chunks.slice_of(received.addresses, chunk)[0]
    ctypes.memset(at, ctypes.string_at(at, 1)[0] ^ 1, 1)
    assert [received.verify(each) for each in range(len(received.chunks))].count(False) == 1
    assert not received.verify(chunk)
    other = mx_pb2.GetLayoutResponse()
    other.CopyFrom(answer)
    other.digest_kind = XXH3 if kind == MIXSUM else MIXSUM
    with pytest.raises(SourceRefused, match="cannot be told"):
        received.admit("another holder", other)
    other.digest_kind = "crc32"
    with pytest.raises(SourceRefused, match="crc32"):
        received.admit("another holder", other)


def test_a_bad_digest_ends_a_receive(
    devices: StandIn,
    new_member: Callable[[], Membership],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SelfCheck, "start", lambda check: None)  # else the holder may be the first to notice
    source, target = DeviceTensors(SPECS, 5), DeviceTensors(SPECS, None)
    layout, placement = placed(source)
    chunks = ReceivedChunks(layout, placement, scalar_names=[], progress=None, chunk_bytes=CHUNK_BYTES).chunks
    right = digester_of(placement).many(
        MIXSUM, chunks.local_addresses(placement), chunks.lengths, chunks.segment_starts
    )
    wrong = bytearray(right)
    wrong[8 * 2] ^= 1
    offered = serve(new_member(), source, ChunkDigests(bytes(wrong), MIXSUM))
    with pytest.raises(TransferError) as caught:
        new_member().receive(*placed(target), {}, [offered])
    assert any(isinstance(failure, DigestMismatch) for failure in getattr(caught.value, "failures", [caught.value]))
    caplog.clear()  # its records hold the error, and that the frames it went through


def test_digests_know_their_kind() -> None:
    assert ChunkDigests(b"12345678", XXH3) != ChunkDigests(b"12345678", MIXSUM)
    assert HostDigester().kind == XXH3


def test_a_device_is_proven_once(devices: StandIn) -> None:
    tensors = DeviceTensors(SPECS, 5)
    _, placement = placed(tensors)
    require_movable(placement)
    launches = devices.counts().launches
    assert launches > 0
    assert proven_device(placement) is proven_device(placement)
    assert devices.counts().launches == launches
    assert devices.counts().device_allocations == len(tensors.buffers), "what was tried is gone"


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (lambda driver: driver.fail("cuModuleLoadDataEx", 218), "the digest kernels failed: .*CUDA_ERROR_INVALID_PTX"),
        (lambda driver: driver.fail("cuMemHostAlloc", 2), "the digest kernels failed: .*OUT_OF_MEMORY"),
        (lambda driver: driver.fail("cuDevicePrimaryCtxRetain", 2), "the CUDA driver failed"),
        (lambda driver: driver.fail("cuMemAlloc_v2", 2), "the digest kernels failed|digests of known bytes failed"),
        (lambda driver: driver.fail_later("launch", 719), "digests of known bytes failed: .*LAUNCH_FAILED"),
        (lambda driver: driver.flip(1), "digests of known bytes failed: the device's digests are"),
    ],
)
def test_a_device_that_fails_its_trial_is_refused_by_name(
    devices: StandIn, fail: Callable[[StandIn], None], message: str
) -> None:
    placement = Placement((4096,), (1,), "cuda")
    fail(devices)
    with pytest.raises(LayoutUnsupported, match=f"device 1: ({message}).*Load from storage"):
        require_movable(placement)
    devices.reset()
    with pytest.raises(LayoutUnsupported, match=message):
        require_movable(placement)  # and stays refused


def test_a_transfer_that_does_not_work_is_told(devices: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_transfer(digester: object, source: DeviceBuffer, target: DeviceBuffer) -> None:
        ctypes.memset(source.address + 7, 99, 1)
        real(digester, source, target)  # type: ignore[arg-type]

    real = device_proof._try_nixl
    monkeypatch.setattr(device_proof, "_try_nixl", wrong_transfer)
    with pytest.raises(LayoutUnsupported, match=r"a transfer through NIXL failed: other bytes arrived"):
        require_movable(Placement((4096,), (0,), "cuda"))
    release_devices()
    monkeypatch.setattr(device_proof, "_try_nixl", real)
    monkeypatch.setattr(UcxPolicy, "device_fenceable", "self")
    with pytest.raises(LayoutUnsupported, match=r"a transfer through NIXL failed: .*UCX"):
        require_movable(Placement((4096,), (0,), "cuda"))


def test_several_devices_are_refused(devices: StandIn) -> None:
    with pytest.raises(LayoutUnsupported, match=r"devices \[0, 1\]"):
        require_movable(Placement((4096, 8192), (0, 1), "cuda"))
    with pytest.raises(LayoutUnsupported, match="xpu memory"):
        require_movable(Placement((4096,), (0,), "xpu"))  # type: ignore[arg-type]


def test_regions_end_with_their_allocation(devices: StandIn) -> None:
    context = context_of(0)
    one, other = DeviceBuffer(context, 10_000), DeviceBuffer(context, 5000)
    placement = Placement((one.address + 6000, other.address, one.address + 100), (0, 0, 0), "cuda")
    found = allocation_regions(placement, (1000, 5000, 50))
    flat = {(regions.device_index, regions.addresses[0], regions.lengths[0]) for regions in found}
    assert flat == {(0, one.address + 100, 6900), (0, other.address, 5000)}
    assert all(isinstance(regions, Regions) for regions in found)
    with pytest.raises(CudaError, match="go beyond their allocation"):
        allocation_regions(Placement((one.address + 9000,), (0,), "cuda"), (2000,))
    with pytest.raises(CudaError, match="lies in no allocation"):
        allocation_regions(Placement((64,), (0,), "cuda"), (8,))
    one.close()
    other.close()


def test_nixl_is_never_told_that_the_stand_in_is_a_gpu(devices: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_proof.nixl_device(1) == {"device_index": 0, "device_memory": False}
    monkeypatch.setattr(cuda_driver, "is_stand_in", lambda: False)
    assert device_proof.nixl_device(1) == {"device_index": 1, "device_memory": True}


def test_an_agent_without_a_gpu_registers_no_device_memory() -> None:
    """What the proof relies on: NIXL refuses, and no byte moves."""
    from array import array

    agent = NixlAgent("no-gpu")
    try:
        with pytest.raises(TransferError):
            agent.register(array("Q", [1 << 40]), array("Q", [4096]), device_index=0, device_memory=True)
    finally:
        agent.destroy()
