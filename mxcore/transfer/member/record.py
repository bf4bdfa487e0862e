"""This worker's record at the server: published, kept alive by heartbeats, left to a newer process of this worker."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from mxcore.transfer.member.heartbeat import Heartbeat
from mxcore.transfer.member.refusals import PendingRefusals
from mxcore.transfer.receive import LoadReporter, logged
from mxcore.transfer.serve import Origin
from mxserver.wire import ServerRefused, ServerUnreachable, StaleEpoch, WireError
from mxserver.wire.calls import ServerClient, source_id
from mxserver.wire.proto import load_pb2, mx_pb2, p2p_pb2

__all__ = ["Names", "Served", "WorkerRecord"]

logger = logging.getLogger(__name__)

_SILENT_SECONDS = 60.0  # then it is asked again, whether or not a heartbeat got through meanwhile


class _SilentServers:
    """Servers that gave no answer within a call's deadline: of this process nobody else waits for one. Thread-safe."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}  # address -> monotonic; each change is atomic

    def gave_none(self, address: str) -> None:
        self._until[address] = time.monotonic() + _SILENT_SECONDS

    def answered(self, address: str) -> None:
        self._until.pop(address, None)

    def __contains__(self, address: str) -> bool:
        return self._until.get(address, 0.0) > time.monotonic()


_silent_servers = _SilentServers()


class Served(NamedTuple):
    """What a worker's record says that it serves; empty while it serves nothing."""

    agent_name: str = ""
    endpoint: str = ""  # host:port of its gRPC services
    readers: int | None = None  # leases that are taken
    origin: Origin | None = None  # who vouches for the bytes
    signed_manifest: str = ""  # what they were verified against


class Names(NamedTuple):
    """Where people find this worker; empty where that is not known. `replica` is the engine of which it is a rank."""

    pod: str = ""
    node: str = ""
    replica: str = ""


class WorkerRecord:
    """The record under (source id, worker id, rank), with the epoch that the server gave it last. Thread-safe.

    `served` is called at each publish and heartbeat, `topology` (where the worker is) and `names` at each publish,
    `superseded_by_newer` on the heartbeat's thread when a newer process of this worker has taken over the record: then
    nothing more is written. Without a client nothing is published at all.
    """

    def __init__(
        self,
        client: ServerClient | None,
        identity: p2p_pb2.SourceIdentity,
        worker_id: str,
        worker_rank: int,
        accelerator: str,
        *,
        heartbeat_interval_seconds: float,
        served: Callable[[], Served],
        topology: Callable[[], Mapping[str, str]],
        superseded_by_newer: Callable[[], None],
        names: Callable[[], Names] = Names,
    ) -> None:
        self.identity = p2p_pb2.SourceIdentity()
        self.identity.CopyFrom(identity)
        self.loads = LoadReporter(self._tell_progress)
        self.refusals = PendingRefusals()
        self._client = client
        self._worker_id = worker_id
        self._worker_rank = worker_rank
        self._accelerator = accelerator
        self._served = served
        self._topology = topology
        self._names = names
        self._superseded_by_newer = superseded_by_newer
        self._calls = threading.RLock()  # around calls to the server, one after the other; the identity changes within
        self._lock = threading.Lock()  # of what follows; never held during a call, which may take its whole deadline
        self._status = p2p_pb2.SOURCE_STATUS_INITIALIZING
        self._epoch = 0
        self._version = 0  # of what is to be published, and of what was
        self._published_version: int | None = None
        self._superseded = False
        self._heartbeat = Heartbeat(heartbeat_interval_seconds, self._beat)

    @property
    def source_id(self) -> str:
        """The identity's mx_source_id."""
        return source_id(self.identity)

    @property
    def server_is_silent(self) -> bool:
        """Whether the server lately gave no answer within the deadline. Heartbeats go on asking it."""
        return self._client is not None and self._client.address in _silent_servers

    @property
    def published(self) -> bool:
        """Whether the server has the record as it is."""
        return self._published_version == self._version

    @property
    def superseded(self) -> bool:
        """Whether a newer process of this worker took it over."""
        return self._superseded

    @property
    def ready(self) -> bool:
        """Whether its status is READY, published or not."""
        return self._status == p2p_pb2.SOURCE_STATUS_READY

    def keep(self) -> bool:
        """Publishes it, and keeps it alive from now on; False, logged, when the server does not answer. Idempotent.

        One that is silent is not waited for: the next heartbeat publishes, which is at once.
        """
        if not self.server_is_silent:
            try:
                self.publish()
            except WireError as error:
                logger.warning("this worker is not known to the server yet: %s", error)
        if published := self.published:
            self._heartbeat.start()
        else:
            self._heartbeat.start(soon=True)
            self._heartbeat.soon()
        return published

    def publish(self) -> None:
        """Writes the whole record. Raises WireError; StaleEpoch when a newer process has taken it over."""
        if self._client is None:
            return
        with self._calls:
            with self._lock:
                if self._superseded:
                    return
                version, status, epoch = self._version, self._status, self._epoch
            served, names = self._served(), self._names()
            worker = p2p_pb2.WorkerMetadata(
                worker_rank=self._worker_rank,
                status=status,
                agent_name=served.agent_name,
                worker_grpc_endpoint=served.endpoint,
                accelerator=self._accelerator,
                topology=self._topology(),
                digest_origin=served.origin.kind if served.origin is not None else mx_pb2.DIGEST_ORIGIN_UNKNOWN,
                received_from=served.origin.received_from if served.origin is not None else (),
                signed_manifest=served.signed_manifest,
                pod_name=names.pod,
                node_name=names.node,
                replica=names.replica,
            )
            is_ready = status == p2p_pb2.SOURCE_STATUS_READY
            report = self.loads.report() if is_ready else None
            with self._listening():
                answer = self._client.publish(self.identity, worker, self._worker_id, epoch, load_report=report)
            if report is not None:
                self.loads.reported(report)
            with self._lock:
                self._epoch = answer.epoch
                self._published_version = version
            self._heartbeat.limit(answer.lease_ms / 1000)
            if is_ready and (not answer.epoch or self.refusals.pending()):  # other servers ignore a publish's status
                self._update_status()

    def mark_ready(self) -> None:
        """The next `keep` publishes READY."""
        with self._lock:
            self._status = p2p_pb2.SOURCE_STATUS_READY
            self._version += 1

    def unmark_ready(self) -> None:
        """The next heartbeat or publish says that it is no longer READY."""
        with self._lock:
            if self.ready:
                self._status = p2p_pb2.SOURCE_STATUS_INITIALIZING

    def mark_changed(self) -> bool:
        """Has the next heartbeat publish the whole record. Returns whether it was published as it was."""
        with self._lock:
            before = self.published
            self._version += 1
            return before

    def change_identity(self, identity: p2p_pb2.SourceIdentity) -> None:
        """Continues with other weights: says goodbye under the old source id, and publishes under the new one."""
        with self._calls:
            if source_id(identity) == self.source_id:
                return
            again, status = self.published, self._status
            if again:
                self.goodbye()
            with self._lock:
                self._status = status
                self.identity.CopyFrom(identity)
                self._epoch = 0
                self._version += 1
        if again:
            self.keep()

    def goodbye(self) -> None:
        """Publishes STALE, if the record is published and still ours. Never raises."""
        with self._calls:
            with self._lock:
                if not self.published or self._superseded or self._status == p2p_pb2.SOURCE_STATUS_STALE:
                    return
                self._status = p2p_pb2.SOURCE_STATUS_STALE
            with logged("saying goodbye to the server"):
                self._update_status(self.loads.report())

    def tell_doubt(self, kind: mx_pb2.DoubtKind.ValueType, holders: Collection[str], chunks: int, text: str) -> None:
        """Tells the server whose bytes are doubted; it keeps that for people to see. Never raises."""
        if self._client is None:
            return
        doubt = mx_pb2.Doubt(
            kind=kind,
            mx_source_id=self.source_id,
            worker_rank=self._worker_rank,
            worker_id=self._worker_id,
            holders=sorted(holders),
            chunks=chunks,
            text=text,
        )
        with logged("telling the server of a doubt"):
            self._client.tell_doubt(doubt)

    def tell_doubt_soon(
        self, kind: mx_pb2.DoubtKind.ValueType, holders: Collection[str], chunks: int, text: str
    ) -> None:
        """As `tell_doubt`, on a thread of its own: a receive does not wait for that."""
        threading.Thread(
            target=self.tell_doubt, args=(kind, list(holders), chunks, text), name="mx-doubt", daemon=True
        ).start()

    def end(self) -> None:
        """Stops heartbeats and reports of loads; `goodbye` may follow. Idempotent."""
        self.loads.close()
        self._heartbeat.stop()

    def _update_status(self, report: load_pb2.LoadReport | None = None) -> None:
        if self._client is not None:
            readers = self._served().readers
            load = float(readers) if readers is not None else None
            key = (self.source_id, self._worker_id, self._worker_rank)
            refusals = self.refusals.pending()
            with self._lock:
                status, epoch = self._status, self._epoch
            with self._listening():
                self._client.update_status(
                    *key, status, epoch=epoch, source_load=load, load_report=report, refusals=refusals
                )
            self.refusals.told(refusals)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Around a call: notes whether the server answers."""
        address = self._client.address if self._client is not None else ""
        try:
            yield
        except ServerUnreachable as error:
            if error.late:
                _silent_servers.gave_none(address)
            raise
        except WireError:
            _silent_servers.answered(address)
            raise
        _silent_servers.answered(address)

    def _tell_progress(self, progress: load_pb2.LoadProgress) -> float:
        """On the thread of the loads' reporter. Raises WireError."""
        with self._lock:
            if self._client is None or not self.published or self._superseded:
                return 0.0
            source, epoch = self.source_id, self._epoch
        return self._client.tell_progress(source, self._worker_id, self._worker_rank, progress, epoch=epoch)

    def _beat(self) -> None:
        """One heartbeat, on the heartbeat's thread. Raises WireError when it did not get through."""
        try:
            with self._calls:
                if self._superseded:
                    return
                if not self.published:
                    self.publish()
                    return
                try:
                    self._update_status()
                except StaleEpoch:
                    raise
                except ServerRefused as error:
                    logger.warning("the server has lost this worker's record (%s); it is published again", error)
                    with self._lock:
                        self._published_version = None
                    self.publish()
        except StaleEpoch as error:
            logger.error(
                "a newer process of worker %s has taken over: this one stops serving (%s)", self._worker_id, error
            )
            self._superseded = True
            self._heartbeat.stop()
            self._superseded_by_newer()
