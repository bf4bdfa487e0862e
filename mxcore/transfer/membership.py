"""One worker's life in a fleet: join, find sources, receive, serve, drain, leave."""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence

from mxcore.errors import TransferError
from mxcore.settings import WorkerSettings
from mxcore.transfer.agent_session import AgentSession, require_host_memory
from mxcore.transfer.chunks import CHUNK_BYTES
from mxcore.transfer.heartbeat import Heartbeat
from mxcore.transfer.holder import LEASE_SECONDS, Holder
from mxcore.transfer.layout import Layout, Placement
from mxcore.transfer.receiver import Progress, Receiver, ReceiveReport
from mxcore.transfer.source_client import Source
from mxcore.transfer.transports import UcxPolicy
from mxcore.transfer.worker_service import WorkerServer
from mxserver.wire import p2p_pb2
from mxserver.wire.client import ServerClient
from mxserver.wire.errors import MxError, ServerRefused, StaleEpoch, WireError
from mxserver.wire.source_id import canonical_json, source_id

__all__ = ["CHECKPOINT_PARAMETER", "PROTOCOL_VERSION", "Membership"]

logger = logging.getLogger(__name__)

PROTOCOL_VERSION = "mx-1"
"""`mx_version` of our identities: workers of any release of ours that speaks this exchange weights."""

CHECKPOINT_PARAMETER = "checkpoint"
"""The extra parameter with the digest of the weight files; empty for a worker that has none."""

_CANDIDATES = 16  # sources whose records are asked for


class Membership:
    """This worker's record at the server, and what it serves. Thread-safe; leave it with `close`.

    No call raises because the server cannot be reached: that is logged once, and the heartbeat goes on trying.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        identity: p2p_pb2.SourceIdentity,
        worker_rank: int,
        accelerator: str,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.settings = settings
        self.worker_rank = worker_rank
        self.accelerator = accelerator
        self.worker_id = uuid.uuid4().hex
        self._identity = p2p_pb2.SourceIdentity()
        self._identity.CopyFrom(identity)
        self._chunk_bytes = chunk_bytes
        self._lease_seconds = lease_seconds
        self._policy = UcxPolicy.from_environment(settings.transport)
        self._client = (
            ServerClient(settings.server_address, timeout_seconds=settings.server_timeout_seconds)
            if settings.server_address
            else None
        )
        self._lock = threading.RLock()  # over the record: what is published, and whether it still is ours
        self._status = p2p_pb2.SOURCE_STATUS_INITIALIZING
        self._epoch = 0
        self._published = False
        self._superseded = False
        self._closed = False
        self._holder: Holder | None = None
        self._server: WorkerServer | None = None
        self._heartbeat = Heartbeat(settings.heartbeat_interval_seconds, self._beat)

    @property
    def identity(self) -> p2p_pb2.SourceIdentity:
        """What this worker's weights are; changes when `find_sources` adopts a checkpoint."""
        return self._identity

    @property
    def source_id(self) -> str:
        """The identity's mx_source_id."""
        return source_id(self._identity)

    @property
    def endpoint(self) -> str | None:
        """host:port of this worker's gRPC services while it serves."""
        server = self._server
        return server.endpoint if server is not None else None

    @property
    def superseded(self) -> bool:
        """Whether a newer life of this worker took over its record; it serves nothing then."""
        return self._superseded

    def join(self) -> bool:
        """Publishes this worker as INITIALIZING and keeps that alive; False, logged, without a server.

        Idempotent. The record is published later when the server becomes reachable.
        """
        if self._client is None:
            logger.warning("no server is set (MODEL_EXPRESS_URL or MX_SERVER_ADDRESS): weights come from storage")
            return False
        try:
            self._publish()
        except WireError as error:
            logger.warning("this worker is not known to the server yet: %s", error)
        with self._lock:
            if not self._closed:
                self._heartbeat.start(soon=not self._published)
            return self._published

    def find_sources(self, *, match_any_checkpoint: bool = False) -> list[Source]:
        """READY holders of this worker's rank with its identity, the least loaded first, then the newest.

        With `match_any_checkpoint`, this worker has no weight files to tell checkpoints apart: holders that are
        equal in everything else are taken if they all have one checkpoint, which becomes this worker's.
        """
        if self._client is None:
            return []
        try:
            return self._adopt(self._client) if match_any_checkpoint else self._list(self._client)
        except WireError as error:
            logger.warning("sources cannot be listed: %s", error)
            return []

    def receive(
        self,
        layout: Layout,
        placement: Placement,
        scalars: Mapping[str, float],
        sources: Sequence[Source],
        progress: Progress | None = None,
    ) -> ReceiveReport:
        """Fills the memory at `placement` from `sources`, tried in turn; every chunk is verified.

        `scalars`: this worker's own, of which only the names count. Raises TransferError; then the memory holds
        anything, and nothing arrives in it any more.
        """
        receiver = Receiver(
            layout,
            placement,
            settings=self.settings,
            worker_id=self.worker_id,
            scalar_names=sorted(scalars),
            progress=progress,
            chunk_bytes=self._chunk_bytes,
        )
        return receiver.receive(sources)

    def serve(
        self,
        layout: Layout,
        placement: Placement,
        scalars: Mapping[str, float],
        digests: bytes | None = None,
        keep_alive: object = None,
    ) -> None:
        """Serves the memory at `placement` until `close`, and publishes this worker as READY.

        `digests`: those of a ReceiveReport; without them they are computed. `keep_alive` is held until nobody reads
        any more. Serving twice is an error of the caller.

        Raises:
            LayoutUnsupported, NixlMissing, NixlError, SettingError: nothing is served.
        """
        require_host_memory(placement)
        with self._lock:
            if self._closed or self._superseded or self._holder is not None:
                raise TransferError(f"worker {self.worker_id} is serving already, or has left")
            self._holder = Holder(
                layout,
                placement,
                AgentSession(
                    self.worker_id,
                    tls=self._policy.tls,
                    backend=self.settings.nixl_backend,
                    stall_timeout_seconds=self.settings.stall_timeout_seconds,
                ),
                scalars=scalars,
                digests=digests,
                keep_alive=keep_alive,
                chunk_bytes=self._chunk_bytes,
                lease_seconds=self._lease_seconds,
            )
            try:
                self._server = self._listen(self._holder)
            except MxError:
                self._holder.close()
                self._holder = None
                raise
            self._status = p2p_pb2.SOURCE_STATUS_READY
        logger.info("worker %s serves %d bytes at %s", self.worker_id, layout.total_bytes, self._server.endpoint)
        self.join()

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Takes no new readers and waits for those that read; False when some did not end in time. Idempotent."""
        self._goodbye()
        holder = self._holder
        if holder is None:
            return True
        return holder.drain(self.settings.drain_timeout_seconds if timeout_seconds is None else timeout_seconds)

    def close(self) -> None:
        """Drains, says goodbye (STALE), destroys the agent, lets go of the memory. Idempotent; never raises."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._heartbeat.stop()
        with _logged("draining"):
            self.drain()
        with _logged("stopping its services"):
            self._stop_serving()
        if self._client is not None:
            with _logged("closing its connection to the server"):
                self._client.close()

    def _list(self, client: ServerClient) -> list[Source]:
        refs = client.list_sources(
            self._identity, status=p2p_pb2.SOURCE_STATUS_READY, worker_rank=self.worker_rank, limit=_CANDIDATES
        )
        return [source for source, _ in self._records(client, refs)]

    def _adopt(self, client: ServerClient) -> list[Source]:
        refs = client.list_sources(
            model_name=self._identity.model_name,
            status=p2p_pb2.SOURCE_STATUS_READY,
            worker_rank=self.worker_rank,
            limit=_CANDIDATES,
        )
        ours = _without_checkpoint(self._identity)
        fitting = [
            (source, identity)
            for source, identity in self._records(client, refs)
            if _without_checkpoint(identity) == ours
        ]
        checkpoints = {identity.extra_parameters[CHECKPOINT_PARAMETER] for _, identity in fitting}
        if len(checkpoints) > 1:
            logger.warning(
                "sources of %s have %d different checkpoints (%s) and this worker has no weight files to tell which "
                "is meant: none is taken. Give it the weight files, or stop the other sources",
                self._identity.model_name,
                len(checkpoints),
                ", ".join(sorted(checkpoints)),
            )
            return []
        if fitting:
            self._change_identity(fitting[0][1])
        return [source for source, _ in fitting]

    def _records(
        self, client: ServerClient, refs: Sequence[p2p_pb2.SourceInstanceRef]
    ) -> list[tuple[Source, p2p_pb2.SourceIdentity]]:
        found = []
        for ref in refs:
            if ref.worker_id == self.worker_id:
                continue
            record = client.get_metadata(ref.mx_source_id, ref.worker_id)
            if record is None or not record.worker.worker_grpc_endpoint:
                continue
            source = Source(
                source_id=ref.mx_source_id,
                worker_id=ref.worker_id,
                worker_rank=ref.worker_rank,
                endpoint=record.worker.worker_grpc_endpoint,
                updated_at_ms=ref.updated_at,
                load=ref.source_load,
            )
            found.append((source, record.identity))
        return sorted(found, key=lambda pair: (pair[0].load, -pair[0].updated_at_ms))

    def _change_identity(self, identity: p2p_pb2.SourceIdentity) -> None:
        with self._lock:
            if source_id(identity) == self.source_id:
                return
            again = self._published
            if again:
                status = self._status
                self._goodbye()
                self._status = status
            self._identity.CopyFrom(identity)
            self._epoch = 0
            self._published = False
        if again:
            self.join()

    def _listen(self, holder: Holder) -> WorkerServer:
        settings = self.settings
        return WorkerServer(
            holder,
            self._policy,
            source_id=self.source_id,
            worker_id=self.worker_id,
            worker_rank=self.worker_rank,
            accelerator=self.accelerator,
            host=settings.advertised_host(),
            port=settings.worker_grpc_port + self.worker_rank if settings.worker_grpc_port else 0,
            loopback=settings.shares_only_this_host,
        )

    def _publish(self) -> None:
        """Writes the whole record. Raises WireError; after StaleEpoch nothing is served any more."""
        if self._client is None:
            return
        with self._lock:
            if self._superseded:
                return
            worker = p2p_pb2.WorkerMetadata(
                worker_rank=self.worker_rank,
                status=self._status,
                agent_name=self._holder.session.name if self._holder is not None else "",
                worker_grpc_endpoint=self.endpoint or "",
                accelerator=self.accelerator,
            )
            answer = self._client.publish(self._identity, worker, self.worker_id, self._epoch)
            self._epoch = answer.epoch
            self._published = True
            self._heartbeat.limit(answer.lease_ms / 1000)
            if self._status == p2p_pb2.SOURCE_STATUS_READY:  # servers that leave the status of a publish aside
                self._update_status()

    def _update_status(self) -> None:
        if self._client is not None:
            load = float(self._holder.live_leases) if self._holder is not None else None
            self._client.update_status(
                self.source_id, self.worker_id, self.worker_rank, self._status, epoch=self._epoch, source_load=load
            )

    def _beat(self) -> None:
        """One heartbeat, on the heartbeat's thread. Raises WireError when it did not get through."""
        try:
            with self._lock:
                if self._closed or self._superseded:
                    return
                if not self._published:
                    self._publish()
                    return
                try:
                    self._update_status()
                except StaleEpoch:
                    raise
                except ServerRefused as error:
                    logger.warning("the server has lost this worker's record (%s); it is published again", error)
                    self._published = False
                    self._publish()
        except StaleEpoch as error:
            logger.error("a newer life of worker %s has taken over: this one stops serving (%s)", self.worker_id, error)
            self._superseded = True
            self._heartbeat.stop()
            with _logged("stopping its services"):
                if self._holder is not None:
                    self._holder.drain(self.settings.drain_timeout_seconds)
                self._stop_serving()

    def _goodbye(self) -> None:
        with self._lock:
            if not self._published or self._superseded or self._status == p2p_pb2.SOURCE_STATUS_STALE:
                return
            self._status = p2p_pb2.SOURCE_STATUS_STALE
            with _logged("saying goodbye to the server"):
                self._update_status()

    def _stop_serving(self) -> None:
        with self._lock:
            server, self._server = self._server, None
            holder = self._holder
        if server is not None:
            server.stop()
        if holder is not None:
            holder.close()


@contextlib.contextmanager
def _logged(step: str) -> Iterator[None]:
    """Leaving a fleet goes on whatever fails on the way."""
    try:
        yield
    except (MxError, OSError, RuntimeError, ValueError) as error:
        logger.warning("%s failed: %s", step, error)


def _without_checkpoint(identity: p2p_pb2.SourceIdentity) -> str:
    copy = p2p_pb2.SourceIdentity()
    copy.CopyFrom(identity)
    copy.extra_parameters.pop(CHECKPOINT_PARAMETER, None)
    return canonical_json(copy)
