"""One holder's part of a receive: a thread that asks it for chunks, fetches what it grants, and verifies it.

Each holder has an agent of its own here, so that fencing one leaves the others at work. What a holder had in flight
is asked of another holder only after the fence, so that a late write cannot overwrite what the other one sent.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache

from mxcore.cuda import context_of
from mxcore.errors import (
    FenceFailed,
    NixlError,
    NoChunkPort,
    NotEncrypted,
    NotOneSided,
    PeerLost,
    SourceBusy,
    SourceRefused,
    SourceSlow,
    SourceUnreachable,
    TransferError,
    TransferStalled,
)
from mxcore.metrics import STRAGGLERS
from mxcore.settings import WorkerSettings
from mxcore.transfer.layout import ChunkRequest, all_chunks, set_from_bytes
from mxcore.transfer.move import (
    FENCE_SECONDS,
    TOKEN_BYTES,
    AgentSession,
    ChunkTls,
    LeaseKeeper,
    Mover,
    NixlReadMover,
    NixlWriteMover,
    PendingCall,
    RegisteredSessions,
    SameHostMover,
    Source,
    SourceClient,
    StagedMover,
    TcpMover,
)
from mxcore.transfer.receive.chunk_verifier import ChunkVerifier
from mxcore.transfer.receive.received_chunks import ReceivedChunks
from mxcore.transfer.route import Route, UcxPolicy, choose_route
from mxserver.wire import SettingError
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.proto import mx_pb2

__all__ = ["END_SECONDS", "HolderPull", "call_deadline_seconds"]

logger = logging.getLogger(__name__)

_NEWS_WAIT_SECONDS = 0.25
END_SECONDS = 1.5 * FENCE_SECONDS  # the fence, and what comes before it
_NOTHING = ChunkRequest(0, 0, 0)


def call_deadline_seconds(settings: WorkerSettings) -> float:
    """For each call to a holder: it passes before the stall time-out does."""
    return min(settings.server_timeout_seconds, 0.75 * settings.stall_timeout_seconds)


@dataclass
class _Asking:
    """What was last asked of the holder, and what it said: its version and chunks, and when to ask again."""

    call: PendingCall[mx_pb2.AskChunksResponse] | None = None
    wanted: ChunkRequest = _NOTHING
    version: int = 0
    have: int = 0
    declined: list[int] = field(default_factory=list)
    asked_at: float = 0.0
    pause_until: float = 0.0
    late: int = 0  # answers that did not come in time, one after the other


class HolderPull:
    """Fetches from `source` until all chunks are here, the holder fails, or `stop`; on a thread of its own.

    Once it has `ended`, nothing of this holder can arrive any more, unless `failure` is FenceFailed; `failure` says why
    it ended early. `clean` is
    false when chunks were abandoned in flight: those may have overwritten verified ones before the fence.
    """

    def __init__(
        self,
        received: ReceivedChunks,
        source: Source,
        settings: WorkerSettings,
        sessions: RegisteredSessions,
        client: SourceClient | None = None,
    ) -> None:
        """`sessions` are those of the receiver, with its memory registered; `client` is the `kept_client` of before."""
        self.source = source
        self.failure: TransferError | None = None
        self.route: Route | None = None
        self.clean = True
        self.in_clear = False  # whether weights may have come over a network in clear, where they should not
        self.heard = False  # whether it is known which bytes this holder has
        self.started_at = self.busy_at = time.monotonic()  # `busy_at`: when it last fetched something
        self._received = received
        self._settings = settings
        self._sessions = sessions
        self._policy = UcxPolicy.from_environment(settings.transport, tcp_transfer=settings.tcp_transfer)
        self.kept_client: SourceClient | None = None  # after the end, where the holder was full: to ask it again
        self._client = client or SourceClient(source, timeout_seconds=call_deadline_seconds(settings))
        try:
            self._credentials = ClientCredentials.from_environ()
        except SettingError as error:
            raise SourceUnreachable(f"worker {source.worker_id} cannot be called: {error}") from error
        self._stopped = threading.Event()
        self._given_up: TransferError | None = None
        self._anything_came = False
        self._mover: Mover | None = None
        self._lease_id = ""
        self._thread = threading.Thread(target=self._run, name=f"mx-pull-{source.worker_id[:8]}", daemon=True)

    @property
    def ended(self) -> bool:
        """Whether the thread is done."""
        return not self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, error: TransferError | None = None, *, at_once: bool = False) -> None:
        """Makes it end: at once with an `error` or when nothing is in flight, else when what is in flight has come."""
        self._given_up = self._given_up or error  # all may be done while a straggler still says goodbye
        self._stopped.set()
        mover = self._mover
        if error is not None and mover is not None:
            mover.interrupt(error)
        if mover is None or error is not None or at_once:
            self._client.cancel()

    def join(self, seconds: float = END_SECONDS) -> None:
        """Waits for its end. Raises FenceFailed when that does not come: its memory may still be written to."""
        self._thread.join(max(seconds, 0.0))
        if self._thread.is_alive():
            raise FenceFailed(
                f"fetching from worker {self.source.worker_id} does not end ({self.route}): its memory is given up"
            )

    def _run(self) -> None:
        try:
            with ExitStack() as closing_it:
                closing_it.enter_context(self._client)
                try:
                    self._receive()
                except SourceBusy:
                    if not self._stopped.is_set():
                        closing_it.pop_all()
                        self.kept_client = self._client
                    raise
        except TransferError as error:
            if isinstance(error, FenceFailed):
                self.failure = error
            elif not (self._stopped.is_set() and self._given_up is None):
                self.failure = self._given_up or error
                if isinstance(self.failure, SourceSlow):
                    STRAGGLERS.add()
        except Exception as error:  # a bug in one holder's thread must not hang the others
            logger.exception("fetching from worker %s failed by a fault of ours", self.source.worker_id)
            self.failure = SourceRefused(f"worker {self.source.worker_id}: {type(error).__name__}: {error}")
            self.clean = False
        finally:
            with self._received.changed:
                self._received.changed.notify_all()

    def _receive(self) -> None:
        """Takes a lease first: a holder that is full says no more than that."""
        self._lease_id = self._client.prepare()
        try:
            self._receive_what_it_has()
        finally:
            self._release()

    def _release(self) -> None:
        lease_id, self._lease_id = self._lease_id, ""
        with suppress(TransferError):  # the lease ends by itself
            if lease_id:
                self._client.release(lease_id)

    def _receive_what_it_has(self) -> None:
        content = self._received.content
        known = content.digests if content is not None else None
        answer = self._client.get_layout(self._received.layout.fingerprint, known.summary if known is not None else b"")
        self._received.admit(self.source.worker_id, answer, owner=self.source.owner, known=known)
        self.heard = True
        with self._received.changed:
            self._received.changed.notify_all()
        if self._received.finished:
            return
        placement = self._received.placement
        device = None if placement.device_type == "cpu" else next(iter(placement.device_indices), None)
        on_device = device is not None or answer.transport.device_memory
        self.route = choose_route(self._policy, answer.transport, device_index=device)
        if self.route.because:
            instead = f"{self.route.operation} by {self.route.transport} instead of cuda_ipc"
            logger.info("worker %s: %s: %s", self.source.worker_id, instead, self.route.because)
        without_rdma = without_sockets = False
        while True:
            try:
                self._check_encrypted(self.route, answer.transport, on_device=on_device)
                self._under_lease(self.route, answer.transport)
                return
            except (NoChunkPort, NotOneSided, NixlError, TransferStalled) as error:
                without_rdma = without_rdma or self.may_be_unreachable
                without_sockets = without_sockets or isinstance(error, NoChunkPort)
                if not (isinstance(error, NoChunkPort | NotOneSided) or self.may_be_unreachable):
                    raise
                self.route = self._policy.fallback_route(
                    answer.transport,
                    device_memory=on_device,
                    without_rdma=without_rdma,
                    without_sockets=without_sockets,
                )
                if without_sockets and self._needs_tls and not on_device and self.route.operation == "write":
                    raise SourceUnreachable(f"{error}; by UCX it would WRITE in clear, which is not taken") from error
                how = "sends over TCP" if self.route.operation == "send" else "WRITEs"
                logger.warning("worker %s: %s; it %s instead", self.source.worker_id, error, how)

    @property
    def _needs_tls(self) -> bool:
        """Whether chunks are to be encrypted between workers: they have certificates, and no setting turns it off."""
        return self._credentials.peers_use_tls and self._settings.chunk_tls != "off"

    def _check_encrypted(self, route: Route, offer: mx_pb2.TransportOffer, *, on_device: bool) -> None:
        """Says so where what comes by NIXL over a network goes in clear. Raises NotEncrypted where it need not.

        UCX has no TLS: neither for device memory, nor over RDMA, nor where the settings leave host memory to NIXL.
        """
        if not self._needs_tls or route.transport not in ("tcp", "rdma"):
            return
        name = self.source.worker_id
        if route.operation == "send":
            if not offer.chunk_tls:
                raise NotEncrypted(
                    f"worker {name} sends weights in clear (MX_CHUNK_TLS=off there), this one takes them by TLS: "
                    "give both the same MX_CHUNK_TLS"
                )
            return
        if route.transport == "tcp" and self._policy.sockets and not on_device:
            raise NotEncrypted(f"worker {name} has no chunk port (MX_TCP_TRANSFER there); by UCX they come in clear")
        self.in_clear = True
        _tell_in_clear(route.transport)

    @property
    def may_be_unreachable(self) -> bool:
        """Whether RDMA, rather than the holder, may have failed: nothing came, and other transports are allowed."""
        route = self.route
        over_rdma = route is not None and route.transport == "rdma" and not self._policy.rdma_only
        return over_rdma and not self._anything_came and self._given_up is None

    def _under_lease(self, route: Route, offer: mx_pb2.TransportOffer) -> None:
        lease_id = self._lease_id = self._lease_id or self._client.prepare()
        try:
            self._transfer(lease_id, route, offer)
        finally:
            self._release()

    def _transfer(self, lease_id: str, route: Route, offer: mx_pb2.TransportOffer) -> None:
        name = self.source.worker_id
        session = self._sessions.take(route.tls, name) if route.by_nixl else None
        self._received.join(name, self.source.distance)
        done = False
        verifying = ChunkVerifier(
            self._received, name, route.transport, lambda chunk: self._client.doubt(lease_id, [chunk])
        )
        try:
            # Progress from here on: what the holder is told by `_open` makes it connect at once.
            progress = session.progressing() if session is not None else nullcontext()
            keeper = LeaseKeeper(self._client, lease_id) if route.operation != "write" else nullcontext()
            with progress, keeper as lease, closing(self._open(lease_id, route, session, offer)) as mover:
                self._mover = mover
                try:
                    self._fetch(lease_id, lease, mover, verifying)
                except (SourceUnreachable, TransferStalled, PeerLost) as error:
                    if isinstance(error, SourceUnreachable) or not self.may_be_unreachable:
                        self._client.cancel()  # a call that waits for a holder that is gone holds up the fence
                    raise
            done = True
        finally:
            self._mover = None
            fenced = False
            try:
                if session is not None:
                    self._sessions.fence(session)
                fenced = True
            finally:
                verifying.close()
                # Nothing arrives on connections that are closed, nor by copies of our own: then it is clean anyhow.
                ended_well = done or self._received.finished or route.operation in ("send", "stage")
                self.clean = self.clean and fenced and ended_well
                self._received.drop(name)

    def _fetch(self, lease_id: str, lease: LeaseKeeper | None, mover: Mover, verifying: ChunkVerifier) -> None:
        """Asks, fetches and verifies; takes what arrives while it waits for an answer.

        Without a `lease`, what is fetched renews it.
        """
        name = self.source.worker_id
        count = len(self._received.chunks)
        asking = _Asking()
        sign_of_life_seconds = self._settings.stall_timeout_seconds / 4
        while not self._received.finished:
            if self._given_up is not None:
                raise self._given_up
            now = time.monotonic()
            idle = mover.idle
            leaving = self._stopped.is_set()
            if leaving and idle:
                return
            if asking.call is None:
                wanted = _NOTHING if leaving or now < asking.pause_until else self._received.wanted(name)
                enough = wanted.most >= max(1, self._received.limit(name) // 2)
                complete = asking.have == all_chunks(count)
                first = asking.version == 0
                if enough or first or (idle and (not complete or now - asking.asked_at > sign_of_life_seconds)):
                    wait = _NEWS_WAIT_SECONDS if idle and not wanted.chunks and not first else 0.0
                    asking.wanted = wanted
                    asking.call = self._client.ask(
                        lease_id,
                        wanted,
                        count,
                        known_version=asking.version,
                        wait_seconds=wait,
                        declined=asking.declined,
                    )
                    if not idle:
                        asking.call.when_done(mover.wake)
            if asking.call is not None and (idle or asking.call.done):
                try:
                    self._take_answer(asking, mover, count)
                except SourceUnreachable as error:
                    self._await_late_answer(asking, lease, error)
                    continue
                idle = mover.idle
            if idle:
                pause = asking.pause_until
                self._rest(min(_NEWS_WAIT_SECONDS, pause - time.monotonic()) if pause > now else None)
                continue
            if lease is not None:
                lease.check()
            for chunk, digest in mover.arrived():
                self.busy_at = time.monotonic()
                self._anything_came = True
                verifying.submit(chunk, digest, mover.wake)
            verifying.collect(wait=mover.idle)

    def _await_late_answer(self, asking: _Asking, lease: LeaseKeeper | None, error: SourceUnreachable) -> None:
        """A holder that is busy for seconds keeps its readers: it is asked again while the lease holds.

        Where no `lease` is kept, once. Raises the error of the call, and what `lease` does once it is over.
        """
        asking.late += 1
        if not error.late or self._given_up is not None or (lease is None and asking.late > 1):
            raise error
        if lease is not None:
            lease.check()
        logger.info("worker %s is asked again: %s", self.source.worker_id, error)

    def _take_answer(self, asking: _Asking, mover: Mover, count: int) -> None:
        """Records what the holder said, and has the mover fetch what it granted."""
        if asking.call is None:
            return
        name = self.source.worker_id
        call, asking.call = asking.call, None
        answer = call.result()
        asking.late = 0
        asking.asked_at = time.monotonic()
        if answer.version != asking.version:
            asking.have = all_chunks(count) if answer.complete else set_from_bytes(answer.have, count)
            self._received.has(name, asking.have)
            asking.version = answer.version
        taken, asking.declined = self._received.claim(name, answer.granted)
        if answer.leaving and self._received.can_do_without(name):
            self._stopped.set()
        elif answer.leaving and mover.idle and not taken and not asking.wanted.chunks:
            raise SourceUnreachable(f"worker {name} is leaving")
        if taken:
            self.busy_at = asking.asked_at
            mover.ask(taken)
        asking.pause_until = asking.asked_at + answer.pause_ms / 1000

    def _rest(self, seconds: float | None) -> None:
        """Waits until something changes, at most `seconds`."""
        with self._received.changed:
            if seconds is not None:
                self._received.changed.wait(max(seconds, 0.0))
            elif not self._received.wanted(self.source.worker_id).most and not self._received.finished:
                self._received.changed.wait(_NEWS_WAIT_SECONDS / 10)

    def _open(self, lease_id: str, route: Route, session: AgentSession | None, offer: mx_pb2.TransportOffer) -> Mover:
        if route.operation == "send":
            return self._connect(lease_id, offer)
        if route.operation == "stage":
            return self._map(lease_id)
        placement = self._received.placement
        extents = [
            mx_pb2.Extent(address=address, device_id=device)
            for address, device in zip(placement.addresses, placement.device_indices, strict=True)
        ]
        reads = route.operation == "read"
        operation = mx_pb2.OPERATION_READ if reads else mx_pb2.OPERATION_WRITE
        answer = self._client.open_transfer(
            lease_id,
            self._received.layout.fingerprint,
            session.metadata() if session is not None else b"",
            extents,
            operation,
            device_memory=placement.device_type != "cpu",
        )
        if answer.operation != operation or (reads and len(answer.extents) != len(extents)):
            raise SourceRefused(f"worker {self.source.worker_id} opened another transfer than was asked for")
        if not reads:
            if session is None:
                raise SourceRefused(
                    f"worker {self.source.worker_id} would WRITE by {route.transport}, without an agent"
                )
            stall_seconds = self._settings.stall_timeout_seconds
            return NixlWriteMover(self._client, lease_id, session, stall_timeout_seconds=stall_seconds)
        chunks = self._received.chunks
        remote = chunks.addresses([extent.address for extent in answer.extents])
        if session is None:
            return SameHostMover(
                self.source.worker_id,
                route.process,
                chunks,
                self._received.addresses,
                remote,
                hashed=self._received.hashed_on_arrival,
                stall_timeout_seconds=self._settings.stall_timeout_seconds,
            )
        peer = session.connect(answer.nixl_metadata)
        devices = {extent.device_id for extent in answer.extents} if answer.device_memory else set()
        if len(devices) > 1:
            raise SourceRefused(f"worker {self.source.worker_id} has weights on devices {sorted(devices)}")
        return NixlReadMover(session, peer, chunks, self._received.addresses, remote, next(iter(devices), None))

    def _map(self, lease_id: str) -> Mover:
        received = self._received
        fingerprint = received.layout.fingerprint
        try:
            answer = self._client.open_transfer(
                lease_id, fingerprint, b"", (), mx_pb2.OPERATION_STAGE, device_memory=True
            )
        except SourceBusy:
            raise
        except SourceRefused as error:
            raise NotOneSided(f"it has no buffer: {error}") from error
        return StagedMover(
            self._client,
            lease_id,
            answer.staging,
            context_of(received.placement.device_indices[0]),
            received.chunks,
            received.addresses,
            stall_timeout_seconds=self._settings.stall_timeout_seconds,
        )

    def _connect(self, lease_id: str, offer: mx_pb2.TransportOffer) -> Mover:
        try:
            tls = ChunkTls.of(self._credentials) if offer.chunk_tls else None
        except SettingError as error:
            raise NotEncrypted(f"worker {self.source.worker_id} sends by TLS: {error}") from error
        received, settings = self._received, self._settings
        fingerprint = received.layout.fingerprint
        answer = self._client.open_transfer(lease_id, fingerprint, b"", (), mx_pb2.OPERATION_SEND)
        if answer.operation != mx_pb2.OPERATION_SEND or len(answer.token) != TOKEN_BYTES:
            raise SourceRefused(f"worker {self.source.worker_id} opened another transfer than was asked for")
        return TcpMover(
            self._client,
            offer.chunk_port,
            answer.token,
            received.chunks,
            received.addresses,
            hashed=received.hashed_on_arrival,
            stall_timeout_seconds=settings.stall_timeout_seconds,
            tls=tls,
        )


@cache  # once a process
def _tell_in_clear(transport: str) -> None:
    logger.warning(
        "weights come in clear, by UCX over %s, although workers have certificates: UCX has no TLS; keep that network "
        "for the fleet alone (docs/explanation/threat-model.md)",
        transport,
    )
