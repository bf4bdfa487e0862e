"""A holder and its gRPC services in this process: leases, draining, status codes, ports."""

from __future__ import annotations

import ctypes
import gc
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from mxcore.digest import xxh3_64_segments
from mxcore.errors import HolderDraining, LayoutUnsupported, LeaseEnded, NixlError
from mxcore.transfer.layout import XXH3, ChunkDigests, Placement, build_layout
from mxcore.transfer.move import AgentSession, Source, SourceClient
from mxcore.transfer.route import UcxPolicy
from mxcore.transfer.serve import Holder, WorkerServer
from mxserver.wire.proto import mx_pb2, mx_pb2_grpc, p2p_pb2, p2p_pb2_grpc
from tests.transfer.conftest import wait_for
from tests.transfer.memory import HostTensors, model_specs

POLICY = UcxPolicy.from_environment("tcp", {})
SOURCE_ID, WORKER_ID = "0123456789abcdef", "worker-1"


def new_session() -> AgentSession:
    return AgentSession(WORKER_ID, tls=POLICY.tls)


def new_holder(lease_seconds: float = 30.0, **changes: Any) -> Holder:
    tensors = HostTensors(model_specs(1), 3)
    layout, placement = build_layout("raw", tensors.local_tensors())
    return Holder(
        layout, placement, new_session, keep_alive=tensors, chunk_bytes=65536, lease_seconds=lease_seconds, **changes
    )


@pytest.fixture
def holder() -> Iterator[Holder]:
    value = new_holder()
    yield value
    value.close()


def new_server(holder: Holder, port: int = 0, **changes: Any) -> WorkerServer:
    return WorkerServer(
        holder,
        POLICY,
        source_id=SOURCE_ID,
        worker_id=WORKER_ID,
        worker_rank=3,
        accelerator="cpu",
        host="127.0.0.1",
        port=port,
        loopback=True,
        **changes,
    )


class Stubs:
    def __init__(self, endpoint: str) -> None:
        self.channel = grpc.insecure_channel(endpoint)
        self.worker = p2p_pb2_grpc.WorkerServiceStub(self.channel)
        self.transfer = mx_pb2_grpc.TransferServiceStub(self.channel)


@pytest.fixture
def stubs(holder: Holder) -> Iterator[Stubs]:
    server = new_server(holder)
    value = Stubs(server.endpoint)
    yield value
    value.channel.close()
    server.stop()


def status_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value.code(), raised.value.details()  # type: ignore[attr-defined]


def test_digests_are_those_of_the_chunks(holder: Holder) -> None:
    for chunk in range(len(holder.chunks)):
        digest = xxh3_64_segments(
            holder.chunks.slice_of(holder.addresses, chunk), holder.chunks.slice_of(holder.chunks.lengths, chunk)
        )
        assert holder.digests.of_chunk(chunk) == digest.to_bytes(8, "little")


@pytest.mark.parametrize("closed", [False, True])
def test_a_changed_byte_is_noticed_also_after_the_end(closed: bool) -> None:
    tensors = HostTensors(model_specs(1), 3)
    layout, placement = build_layout("raw", tensors.local_tensors())
    holder = Holder(layout, placement, new_session, chunk_bytes=65536)
    if closed:
        holder.close()
    assert holder.unchanged()
    byte = ctypes.c_uint8.from_address(holder.addresses[-1])
    byte.value ^= 1
    assert not holder.unchanged()
    byte.value ^= 1
    assert holder.unchanged()
    holder.close()


def test_extents_of_one_allocation_are_one_region(holder: Holder) -> None:
    with new_session() as session:
        assert 0 < session.register(holder.layout, holder.placement) <= len(holder.layout.extent_bytes)


def test_digests_of_another_count_are_refused() -> None:
    layout, placement = build_layout("raw", HostTensors(model_specs(1), 3).local_tensors())
    with pytest.raises(ValueError, match="8 bytes of digests"):
        Holder(layout, placement, new_session, digests=ChunkDigests(b"\0" * 8, XXH3), chunk_bytes=65536)
    device = Placement(placement.addresses, placement.device_indices, "xpu")  # type: ignore[arg-type]
    with pytest.raises(LayoutUnsupported):
        Holder(layout, device, new_session)


def test_a_lease_lives_until_it_is_released(holder: Holder) -> None:
    lease = holder.grant()
    assert holder.live_leases == 1
    assert holder.renew(lease.lease_id) is lease
    holder.release(lease.lease_id)
    assert holder.live_leases == 0
    for call in (holder.renew, holder.release):
        with pytest.raises(LeaseEnded):
            call(lease.lease_id)


def test_a_lease_without_a_sign_ends_by_itself() -> None:
    holder = new_holder(lease_seconds=0.05)
    lease = holder.grant()
    wait_for(lambda: holder.live_leases == 0)
    with pytest.raises(LeaseEnded):
        holder.renew(lease.lease_id)
    holder.close()


def test_draining_refuses_new_readers_and_waits_for_the_others(holder: Holder) -> None:
    lease = holder.grant()
    assert not holder.drain(0)  # refused from here on, though somebody still reads
    with pytest.raises(HolderDraining):
        holder.grant()
    assert holder.renew(lease.lease_id) is lease
    drained: list[bool] = []
    thread = threading.Thread(target=lambda: drained.append(holder.drain(60)))
    thread.start()
    holder.release(lease.lease_id)
    thread.join(60)
    assert drained == [True]


def test_draining_ends_with_the_last_silent_reader() -> None:
    holder = new_holder(lease_seconds=0.05)
    holder.grant()
    assert holder.drain(60)
    holder.close()


def test_the_memory_is_kept_until_it_is_closed() -> None:
    holder = new_holder()
    tensors = weakref.ref(holder._keep_alive)
    lease, session = holder.grant(), holder.agent.session()
    gc.collect()
    assert tensors() is not None
    holder.close()
    holder.close()
    gc.collect()
    assert tensors() is None
    assert session.fenced
    with pytest.raises(LeaseEnded):
        holder.renew(lease.lease_id)
    with pytest.raises(NixlError):
        holder.agent.session()


def test_the_manifest_names_every_tensor(stubs: Stubs, holder: Holder) -> None:
    answer = stubs.worker.GetTensorManifest(p2p_pb2.GetTensorManifestRequest(mx_source_id=SOURCE_ID))
    assert {t.name for t in answer.tensors} == {t.name for t in holder.layout.tensors if t.extent is not None}
    assert (answer.worker_id, answer.worker_rank, answer.accelerator) == (WORKER_ID, 3, "cpu")
    assert answer.agent_name == ""  # nobody has needed one
    head = next(t for t in answer.tensors if t.name == "head.weight")
    assert head.dtype == "torch.float32"
    assert head.size == 100_000 // 4 * 2 * 4


def test_a_read_is_prepared_and_released(stubs: Stubs, holder: Holder) -> None:
    prepared = stubs.worker.PrepareTensorRead(
        p2p_pb2.PrepareTensorReadRequest(mx_source_id=SOURCE_ID, worker_id=WORKER_ID)
    )
    assert prepared.manifest.mx_source_id == SOURCE_ID
    assert holder.live_leases == 1
    renewed = stubs.transfer.RenewLease(mx_pb2.RenewLeaseRequest(lease_id=prepared.lease_id))
    assert renewed.lease_ms == 30_000
    release = p2p_pb2.ReleaseTensorReadRequest(mx_source_id=SOURCE_ID, lease_id=prepared.lease_id)
    stubs.worker.ReleaseTensorRead(release)
    assert holder.live_leases == 0
    assert status_of(lambda: stubs.worker.ReleaseTensorRead(release))[0] is grpc.StatusCode.NOT_FOUND
    gone = mx_pb2.RenewLeaseRequest(lease_id=prepared.lease_id)
    assert status_of(lambda: stubs.transfer.RenewLease(gone))[0] is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "method", ["GetArtifactManifestHeader", "GetArtifactManifestChunks", "PrepareArtifactChunk", "ReleaseArtifactChunk"]
)
def test_artifacts_are_not_found(stubs: Stubs, method: str) -> None:
    request = getattr(p2p_pb2, f"{method}Request")
    call = getattr(stubs.worker, method)
    code, details = status_of(lambda: call(request(mx_source_id=SOURCE_ID, artifact_id="kernels")))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "kernels" in details
    assert status_of(lambda: call(request(mx_source_id="x")))[0] is grpc.StatusCode.FAILED_PRECONDITION


def test_a_worker_that_leaves_says_so(stubs: Stubs, holder: Holder) -> None:
    holder.drain(0)
    prepare = p2p_pb2.PrepareTensorReadRequest(mx_source_id=SOURCE_ID)
    layout = mx_pb2.GetLayoutRequest(mx_source_id=SOURCE_ID)
    assert status_of(lambda: stubs.worker.PrepareTensorRead(prepare))[0] is grpc.StatusCode.UNAVAILABLE
    assert status_of(lambda: stubs.transfer.GetLayout(layout))[0] is grpc.StatusCode.UNAVAILABLE


def test_what_a_transfer_is_refused_for(stubs: Stubs, holder: Holder) -> None:
    lease_id = holder.grant().lease_id

    def open_transfer(**changes: Any) -> tuple[grpc.StatusCode, str]:
        fields = {
            "mx_source_id": SOURCE_ID,
            "lease_id": lease_id,
            "fingerprint": holder.layout.fingerprint,
            "operation": mx_pb2.OPERATION_WRITE,
            "extents": [mx_pb2.Extent(address=4096)] * len(holder.layout.extent_bytes),
            "nixl_metadata": b"garbage",
        }
        request = mx_pb2.OpenTransferRequest(**{**fields, **changes})
        return status_of(lambda: stubs.transfer.OpenTransfer(request))

    assert open_transfer()[0] is grpc.StatusCode.ABORTED
    assert "metadata of 7 bytes" in open_transfer()[1]
    assert open_transfer(lease_id="none")[0] is grpc.StatusCode.NOT_FOUND
    assert open_transfer(extents=[])[0] is grpc.StatusCode.ABORTED
    assert open_transfer(fingerprint="other")[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert "metadata of 7 bytes" in open_transfer(device_memory=True)[1]
    two = [mx_pb2.Extent(address=4096, device_id=index % 2) for index in range(len(holder.layout.extent_bytes))]
    assert open_transfer(device_memory=True, extents=two)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert "one-sided" in open_transfer(operation=mx_pb2.OPERATION_READ)[1]

    def push(chunks: list[int]) -> tuple[grpc.StatusCode, str]:
        request = mx_pb2.PushChunksRequest(lease_id=lease_id, chunks=chunks)
        return status_of(lambda: list(stubs.transfer.PushChunks(request)))

    assert push([len(holder.chunks)])[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert "no open transfer" in push([0])[1]


@pytest.mark.parametrize("notify", [False, True])
def test_a_receiver_is_told_of_each_chunk_or_of_all_at_once(stubs: Stubs, holder: Holder, notify: bool) -> None:
    tensors = HostTensors(model_specs(1), None)
    layout, placement = build_layout("raw", tensors.local_tensors())
    lease_id = holder.grant().lease_id
    chunks = list(range(len(holder.chunks)))
    with AgentSession("receiver", tls=POLICY.fenceable, progress_thread=False) as session, session.progressing():
        session.register(layout, placement)
        opened = mx_pb2.OpenTransferRequest(
            mx_source_id=SOURCE_ID,
            lease_id=lease_id,
            fingerprint=layout.fingerprint,
            operation=mx_pb2.OPERATION_WRITE,
            extents=[mx_pb2.Extent(address=address) for address in placement.addresses],
            nixl_metadata=session.metadata(),
        )
        stubs.transfer.OpenTransfer(opened)
        request = mx_pb2.PushChunksRequest(lease_id=lease_id, chunks=chunks, notify=notify)
        results = list(stubs.transfer.PushChunks(request))
        told: list[int] = []
        wait_for(lambda: told.extend(session.mailbox.take(0.1)) or len(told) == len(chunks) * notify)
    assert tensors.equal_bytes(HostTensors(tensors.specs, 3))
    assert all(result.written for result in results)
    named = [chunk for result in results for chunk in (result.chunk, *result.others)]
    assert sorted(named) == chunks
    assert len(results) == (1 if notify else len(chunks))
    assert sorted(told) == chunks * notify


def test_the_layout_travels_only_where_it_differs(stubs: Stubs, holder: Holder) -> None:
    request = mx_pb2.GetLayoutRequest(mx_source_id=SOURCE_ID, fingerprint=holder.layout.fingerprint)
    assert not stubs.transfer.GetLayout(request).HasField("layout")
    request.fingerprint = ""
    answer = stubs.transfer.GetLayout(request)
    assert len(answer.layout.tensors) == len(holder.layout.tensors)
    assert answer.chunk_bytes == 65536
    assert (answer.digests, answer.digest_kind) == (holder.digests.values, holder.digests.kind)


def test_a_port_in_use_moves_to_a_free_one(holder: Holder, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = new_server(holder, port)
        assert server.port != port
        assert server.endpoint == f"127.0.0.1:{server.port}"
        with SourceClient(Source(SOURCE_ID, WORKER_ID, 3, server.endpoint), timeout_seconds=10) as client:
            assert client.get_layout("").fingerprint == holder.layout.fingerprint
        server.stop()
        server.stop()
    assert "in use" not in capfd.readouterr().err  # two workers on a host are no error, and gRPC would call it one


def test_a_port_beyond_the_last_one_moves_to_a_free_one(holder: Holder) -> None:
    server = new_server(holder, 65535 + 3)
    assert server.endpoint == f"127.0.0.1:{server.port}"
    server.stop()
