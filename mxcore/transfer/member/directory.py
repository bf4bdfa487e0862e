"""The workers that weights can be taken from: what the server lists, with each worker's endpoint."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from mxcore.transfer.member.differences import differences
from mxcore.transfer.member.place import Place
from mxcore.transfer.move import Source
from mxserver.wire import WireError
from mxserver.wire.calls import ServerClient, canonical_json, source_id
from mxserver.wire.proto import p2p_pb2, watch_pb2

__all__ = ["CHECKPOINT_PARAMETER", "Directory", "differs_least", "equal_but_for_files"]

logger = logging.getLogger(__name__)

CHECKPOINT_PARAMETER = "checkpoint"
"""The extra parameter with the digest of the weight files; empty for a worker that has none."""

_ENDPOINT_SECONDS = 5.0  # before a record is asked for again, unless it was updated
_CANDIDATES = 16  # of each status: workers whose records are asked for
_NEAREST = 4  # workers with other identities whose records are compared with this one's


class Directory:
    """Lists holders of one rank, except this worker and those that its `place` does not allow. Thread-safe.

    All calls raise WireError. Our server lists the nearest with their endpoints, in one call; of one that does not say
    where they are, each record is asked for. With a `signed_manifest` each record is asked for too, and those alone are
    listed whose records name it; the others are named in a warning, once.
    """

    def __init__(
        self,
        client: ServerClient,
        worker_id: str,
        worker_rank: int,
        place: Callable[[], Place],
        signed_manifest: str = "",
    ) -> None:
        self._client = client
        self._place = place
        self._told_problem = False
        self._worker_id = worker_id
        self._worker_rank = worker_rank
        self._signed_manifest = signed_manifest
        self._lock = threading.Lock()
        self._endpoints: dict[tuple[str, str], tuple[str, int, float]] = {}  # with the record's time, and until when
        self._told_unsigned: set[tuple[str, str]] = set()  # worker and manifest of a warning
        self._refused: set[str] = set()  # checkpoints of the last warning, none of which was taken

    def ready(self, identity: p2p_pb2.SourceIdentity) -> list[Source]:
        """Complete holders with exactly this identity, the nearest first, of these the least loaded."""
        return self._listed(identity, p2p_pb2.SOURCE_STATUS_READY)

    def receiving(self, identity: p2p_pb2.SourceIdentity) -> list[Source]:
        """Workers with this identity that serve what they have received so far."""
        return self._listed(identity, p2p_pb2.SOURCE_STATUS_INITIALIZING)

    def _listed(self, identity: p2p_pb2.SourceIdentity, status: p2p_pb2.SourceStatus.ValueType) -> list[Source]:
        place = self._place()
        if not self._knows(place):
            return []
        near = place.near(self._worker_id or "reader")
        refs = self._client.list_sources(
            identity, status=status, worker_rank=self._worker_rank, limit=_CANDIDATES, near=near
        )
        return self._sources(refs, place, receiving=status == p2p_pb2.SOURCE_STATUS_INITIALIZING)

    def told(self, now: watch_pb2.SourcesNow) -> list[Source]:
        """The holders of what the server tells on a stream, as `holders` lists them."""
        place = self._place()
        if not self._knows(place):
            return []
        return [
            *self._sources(now.ready, place, receiving=False),
            *self._sources(now.receiving, place, receiving=True),
        ]

    def watch_request(
        self, identity: p2p_pb2.SourceIdentity, *, wants_turn: bool = False
    ) -> watch_pb2.WatchSourcesRequest:
        """What the server is to tell this worker on a stream."""
        place = self._place()
        near = place.near(self._worker_id or "reader")
        return watch_pb2.WatchSourcesRequest(
            mx_source_id=source_id(identity),
            worker_rank=self._worker_rank,
            worker_id=near.worker_id,
            topology=near.topology,
            levels=near.levels,
            limit=_CANDIDATES,
            domain=place.domain,
            wants_turn=wants_turn,
        )

    def _knows(self, place: Place) -> bool:
        """Whether it is known where this worker may take weights from; if not, a warning says so, once."""
        if place.problem:
            logger.log(logging.DEBUG if self._told_problem else logging.WARNING, "%s", place.problem)
            self._told_problem = True
        return not place.problem

    def _sources(self, refs: Iterable[p2p_pb2.SourceInstanceRef], place: Place, *, receiving: bool) -> list[Source]:
        found = [self._source(ref, place, receiving=receiving) for ref in refs if place.allows(ref.topology)]
        # The server's order among equals stays.
        return sorted((source for source in found if source is not None), key=lambda s: (s.distance, s.load))

    def holders(self, identity: p2p_pb2.SourceIdentity) -> list[Source]:
        """Complete ones, then those that are receiving."""
        return [*self.ready(identity), *self.receiving(identity)]

    def ranks(self, identity: p2p_pb2.SourceIdentity, *, ready: bool) -> set[int]:
        """Ranks of the workers with this identity that are READY, or (not `ready`) READY or INITIALIZING."""
        statuses = [p2p_pb2.SOURCE_STATUS_READY, *([] if ready else [p2p_pb2.SOURCE_STATUS_INITIALIZING])]
        refs = [ref for status in statuses for ref in self._client.list_sources(identity, status=status)]
        return {ref.worker_rank for ref in refs}

    def differs_least(self, identity: p2p_pb2.SourceIdentity) -> str:
        """As the function of this name; empty if the server does not say. Raises nothing."""
        try:
            return differs_least(self._client, identity, self._worker_rank, self._worker_id)
        except WireError as error:
            logger.debug("who else has %s is not known: %s", identity.model_name, error)
            return ""

    def fitting(self, identity: p2p_pb2.SourceIdentity) -> p2p_pb2.SourceIdentity | None:
        """The identity of complete holders that equals `identity` in all but the checkpoint.

        None when there is none, or when there are several, which a worker without weight files cannot choose from: a
        warning says so, once for the same ones.
        """
        place = self._place()
        refs = self._client.list_sources(
            model_name=identity.model_name,
            status=p2p_pb2.SOURCE_STATUS_READY,
            worker_rank=self._worker_rank,
            limit=_CANDIDATES,
            near=place.near(self._worker_id),
        )
        ours = _without_checkpoint(identity)
        found: dict[str, p2p_pb2.SourceIdentity] = {}
        for ref in refs:
            if ref.worker_id == self._worker_id or not place.allows(ref.topology):
                continue
            record = self._client.get_metadata(ref.mx_source_id, ref.worker_id)
            if record is None or not record.worker.worker_grpc_endpoint or not self._is_signed(record):
                continue
            if _without_checkpoint(record.identity) == ours:
                found[record.identity.extra_parameters[CHECKPOINT_PARAMETER]] = record.identity
        told, self._refused = self._refused, set(found) if len(found) > 1 else set()
        if len(found) > 1:
            logger.log(
                logging.DEBUG if self._refused == told else logging.WARNING,  # a target looks every second
                "sources of %s have %d different checkpoints (%s) and this worker has no weight files to tell which "
                "is meant: none is taken. Give it the weight files, or stop the other sources",
                identity.model_name,
                len(found),
                ", ".join(sorted(found)),
            )
            return None
        return next(iter(found.values()), None)

    def _source(self, ref: p2p_pb2.SourceInstanceRef, place: Place, *, receiving: bool) -> Source | None:
        if ref.worker_id == self._worker_id:
            return None
        told = ref.HasField("worker_grpc_endpoint") and not self._signed_manifest
        endpoint = ref.worker_grpc_endpoint if told else self._endpoint(ref)
        if not endpoint:
            return None
        return Source(
            source_id=ref.mx_source_id,
            worker_id=ref.worker_id,
            worker_rank=ref.worker_rank,
            endpoint=endpoint,
            updated_at_ms=ref.updated_at,
            load=ref.source_load,
            receiving=receiving,
            owner=ref.owner,
            distance=place.distance(ref.topology),
        )

    def _endpoint(self, ref: p2p_pb2.SourceInstanceRef) -> str:
        """Its endpoint by its record, for a server that lists none; empty: it serves nothing that may be taken."""
        key = (ref.mx_source_id, ref.worker_id)
        with self._lock:
            endpoint, told_ms, until = self._endpoints.get(key, ("", 0, 0.0))
        if until < time.monotonic() or told_ms != ref.updated_at:  # it may have stopped serving, or moved
            record = self._client.get_metadata(ref.mx_source_id, ref.worker_id)
            if record is None or not self._is_signed(record):
                return ""
            endpoint = record.worker.worker_grpc_endpoint
            if endpoint:
                with self._lock:
                    self._endpoints[key] = (endpoint, ref.updated_at, time.monotonic() + _ENDPOINT_SECONDS)
        return endpoint

    def _is_signed(self, record: p2p_pb2.GetMetadataResponse) -> bool:
        """Whether what it serves was verified against the manifest that this worker trusts, as its record says."""
        named = record.worker.signed_manifest
        if not self._signed_manifest or named == self._signed_manifest:
            return True
        key = (record.worker_id, named)
        with self._lock:
            known = key in self._told_unsigned
            self._told_unsigned.add(key)
        if not known:
            logger.warning(
                "worker %s (%s) is refused: its weights were verified against %s, this worker trusts the manifest %s",
                record.worker_id,
                record.worker.worker_grpc_endpoint,
                f"manifest {named}" if named else "no signature",
                self._signed_manifest,
            )
        return False


def differs_least(client: ServerClient, identity: p2p_pb2.SourceIdentity, worker_rank: int, worker_id: str = "") -> str:
    """`worker W has …`: in what complete holders of this model and rank differ, of the one that differs least.

    Empty if there is none that differs; `worker_id` is left out. Raises WireError.
    """
    refs = client.list_sources(
        model_name=identity.model_name, status=p2p_pb2.SOURCE_STATUS_READY, worker_rank=worker_rank, limit=_NEAREST
    )
    others = {ref.worker_id: ref.mx_source_id for ref in refs if ref.worker_id != worker_id}
    records = {name: client.get_metadata(source, name) for name, source in others.items()}
    found = [
        (len(told), f"worker {name} has {', '.join(told)}")
        for name, record in records.items()
        if record is not None and (told := differences(record.identity, identity))
    ]
    return min(found, default=(0, ""))[1]


def equal_but_for_files(client: ServerClient, identity: p2p_pb2.SourceIdentity, worker_rank: int) -> int:
    """How many READY workers of a rank have an identity that equals this one in all but the weight files.

    Of the newest ones. Raises WireError.
    """
    refs = client.list_sources(
        model_name=identity.model_name, status=p2p_pb2.SOURCE_STATUS_READY, worker_rank=worker_rank, limit=_NEAREST
    )
    records = [client.get_metadata(ref.mx_source_id, ref.worker_id) for ref in refs]
    ours = _without_checkpoint(identity)
    return sum(record is not None and _without_checkpoint(record.identity) == ours for record in records)


def _without_checkpoint(identity: p2p_pb2.SourceIdentity) -> str:
    copy = p2p_pb2.SourceIdentity()
    copy.CopyFrom(identity)
    copy.extra_parameters.pop(CHECKPOINT_PARAMETER, None)
    return canonical_json(copy)
