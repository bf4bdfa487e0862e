"""The worker's gRPC services over a holder: WorkerService of the protocol, and our TransferService."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mxcore.errors import CudaError, HolderBusy, HolderDraining, LeaseEnded, TransferError
from mxcore.process import allow_attaching
from mxcore.transfer.layout import ChunkRequest, scalars_digest, scalars_to_proto, set_from_bytes, set_to_bytes
from mxcore.transfer.move import AGAIN_METADATA, HAD_METADATA, chunk_server_context
from mxcore.transfer.route import DeviceProbeTarget, ProbeTarget, UcxPolicy, device_offer
from mxcore.transfer.serve.chunk_listener import ChunkListener
from mxcore.transfer.serve.holder import Holder
from mxcore.transfer.serve.refused_readers import RefusedReaders
from mxcore.transfer.serve.worker_identity import WorkerIdentity, refuse
from mxserver.wire import SettingError
from mxserver.wire.calls import channel_options, server_credentials
from mxserver.wire.credentials import worker_tls
from mxserver.wire.proto import mx_pb2, mx_pb2_grpc, p2p_pb2, p2p_pb2_grpc

__all__ = ["WorkerServer"]

logger = logging.getLogger(__name__)

_STREAMS_A_READER = 2  # of PushChunks: one begins while the other ends
_SPARE_THREADS = 24  # besides those that push: 16 may wait for new chunks, the others answer
_LONGEST_WAIT_MS = 2000
_STOP_GRACE_SECONDS = 1.0
_STOP_SECONDS = 30.0  # a call may be inside a library that never returns
_MESSAGE_BYTES = 256 << 10  # of any message of a reader, and besides:
_EXTENT_MESSAGE_BYTES = 512  # its place, and what NIXL's metadata says of its region: 44 bytes, more with many ports
_CHUNK_MESSAGE_BYTES = 8  # a number, and two bits
_LAST_PORT = 65535
_MOST_DOUBTED = 64  # chunks of one call


def _serialised(server: grpc.Server, worker: _WorkerService, transfers: _TransferService) -> None:
    """Has these calls' answers sent as the bytes that they are: a message may be cut into several, one after the other.

    So what is long, and the same for all callers, is serialised once.
    """
    unary = grpc.unary_unary_rpc_method_handler
    server.add_registered_method_handlers(
        p2p_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name,
        {
            "GetTensorManifest": unary(worker.GetTensorManifest, p2p_pb2.GetTensorManifestRequest.FromString),
            "PrepareTensorRead": unary(worker.PrepareTensorRead, p2p_pb2.PrepareTensorReadRequest.FromString),
        },
    )
    server.add_registered_method_handlers(
        mx_pb2.DESCRIPTOR.services_by_name["TransferService"].full_name,
        {"GetLayout": unary(transfers.GetLayout, mx_pb2.GetLayoutRequest.FromString)},
    )


class _WorkerService(p2p_pb2_grpc.WorkerServiceServicer):
    def __init__(self, identity: WorkerIdentity) -> None:
        self._identity = identity
        self._holder = identity.holder
        self._refused = RefusedReaders()

    def GetTensorManifest(  # type: ignore[override]  # noqa: N802 - see _serialised
        self, request: p2p_pb2.GetTensorManifestRequest, context: grpc.ServicerContext
    ) -> bytes:
        self._identity.check(context, request.mx_source_id, request.worker_id)
        return self._identity.manifest

    def PrepareTensorRead(  # type: ignore[override]  # noqa: N802 - see _serialised
        self, request: p2p_pb2.PrepareTensorReadRequest, context: grpc.ServicerContext
    ) -> bytes:
        self._identity.check(context, request.mx_source_id, request.worker_id)
        with _as_status(context):
            try:
                lease = self._holder.grant(_reader_of(context))
            except HolderBusy:
                again_ms = round(1000 * self._refused.again_seconds(context.peer()))
                had = str(self._holder.chunks_had)
                context.set_trailing_metadata(((AGAIN_METADATA, str(again_ms)), (HAD_METADATA, had)))
                raise
        return (
            p2p_pb2.PrepareTensorReadResponse(lease_id=lease.lease_id).SerializeToString()
            + self._identity.leased_manifest
        )

    def ReleaseTensorRead(  # noqa: N802
        self, request: p2p_pb2.ReleaseTensorReadRequest, context: grpc.ServicerContext
    ) -> p2p_pb2.ReleaseTensorReadResponse:
        self._identity.check(context, request.mx_source_id, request.worker_id)
        with _as_status(context):
            self._holder.release(request.lease_id)
        return p2p_pb2.ReleaseTensorReadResponse()

    def GetArtifactManifestHeader(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return self._no_artifact(request, context)

    def GetArtifactManifestChunks(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return self._no_artifact(request, context)

    def PrepareArtifactChunk(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return self._no_artifact(request, context)

    def ReleaseArtifactChunk(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return self._no_artifact(request, context)

    def _no_artifact(self, request, context: grpc.ServicerContext) -> NoReturn:  # type: ignore[no-untyped-def]
        self._identity.check(context, request.mx_source_id, "")
        refuse(context, grpc.StatusCode.NOT_FOUND, f"artifact {request.artifact_id!r}: this worker serves weights only")


def _reader_of(context: grpc.ServicerContext) -> str:
    """Who calls: the host that it calls from, and what its certificate says; nothing that it may choose."""
    host = context.peer().rpartition(":")[0]
    names = context.peer_identities() or ()
    return " ".join([host, *(name.decode(errors="replace") for name in names)])


def _device_of(context: grpc.ServicerContext, request: mx_pb2.OpenTransferRequest) -> int:
    """The one device that the receiver's extents are on."""
    devices = sorted({extent.device_id for extent in request.extents})
    if len(devices) != 1:
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"extents on devices {devices}: one is supported")
    return devices[0]


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # grpc_health has no types
    """grpc.health.v1: SERVING while this worker takes readers. `Watch` is not offered: each would hold a thread."""

    def __init__(self, holder: Holder) -> None:
        self._holder = holder

    def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        states = health_pb2.HealthCheckResponse
        return states(status=states.NOT_SERVING if self._holder.draining else states.SERVING)


class _TransferService(mx_pb2_grpc.TransferServiceServicer):
    def __init__(
        self,
        identity: WorkerIdentity,
        policy: UcxPolicy,
        chunk_port: int,
        doubted: Callable[[Sequence[int]], None],
        *,
        chunk_tls: bool,
    ) -> None:
        """`chunk_port`: where chunks are sent from, 0 for nowhere, in clear or by TLS. `doubted` hears of chunks that
        readers refused.
        """
        self._identity = identity
        self._doubted = doubted
        self._holder = identity.holder
        self._policy = policy
        self._chunk_port = chunk_port
        self._chunk_tls = chunk_tls
        self._probe = ProbeTarget()
        if policy.attaches:
            allow_attaching()
        self._device_probe: DeviceProbeTarget | None = None
        self._no_device_read = "the settings of the holder (MX_TRANSPORT, UCX_TLS) leave cuda_ipc out"
        if self._holder.placement.device_type != "cpu" and policy.maps_devices:
            self._device_probe, self._no_device_read = device_offer(self._holder.placement)
            if self._no_device_read:
                logger.info("workers on this machine get no chunks by cuda_ipc: %s", self._no_device_read)
        self._streams = threading.BoundedSemaphore(_STREAMS_A_READER * self._holder.most_readers)

    def close(self) -> None:
        """Frees the probe for other processes. Idempotent."""
        if self._device_probe is not None:
            self._device_probe.close()

    def GetLayout(  # type: ignore[override]  # noqa: N802 - see _serialised
        self, request: mx_pb2.GetLayoutRequest, context: grpc.ServicerContext
    ) -> bytes:
        self._identity.check(context, request.mx_source_id, request.worker_id)
        holder = self._holder
        if holder.draining:
            refuse(context, grpc.StatusCode.UNAVAILABLE, "this worker is leaving; ask another one")
        same = request.fingerprint == holder.layout.fingerprint
        known = request.known_digests == holder.digests.summary
        answer = mx_pb2.GetLayoutResponse(
            fingerprint=holder.layout.fingerprint,
            chunk_bytes=holder.chunks.chunk_bytes,
            digest_kind=holder.digests.kind,
            digests=b"" if known else holder.digests.values,
            digests_are_known=known,
            scalars=scalars_to_proto(holder.scalars),
            scalars_digest=scalars_digest(holder.scalars),
            transport=self._offer(),
            digest_origin=holder.origin.kind,
            received_from=holder.origin.received_from,
        ).SerializeToString()
        return answer if same else answer + self._identity.layout

    def _offer(self) -> mx_pb2.TransportOffer:
        offer = self._policy.to_proto(self._probe.to_proto())
        offer.chunk_port = self._chunk_port
        offer.chunk_tls = self._chunk_tls
        offer.rdma_device = offer.rdma_device and not self._holder.agent.failed
        if self._holder.placement.device_type != "cpu":  # another process does not reach it by its address
            offer.device_memory = True
            offer.same_host_read = False
            offer.ClearField("probe")
            offer.no_device_read = self._no_device_read
            if self._device_probe is not None:
                offer.staging_probe.CopyFrom(self._device_probe.to_proto())
        return offer

    def OpenTransfer(  # noqa: N802
        self, request: mx_pb2.OpenTransferRequest, context: grpc.ServicerContext
    ) -> mx_pb2.OpenTransferResponse:
        self._identity.check(context, request.mx_source_id, request.worker_id)
        holder = self._holder
        if request.fingerprint != holder.layout.fingerprint:
            refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "another layout: ask GetLayout for the difference")
        if request.operation == mx_pb2.OPERATION_SEND:
            return self._open_sending(request, context)
        if request.operation == mx_pb2.OPERATION_STAGE:
            return self._open_staging(request, context)
        on_device = holder.placement.device_type != "cpu"
        reads = request.operation == mx_pb2.OPERATION_READ
        attach = self._policy.allows("cma") and not (on_device or request.device_memory)
        rdma = self._policy.rdma_only or self._policy.reads_by_rdma
        if reads and not (attach or rdma):
            refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "a READ from this worker would not be one-sided")
        with _as_status(context):
            if reads:
                by_rdma = bool(request.nixl_metadata) and rdma
                holder.renew(request.lease_id).transport = "rdma" if by_rdma else "same-host"
            else:
                addresses = [extent.address for extent in request.extents]
                device = _device_of(context, request) if request.device_memory else None
                holder.open_transfer(request.lease_id, request.nixl_metadata, addresses, device)
            # Whoever has the metadata may write to the weights: only a reader that READs by an agent is given it.
            by_agent = reads and request.nixl_metadata and rdma
            metadata = holder.agent.session().metadata() if by_agent else b""
        placement = holder.placement
        return mx_pb2.OpenTransferResponse(
            nixl_metadata=metadata,
            agent_name=holder.agent.name,
            extents=()
            if not reads
            else (
                mx_pb2.Extent(address=address, device_id=device)
                for address, device in zip(placement.addresses, placement.device_indices, strict=True)
            ),
            operation=request.operation,
            device_memory=on_device,
            lease_ms=int(holder.lease_seconds * 1000),
        )

    def _open_sending(
        self, request: mx_pb2.OpenTransferRequest, context: grpc.ServicerContext
    ) -> mx_pb2.OpenTransferResponse:
        if not self._chunk_port:
            refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "this worker has no chunk port")
        with _as_status(context):
            token = self._holder.open_sending(request.lease_id)
        return mx_pb2.OpenTransferResponse(
            operation=request.operation, token=token, lease_ms=int(self._holder.lease_seconds * 1000)
        )

    def _open_staging(
        self, request: mx_pb2.OpenTransferRequest, context: grpc.ServicerContext
    ) -> mx_pb2.OpenTransferResponse:
        if self._device_probe is None:
            refuse(context, grpc.StatusCode.FAILED_PRECONDITION, f"no cuda_ipc: {self._no_device_read}")
        with _as_status(context):
            staging = self._holder.open_staging(request.lease_id)
        lease_ms = int(self._holder.lease_seconds * 1000)
        return mx_pb2.OpenTransferResponse(operation=request.operation, staging=staging, lease_ms=lease_ms)

    def StageChunk(  # noqa: N802
        self, request: mx_pb2.StageChunkRequest, context: grpc.ServicerContext
    ) -> mx_pb2.StageChunkResponse:
        with _as_status(context):
            self._holder.renew(request.lease_id)
            self._holder.staging.fill(request.lease_id, request.chunk, request.slot)
        return mx_pb2.StageChunkResponse()

    def AskChunks(  # noqa: N802
        self, request: mx_pb2.AskChunksRequest, context: grpc.ServicerContext
    ) -> mx_pb2.AskChunksResponse:
        count = len(self._holder.chunks)
        with _as_status(context):
            self._holder.renew(request.lease_id)  # before anything of a stranger is parsed
            wanted = ChunkRequest(
                set_from_bytes(request.wanted, count), set_from_bytes(request.preferred, count), request.most
            )
            answer = self._holder.ask(
                request.lease_id,
                wanted,
                request.known_version,
                min(request.wait_ms, _LONGEST_WAIT_MS) / 1000,
                request.declined,
            )
        known = answer.complete or answer.version == request.known_version
        return mx_pb2.AskChunksResponse(
            granted=answer.granted,
            version=answer.version,
            complete=answer.complete,
            have=b"" if known else set_to_bytes(answer.have, count),
            leaving=answer.leaving,
            pause_ms=round(answer.pause_seconds * 1000 + 0.5) if answer.pause_seconds else 0,
        )

    def PushChunks(  # noqa: N802
        self, request: mx_pb2.PushChunksRequest, context: grpc.ServicerContext
    ) -> Iterator[mx_pb2.ChunkResult]:
        if not self._streams.acquire(blocking=False):
            refuse(
                context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._holder.most_readers} receivers are being served"
            )
        try:
            with _as_status(context):
                notify = request.notify and self._holder.agent.notifies
                written = self._holder.push(
                    request.lease_id, request.chunks, lambda: not context.is_active(), notify=notify
                )
                if notify and (chunks := list(written)):
                    yield mx_pb2.ChunkResult(chunk=chunks[0], others=chunks[1:], written=True)
                for chunk in written:
                    yield mx_pb2.ChunkResult(chunk=chunk, written=True)
        finally:
            self._streams.release()

    def DoubtChunks(  # noqa: N802
        self, request: mx_pb2.DoubtChunksRequest, context: grpc.ServicerContext
    ) -> mx_pb2.DoubtChunksResponse:
        with _as_status(context):
            self._holder.renew(request.lease_id)
        self._doubted(request.chunks[:_MOST_DOUBTED])
        return mx_pb2.DoubtChunksResponse()

    def RenewLease(  # noqa: N802
        self, request: mx_pb2.RenewLeaseRequest, context: grpc.ServicerContext
    ) -> mx_pb2.RenewLeaseResponse:
        with _as_status(context):
            self._holder.renew(request.lease_id)
        return mx_pb2.RenewLeaseResponse(lease_ms=int(self._holder.lease_seconds * 1000))


class WorkerServer:
    """A holder's gRPC server; listens as soon as it exists.

    `host` is what others reach this worker by, `loopback` keeps the listener off other interfaces. A port in use
    (or 0) becomes a free one: `endpoint` has the real one. Encrypted where this worker has a certificate
    (MX_TLS_CERT_FILE). Host memory is sent from `chunk_port` (0: any), unless the settings leave that to NIXL; by TLS
    too, but for `chunk_tls` False. `doubted` is called with chunks that a reader refused, on a thread of a call.
    Raises SettingError when there is no port, or the certificate cannot be used.
    """

    def __init__(
        self,
        holder: Holder,
        policy: UcxPolicy,
        *,
        source_id: str,
        worker_id: str,
        worker_rank: int,
        accelerator: str,
        host: str,
        port: int,
        chunk_port: int = 0,
        loopback: bool = False,
        doubted: Callable[[Sequence[int]], None] = lambda chunks: None,
        chunk_tls: bool = True,
    ) -> None:
        identity = WorkerIdentity(holder, source_id, worker_id, worker_rank, accelerator)
        threads = _STREAMS_A_READER * holder.most_readers + _SPARE_THREADS
        self._server = grpc.server(
            futures.ThreadPoolExecutor(threads, thread_name_prefix="mx-worker-service"),
            options=_server_options(holder),
            maximum_concurrent_rpcs=2 * threads,
        )
        listen = _bracketed(host) if loopback else "[::]"
        tls = worker_tls()
        self.port = _bind(self._server, listen, port, server_credentials(tls) if tls else None)
        worker = _WorkerService(identity)
        p2p_pb2_grpc.add_WorkerServiceServicer_to_server(worker, self._server)
        self._chunks: ChunkListener | None = None
        if policy.sends and holder.placement.device_type == "cpu":
            context = chunk_server_context(tls) if tls and chunk_tls else None
            self._chunks = ChunkListener(holder, host.strip("[]") if loopback else "", chunk_port, context)
        port = self._chunks.port if self._chunks else 0
        self._transfers = _TransferService(identity, policy, port, doubted, chunk_tls=bool(tls and chunk_tls))
        mx_pb2_grpc.add_TransferServiceServicer_to_server(self._transfers, self._server)
        _serialised(self._server, worker, self._transfers)
        health_pb2_grpc.add_HealthServicer_to_server(_Health(holder), self._server)
        self.advertise(host)
        self._server.start()

    def advertise(self, host: str) -> None:
        """From now on others are told to call `host`; it listens where it did."""
        self.endpoint = f"{_bracketed(host)}:{self.port}"

    def stop(self) -> None:
        """Ends all calls, and accepts no more connections. Idempotent."""
        if self._chunks is not None:
            self._chunks.close()
        self._server.stop(_STOP_GRACE_SECONDS).wait(_STOP_SECONDS)
        self._transfers.close()


def _server_options(holder: Holder) -> list[tuple[str, int]]:
    """Those of all servers, but no message is longer than a reader's longest: OpenTransfer's, or all chunks' numbers.

    With the bound on calls this is what strangers can make the process hold; and the windows for what is on its way
    stay at HTTP/2's 64 KiB. gRPC makes them as large as it finds the network to be fast, which a stranger that sends
    what is refused unread turned into 40 MiB; nothing that workers are sent needs it.
    """
    extents, chunks = len(holder.layout.extent_bytes), len(holder.chunks)
    longest_bytes = _MESSAGE_BYTES + _EXTENT_MESSAGE_BYTES * extents + _CHUNK_MESSAGE_BYTES * chunks
    name = "grpc.max_receive_message_length"
    others = [option for option in channel_options() if option[0] != name]
    return [*others, (name, longest_bytes), ("grpc.http2.bdp_probe", 0)]


def _bind(server: grpc.Server, listen: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    for candidate in dict.fromkeys((port if _is_free(listen, port) else 0, 0)):
        try:
            place = f"{listen}:{candidate}"
            bound = server.add_secure_port(place, credentials) if credentials else server.add_insecure_port(place)
        except RuntimeError:  # what grpcio raises for a port that is in use after all
            bound = 0
        if bound:
            if bound != port and port:
                logger.info("port %d is in use: this worker serves on %d and advertises that", port, bound)
            return int(bound)
    raise SettingError(f"no port to listen on at {listen}; check MX_WORKER_HOST")


def _is_free(listen: str, port: int) -> bool:
    """Whether nobody listens there; grpcio finds that out as well, but logs an error of its own."""
    if port > _LAST_PORT:  # of a high rank
        return False
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(listen.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as grpcio: connections that ended don't count
            probe.bind(place)
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


@contextlib.contextmanager
def _as_status(context: grpc.ServicerContext) -> Iterator[None]:
    try:
        yield
    except HolderDraining as error:
        refuse(context, grpc.StatusCode.UNAVAILABLE, str(error))
    except HolderBusy as error:
        refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    except LeaseEnded as error:
        refuse(context, grpc.StatusCode.NOT_FOUND, str(error))
    except ValueError as error:
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except (TransferError, CudaError) as error:
        refuse(context, grpc.StatusCode.ABORTED, str(error))
