"""One worker's life in a fleet: join, find sources, receive, serve, drain, leave."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from mxcore.errors import TransferError
from mxcore.settings import WorkerSettings
from mxcore.transfer.layout import CHUNK_BYTES, ChunkDigests, Layout, Placement, Scalars, all_chunks
from mxcore.transfer.member.directory import CHECKPOINT_PARAMETER, Directory
from mxcore.transfer.member.listening import listening
from mxcore.transfer.member.place import current_place
from mxcore.transfer.member.record import Names, Served, WorkerRecord
from mxcore.transfer.member.refusals import Refusal
from mxcore.transfer.member.source_wait import wait_for_source
from mxcore.transfer.member.storage_election import StorageElection
from mxcore.transfer.member.watched_sources import LAG_SECONDS, WatchedSources
from mxcore.transfer.move import SessionAhead, Source
from mxcore.transfer.receive import (
    Content,
    LoadReporter,
    ProgressCallback,
    Receiver,
    ReceiveReport,
    RecentErrors,
    logged,
)
from mxcore.transfer.route import UcxPolicy, require_movable
from mxcore.transfer.serve import LEASE_SECONDS, Holder, Origin, SelfCheck, ServedRelay, WorkerIdentity, WorkerServer
from mxserver.wire import MxError, ServerUnreachable
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import load_pb2, mx_pb2, p2p_pb2

__all__ = ["CHECKPOINT_PARAMETER", "PROTOCOL_VERSION", "Membership"]

logger = logging.getLogger(__name__)

PROTOCOL_VERSION = "mx-2"
"""`mx_version` of our identities: workers of all releases that use this protocol exchange weights."""

_FAILED_DRAIN_SECONDS = 5.0  # for readers of what a failed receive relayed


class Membership:
    """This worker's record at the server, and what it serves. Thread-safe; end it with `close`.

    No call raises because the server cannot be reached: that is logged once, and the heartbeat keeps trying.
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
        signed_manifest: str = "",
        replica: str = "",
    ) -> None:
        """`replica`: which engine this rank is part of, the same for all its ranks, for people."""
        self.settings = settings
        self.worker_rank = worker_rank
        self.accelerator = accelerator
        self.worker_id = uuid.uuid4().hex
        self._chunk_bytes = chunk_bytes
        self._signed = signed_manifest  # what served bytes were verified against, and those taken have to be
        self._lease_seconds = lease_seconds
        self._policy = UcxPolicy.from_environment(settings.transport, tcp_transfer=settings.tcp_transfer)
        tls, progress_thread = self._policy.serving(accelerator)
        early = tls if self._policy.needs_agent(accelerator) else None
        self._place = partial(current_place, settings)
        self._ahead = SessionAhead(settings, self.worker_id, early, progress_thread)
        address = settings.server_address
        self._client = ServerClient(address, timeout_seconds=settings.server_timeout_seconds) if address else None
        self._record = WorkerRecord(
            self._client,
            identity,
            self.worker_id,
            worker_rank,
            accelerator,
            heartbeat_interval_seconds=settings.heartbeat_interval_seconds,
            served=self._served,
            topology=lambda: self._place().topology,
            superseded_by_newer=self._superseded_by_newer,
            names=lambda: Names(*self._place().names, replica),
        )
        self._lock = threading.RLock()  # of what is served; never held around calls to the record, which call `_served`
        self._closed = False
        self._directory = (
            Directory(self._client, self.worker_id, worker_rank, self._place, self._signed) if self._client else None
        )
        self._election: StorageElection | None = None
        self._listing = RecentErrors(logger, "sources cannot be listed")
        self._leaving = threading.Event()
        self._holder: Holder | None = None
        self._server: WorkerServer | None = None
        self._check: SelfCheck | None = None
        self._bad_memory = ""
        self._address_guessed = False  # until there is a way to the server
        self.on_bad_memory: Callable[[str], None] = lambda what: None
        """Called on a thread of its own when the weights that are served are found changed; set it before `serve`."""

    @property
    def identity(self) -> p2p_pb2.SourceIdentity:
        """The identity of this worker's weights; changes when `find_sources` adopts a checkpoint."""
        return self._record.identity

    @property
    def source_id(self) -> str:
        """The identity's mx_source_id."""
        return self._record.source_id

    @property
    def endpoint(self) -> str | None:
        """host:port of this worker's gRPC services while it serves."""
        return server.endpoint if (server := self._server) is not None else None

    @property
    def holder(self) -> Holder | None:
        """What this worker serves, complete or not; None when it serves nothing."""
        return self._holder

    @property
    def superseded(self) -> bool:
        """Whether a newer process of this worker took over its record; then it serves nothing."""
        return self._record.superseded

    @property
    def published(self) -> bool:
        """Whether the server has this worker's record as it is."""
        return self._record.published

    def join(self, *, required: bool = False) -> bool:
        """Publishes this worker as INITIALIZING and keeps that alive; False, logged, without a server.

        Idempotent. If the server cannot be reached, the record is published once it can; with `required` that raises
        WireError.
        """
        if self._client is None:
            logger.warning("no server is set (MODEL_EXPRESS_URL or MX_SERVER_ADDRESS): weights come from storage")
            return False
        self._ahead.start()  # while the engine builds its model
        if required:
            self._record.publish()
        return self._record.keep()

    def find_sources(self, *, match_any_checkpoint: bool = False, receiving: bool = False) -> list[Source]:
        """READY holders of this worker's rank with its identity, the least loaded first, then the newest.

        With `receiving`, also those that still receive, at the end. With `match_any_checkpoint`, this worker has no
        weight files: holders that are equal in all else are taken if all have one checkpoint, which becomes its own.
        """
        with self._listing:
            return self._listed(match_any_checkpoint=match_any_checkpoint, receiving=receiving)
        return []

    def _listed(self, *, match_any_checkpoint: bool, receiving: bool) -> list[Source]:
        """As `find_sources`. Raises WireError."""
        directory = self._asked_directory()
        if directory is None:
            return []
        if match_any_checkpoint and not self.identity.extra_parameters[CHECKPOINT_PARAMETER]:
            adopted = directory.fitting(self.identity)
            if adopted is None:
                return []
            self._record.change_identity(adopted)
        return directory.holders(self.identity) if receiving else directory.ready(self.identity)

    def _asked_directory(self) -> Directory | None:
        """None: there is no server. Raises ServerUnreachable for one that lately let a call's deadline pass."""
        if self._directory is not None and self._record.server_is_silent:
            raise ServerUnreachable(
                f"{self.settings.server_address} lately gave no answer in time: only heartbeats ask it until it does"
            )
        return self._directory

    def differs_least(self) -> str:
        """In what complete holders of this model differ, of the one that differs least; empty if there is none."""
        with suppress(ServerUnreachable):
            return directory.differs_least(self.identity) if (directory := self._asked_directory()) else ""
        return ""

    def wait_for_source(
        self,
        *,
        match_any_checkpoint: bool = False,
        avoid: Collection[str] = (),
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[Source]:
        """Holders to take the weights from, except the workers `avoid`; empty: read storage now.

        When no worker is READY, the server elects one of those with these weights and this rank to read storage; the
        others wait here until that one is READY, at most MX_SOURCE_WAIT_SECS. If it dies, another one is elected
        within seconds. The elected one stays so until `serve` or `close`. The wait ends early, with nothing, when
        `stopped()` says so.
        """
        if problem := self._place().problem:
            logger.warning("%s", problem)
            return []

        def listed(told: list[Source] | None) -> list[Source]:
            if told is None:
                told = self._listed(match_any_checkpoint=match_any_checkpoint, receiving=True)
            return [source for source in told if source.worker_id not in avoid]

        with ExitStack() as opened:
            return wait_for_source(
                listed,
                self._stand_for_election,
                wait_seconds=self.settings.source_wait_seconds,
                known=lambda: self._record.published,
                leaving=self._leaving,
                stopped=stopped,
                watched=None if match_any_checkpoint else self._watching(opened, wants_turn=True),
            )

    def _watching(
        self, opened: ExitStack, *, wants_turn: bool = False, when_told: Callable[[], None] = lambda: None
    ) -> WatchedSources | None:
        """What the server tells of this worker's identity until `opened` ends; None where it does not know it."""
        if self._client is None or self._directory is None or not self._record.published:
            return None
        asks = (self._client, self._directory, self.identity)
        return opened.enter_context(WatchedSources(*asks, wants_turn=wants_turn, when_told=when_told))

    def published_ranks(self, *, ready: bool) -> set[int]:
        """Ranks of the workers with this identity: of those that are READY, or of all. Raises WireError."""
        return directory.ranks(self.identity, ready=ready) if (directory := self._asked_directory()) else set()

    def take_over_election(self, other: Membership) -> None:
        """Takes over the election to read storage, and the load's report, from another membership of this process."""
        with self._lock:
            self._election, other._election = other._election, None
        self._record.loads.take_over(other._record.loads)

    @property
    def loads(self) -> LoadReporter:
        """Tells the server of loads: `receive` by itself, others by their `loading`. Never raises, never waits."""
        return self._record.loads

    def refused(self, refusals: Iterable[Refusal]) -> None:
        """Tells the server with the next heartbeat or goodbye what is not shared. Never raises or waits."""
        self._record.refusals.add(refusals)

    def receive(
        self,
        layout: Layout,
        placement: Placement,
        scalars: Scalars,
        sources: Sequence[Source],
        progress: ProgressCallback | None = None,
        *,
        relay_from: object = None,
        files_decide: bool = False,
        only: int | None = None,
        keep_alive: object = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> ReceiveReport:
        """Fills the memory at `placement` from `sources` and from those that appear meanwhile; verifies every chunk.

        Of this worker's `scalars` only the names matter. With `relay_from`, which keeps the memory, each verified chunk
        is served until `serve`, `withdraw` or a failure; the rest is Receiver's. After TransferError nothing arrives in
        the memory any more and nobody reads there; after FenceFailed something may: it is kept for ever, never used.
        """
        relays = relay_from is not None and self._directory is not None
        receiver = Receiver(
            layout,
            placement,
            settings=self.settings,
            worker_id=self.worker_id,
            scalar_names=sorted(scalars),
            progress=progress,
            chunk_bytes=self._chunk_bytes,
            relay=ServedRelay(partial(self._relay, layout, placement, relay_from)) if relays else None,
            files_decide=files_decide,
            tell_doubt=self._record.tell_doubt_soon,
            keep_alive=keep_alive,
            only=only,
            lag_seconds=LAG_SECONDS,
            stopped=stopped,
        )
        try:
            with self._record.loads.loading(load_pb2.LOAD_PATH_UNSPECIFIED) as step, ExitStack() as opened:
                watched = self._watching(opened, when_told=receiver.look)
                return receiver.receive(sources, watched.holders if watched is not None else None, step)
        except BaseException:
            self.withdraw(_FAILED_DRAIN_SECONDS)
            raise

    def serve(
        self,
        layout: Layout,
        placement: Placement,
        scalars: Scalars,
        digests: ChunkDigests | None = None,
        keep_alive: object = None,
        origin: Origin | None = None,
    ) -> None:
        """Serves the memory at `placement` until `close` or `withdraw`, and publishes this worker as READY.

        `digests`: those of a ReceiveReport; None: they are computed. `origin`: who made them, as Holder has it.
        `keep_alive` is kept until nobody reads any more.
        Raises TransferError when it serves already. Nothing is served after LayoutUnsupported, SettingError, nor after
        NixlMissing and NixlError, where readers could take nothing without an agent (device memory).
        """
        require_movable(placement)
        with self._lock:
            if self._record.ready or self._closed or self._record.superseded or self._bad_memory:
                raise TransferError(f"worker {self.worker_id} is serving already, or has left{self._bad_memory}")
            holder = self._holder
            relayed = holder is not None and holder.serves(layout, placement, scalars, digests)
        if holder is not None and relayed:
            holder.keep(keep_alive)
            if origin is not None:
                holder.origin = origin
            holder.update(all_chunks(len(holder.chunks)))
        else:
            self.withdraw(_FAILED_DRAIN_SECONDS)
            self._offer(layout, placement, scalars, digests, keep_alive, origin=origin)
        self._record.mark_ready()
        self._look_at_own_weights()
        logger.info("worker %s serves %d bytes at %s", self.worker_id, layout.total_bytes, self.endpoint)
        self.join()
        if self._election is not None:
            self._election.end(shared=True)

    def withdraw(self, timeout_seconds: float | None = None) -> bool:
        """Stops serving but stays a member: before the engine sleeps, reloads, or frees what is served.

        Refuses new readers at once, waits for those that read, then destroys the agent, and only then returns. False
        when readers were cut off. `serve` may follow. Idempotent.
        """
        with self._lock:
            holder = self._holder
            if holder is None:
                return True
        self._record.unmark_ready()
        drained = holder.drain(self.settings.drain_timeout_seconds if timeout_seconds is None else timeout_seconds)
        self._stop_serving()
        if self._record.mark_changed() and not self._closed:
            self._record.keep()
        return drained

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Takes no new readers and waits for those that read; False when some did not end in time. Idempotent."""
        self._record.goodbye()
        wait_seconds = self.settings.drain_timeout_seconds if timeout_seconds is None else timeout_seconds
        return (holder := self._holder) is None or holder.drain(wait_seconds)

    def close(self) -> None:
        """Drains, says goodbye (STALE), destroys the agent, lets go of the memory. Idempotent; never raises."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._leaving.set()
        self._record.end()
        with logged("draining"):
            self.drain()
        with logged("stopping its services"):
            self._stop_serving()
            self._ahead.drop()
        if self._election is not None:
            self._election.end(shared=False)
        if self._client is not None:
            with logged("closing its connection to the server"):
                self._client.close()

    def _relay(self, layout: Layout, placement: Placement, keep_alive: object, content: Content) -> Holder:
        """Serves what is being received, with nothing there yet. Raises MxError."""
        self.withdraw(_FAILED_DRAIN_SECONDS)
        holder = self._offer(layout, placement, content.scalars, content.digests, keep_alive, have=0)
        self._record.keep()
        return holder

    def _stand_for_election(self) -> mx_pb2.TakeStorageTurnResponse | None:
        """The server's answer when this worker is to wait; None when it is to read storage. Raises WireError."""
        if self._client is None:
            return None
        place = self._place()
        election = StorageElection(self._client, self.source_id, self.worker_rank, self.worker_id, place.domain)
        answer = election.stand()
        if answer.turn == mx_pb2.STORAGE_TURN_YOURS:
            self._election = election
        return answer if answer.turn == mx_pb2.STORAGE_TURN_WAIT else None

    def _offer(
        self,
        layout: Layout,
        placement: Placement,
        scalars: Scalars,
        digests: ChunkDigests | None,
        keep_alive: object,
        have: int | None = None,
        origin: Origin | None = None,
    ) -> Holder:
        """Starts serving: memory registered, services listening. Raises MxError; then nothing is served.

        Digests and registration take seconds of a large model. No lock is held meanwhile: heartbeats go on.
        """
        self._require_member()
        holder = Holder(
            layout,
            placement,
            partial(self._ahead.take, *self._policy.serving(placement.device_type)),
            scalars=scalars,
            digests=digests,
            keep_alive=keep_alive,
            chunk_bytes=self._chunk_bytes,
            lease_seconds=self._lease_seconds,
            have=have,
            most_readers=self.settings.source_max_readers,
            rate_limit=self.settings.source_rate_limit,
            origin=origin,
        )
        try:
            holder.agent.make_early(self._policy)
            address = self.settings.own_address()
            with self._lock:
                self._require_member()  # it may have left meanwhile
                if self._holder is not None:
                    raise TransferError(f"worker {self.worker_id} is serving already: other weights, begun meanwhile")
                who = WorkerIdentity(holder, self.source_id, self.worker_id, self.worker_rank, self.accelerator)
                self._server = listening(self.settings, address, who, self._policy, self._doubted)
                self._address_guessed = address.guessed
                self._holder = holder
        except MxError:
            holder.close()
            raise
        return holder

    def _require_member(self) -> None:
        """Raises TransferError."""
        if self._closed or self._record.superseded:
            raise TransferError(f"worker {self.worker_id} has left")

    def _look_at_own_weights(self) -> None:
        with self._lock:
            if self._holder is not None and self._check is None:
                self._check = SelfCheck(self._holder, self._memory_is_bad)
                self._check.start()

    def _doubted(self, chunks: Sequence[int]) -> None:
        if (check := self._check) is not None:
            check.doubt(chunks)

    def _memory_is_bad(self, chunks: Sequence[int]) -> None:
        """On the thread of the check: takes no more readers, for good; those that read verify what they get."""
        what = f"chunks {list(chunks[:8])} of the weights in memory are not what their digests promise"
        self._bad_memory = f": {what}"
        logger.critical("worker %s serves no more, its engine's answers may be wrong: %s", self.worker_id, what)
        if (holder := self._holder) is not None:
            holder.drain(0)
        self._record.goodbye()
        self._record.tell_doubt(mx_pb2.DOUBT_KIND_OWN_MEMORY, [self.worker_id], len(chunks), what)
        self.on_bad_memory(what)
        if holder is not None:
            holder.drain(self.settings.drain_timeout_seconds)
            holder.close()  # the port goes on saying that this worker is not well
        with self._lock:
            self._holder = None

    def _served(self) -> Served:
        found = self.settings.own_address() if self._address_guessed else None  # not with the lock: DNS may be slow
        with self._lock:
            if found is not None and not found.guessed and self._server is not None:
                self._address_guessed = False
                self._server.advertise(found.host)
                self._record.mark_changed()
            if (holder := self._holder) is None:
                return Served()
            return Served(holder.agent.name, self.endpoint or "", holder.live_leases, holder.origin, self._signed)

    def _superseded_by_newer(self) -> None:
        """Called on the heartbeat's thread."""
        with logged("stopping its services"):
            if (holder := self._holder) is not None:
                holder.drain(self.settings.drain_timeout_seconds)
            self._stop_serving()

    def _stop_serving(self) -> None:
        with self._lock:
            server, self._server = self._server, None
            holder, self._holder = self._holder, None
            check, self._check = self._check, None
        if check is not None:
            check.stop()  # before the memory goes away
        if server is not None:
            server.stop()
        if holder is not None:
            holder.close()
