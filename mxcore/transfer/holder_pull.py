"""One holder's part of a receive: a thread that asks it, fetches what it grants, verifies, and fences what it gave up.

Each holder has an agent of its own here, so that fencing one leaves the others at work. What a holder had in flight
is asked of another only after the fence: nothing of the one can land on what came from the other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field

from mxcore.errors import (
    DigestMismatch,
    NixlError,
    NoChunkPort,
    NotOneSided,
    PeerLost,
    SourceRefused,
    SourceUnreachable,
    TransferError,
    TransferStalled,
)
from mxcore.settings import WorkerSettings
from mxcore.transfer.agent_session import AgentSession
from mxcore.transfer.attached_pull import SameHostMover
from mxcore.transfer.chunk_greeting import TOKEN_BYTES
from mxcore.transfer.intake import Intake
from mxcore.transfer.lease_keeper import LeaseKeeper
from mxcore.transfer.movers import Mover
from mxcore.transfer.nixl_read import NixlReadMover
from mxcore.transfer.nixl_write import NixlWriteMover
from mxcore.transfer.plan import Wanted, all_chunks, set_from_bytes
from mxcore.transfer.session_ahead import SessionAhead
from mxcore.transfer.socket_pull import TcpMover
from mxcore.transfer.source_client import PendingCall, Source, SourceClient
from mxcore.transfer.tcp_received import TcpReceived
from mxcore.transfer.transports import Route, UcxPolicy, choose_route
from mxserver.wire import mx_pb2

__all__ = ["HolderPull"]

logger = logging.getLogger(__name__)

_VERIFY_THREADS = 1
_NEWS_WAIT_SECONDS = 0.25
_NOTHING = Wanted(0, 0, 0)


@dataclass
class _Asking:
    """What was last asked of the holder, and what it said: its version and chunks, and when to ask again."""

    call: PendingCall[mx_pb2.AskChunksResponse] | None = None
    wanted: Wanted = _NOTHING
    version: int = 0
    have: int = 0
    declined: list[int] = field(default_factory=list)
    asked_at: float = 0.0
    pause_until: float = 0.0


class HolderPull:
    """Fetches from `source` until the intake is finished, the holder fails, or `stop`; on a thread of its own.

    Afterwards (`ended`), nothing of this holder can arrive any more; `failure` says why it ended early. `clean` is
    false when something was given up on while it was in flight.
    """

    def __init__(self, intake: Intake, source: Source, settings: WorkerSettings, sessions: SessionAhead) -> None:
        """`sessions` are those of the receiver, with its memory registered."""
        self.source = source
        self.failure: TransferError | None = None
        self.route: Route | None = None
        self.clean = True
        self.started_at = self.busy_at = time.monotonic()  # `busy_at`: when it was last known to fetch
        self._intake = intake
        self._settings = settings
        self._sessions = sessions
        self._policy = UcxPolicy.from_environment(settings.transport, tcp_transfer=settings.tcp_transfer)
        self._client = SourceClient(
            source,  # so that a sign of life and its time-out are within the stall time-out
            timeout_seconds=min(settings.server_timeout_seconds, 0.75 * settings.stall_timeout_seconds),
        )
        self._stopped = threading.Event()
        self._given_up: TransferError | None = None
        self._anything_came = False
        self._mover: Mover | None = None
        self._thread = threading.Thread(target=self._run, name=f"mx-pull-{source.worker_id[:8]}", daemon=True)

    @property
    def ended(self) -> bool:
        """Whether the thread is done."""
        return not self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, error: TransferError | None = None, *, at_once: bool = False) -> None:
        """Makes it end: when what is in flight has come, or at once with an `error` or when nothing is."""
        self._given_up = error
        self._stopped.set()
        mover = self._mover
        if error is not None and mover is not None:
            mover.interrupt(error)
        if mover is None or error is not None or at_once:
            self._client.cancel()

    def join(self) -> None:
        """Waits for its end."""
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._client:
                self._receive()
        except TransferError as error:
            if not (self._stopped.is_set() and self._given_up is None):
                self.failure = self._given_up or error
        except Exception as error:  # a fault of ours in one holder's thread must not hang the others
            logger.exception("fetching from worker %s failed by a fault of ours", self.source.worker_id)
            self.failure = SourceRefused(f"worker {self.source.worker_id}: {type(error).__name__}: {error}")
            self.clean = False
        finally:
            with self._intake.changed:
                self._intake.changed.notify_all()

    def _receive(self) -> None:
        answer = self._client.get_layout(self._intake.layout.fingerprint)
        self._intake.admit(f"worker {self.source.worker_id}", answer)
        if self._intake.finished:
            return
        placement = self._intake.placement
        device = None if placement.device_type == "cpu" else next(iter(placement.device_indices), None)
        on_device = device is not None or answer.transport.device_memory
        self.route = choose_route(self._policy, answer.transport, device_index=device)
        if self.route.because:
            logger.info("worker %s WRITEs by %s: %s", self.source.worker_id, self.route.transport, self.route.because)
        without_rdma = without_sockets = False
        while True:
            try:
                self._under_lease(self.route, answer.transport.chunk_port)
                return
            except (NoChunkPort, NotOneSided, NixlError, TransferStalled) as error:
                without_rdma = without_rdma or self._may_be_unreachable()
                without_sockets = without_sockets or isinstance(error, NoChunkPort)
                if not (isinstance(error, NoChunkPort | NotOneSided) or self._may_be_unreachable()):
                    raise
                self.route = self._policy.instead(
                    answer.transport,
                    device_memory=on_device,
                    without_rdma=without_rdma,
                    without_sockets=without_sockets,
                )
                how = "sends over TCP" if self.route.operation == "send" else "WRITEs"
                logger.warning("worker %s: %s; it %s instead", self.source.worker_id, error, how)

    def _may_be_unreachable(self) -> bool:
        """Whether RDMA, rather than the holder, may have failed: nothing came, and other ways are allowed."""
        route = self.route
        over_rdma = route is not None and route.transport == "rdma" and not self._policy.rdma_only
        return over_rdma and not self._anything_came and self._given_up is None

    def _under_lease(self, route: Route, chunk_port: int) -> None:
        lease_id = self._client.prepare()
        try:
            self._transfer(lease_id, route, chunk_port)
        finally:
            try:
                self._client.release(lease_id)
            except TransferError as error:  # the lease ends by itself
                logger.debug("%s", error)

    def _transfer(self, lease_id: str, route: Route, chunk_port: int) -> None:
        name = self.source.worker_id
        self._intake.join(name)
        done = False
        session = self._sessions.take(route.tls) if route.by_nixl else None
        verifying = _Verifier(self._intake, name)
        try:
            # Progress from here on: what the holder is told by `_open` makes it connect at once.
            progress = session.progressing() if session is not None else nullcontext()
            keeper = LeaseKeeper(self._client, lease_id) if route.operation != "write" else nullcontext()
            with progress, keeper as lease, closing(self._open(lease_id, route, session, chunk_port)) as mover:
                self._mover = mover
                try:
                    self._fetch(lease_id, lease, mover, verifying)
                except (SourceUnreachable, TransferStalled, PeerLost) as error:
                    if isinstance(error, SourceUnreachable) or not self._may_be_unreachable():
                        self._client.cancel()  # a call that waits for a holder that is gone holds up the fence
                    raise
            done = True
        finally:
            self._mover = None
            if session is not None:
                session.fence()
            verifying.close()
            # Over connections that are closed nothing arrives any more: there it is clean whatever happened.
            self.clean = self.clean and (done or self._intake.finished or route.operation == "send")
            self._intake.drop(name)

    def _fetch(self, lease_id: str, lease: LeaseKeeper | None, mover: Mover, verifying: _Verifier) -> None:
        """Asks, fetches, verifies; goes on with what arrives while an answer is on its way.

        Without a `lease` to look at, what is fetched renews it.
        """
        name = self.source.worker_id
        count = len(self._intake.chunks)
        asking = _Asking()
        sign_of_life_seconds = self._settings.stall_timeout_seconds / 4
        while not self._intake.finished:
            if self._given_up is not None:
                raise self._given_up
            now = time.monotonic()
            idle = mover.idle
            leaving = self._stopped.is_set()
            if leaving and idle:
                return
            if asking.call is None:
                wanted = _NOTHING if leaving or now < asking.pause_until else self._intake.wanted(name)
                enough = wanted.most >= max(1, self._intake.limit(name) // 2)
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
                self._take_answer(asking, mover, count)
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

    def _take_answer(self, asking: _Asking, mover: Mover, count: int) -> None:
        """Books what the holder said, and has the mover fetch what it granted."""
        if asking.call is None:
            return
        name = self.source.worker_id
        answer = asking.call.result()
        asking.call = None
        asking.asked_at = time.monotonic()
        if answer.version != asking.version:
            asking.have = all_chunks(count) if answer.complete else set_from_bytes(answer.have, count)
            self._intake.has(name, asking.have)
            asking.version = answer.version
        taken, asking.declined = self._intake.claim(name, answer.granted)
        if answer.leaving and self._intake.can_do_without(name):
            self._stopped.set()
        elif answer.leaving and mover.idle and not taken and not asking.wanted.chunks:
            raise SourceUnreachable(f"worker {name} is leaving")
        if taken:
            self.busy_at = asking.asked_at
            mover.ask(taken)
        asking.pause_until = asking.asked_at + answer.pause_ms / 1000

    def _rest(self, seconds: float | None) -> None:
        """Nothing to do here: until something changes, or for so long."""
        with self._intake.changed:
            if seconds is not None:
                self._intake.changed.wait(max(seconds, 0.0))
            elif not self._intake.wanted(self.source.worker_id).most and not self._intake.finished:
                self._intake.changed.wait(_NEWS_WAIT_SECONDS / 10)

    def _open(self, lease_id: str, route: Route, session: AgentSession | None, chunk_port: int) -> Mover:
        if route.operation == "send":
            return self._connect(lease_id, chunk_port)
        placement = self._intake.placement
        extents = [
            mx_pb2.Extent(address=address, device_id=device)
            for address, device in zip(placement.addresses, placement.device_indices, strict=True)
        ]
        reads = route.operation == "read"
        operation = mx_pb2.OPERATION_READ if reads else mx_pb2.OPERATION_WRITE
        answer = self._client.open_transfer(
            lease_id,
            self._intake.layout.fingerprint,
            session.metadata() if session is not None else b"",
            extents,
            operation,
            device_memory=placement.device_type != "cpu",
        )
        if answer.operation != operation or len(answer.extents) != len(extents):
            raise SourceRefused(f"worker {self.source.worker_id} opened another transfer than was asked for")
        if not reads:
            if session is None:
                raise SourceRefused(
                    f"worker {self.source.worker_id} would WRITE by {route.transport}, without an agent"
                )
            stall_seconds = self._settings.stall_timeout_seconds
            return NixlWriteMover(self._client, lease_id, session, stall_timeout_seconds=stall_seconds)
        chunks = self._intake.chunks
        remote = chunks.addresses([extent.address for extent in answer.extents])
        if session is None:
            return SameHostMover(
                self.source.worker_id,
                route.process,
                chunks,
                self._intake.addresses,
                remote,
                hashed=self._intake.hashed_on_arrival,
                stall_timeout_seconds=self._settings.stall_timeout_seconds,
                threads=self._settings.same_host_threads,
            )
        tcp = TcpReceived() if route.transport == "cuda-ipc" else None
        peer = session.connect(answer.nixl_metadata)
        devices = {extent.device_id for extent in answer.extents} if answer.device_memory else set()
        if len(devices) > 1:
            raise SourceRefused(f"worker {self.source.worker_id} has weights on devices {sorted(devices)}")
        return NixlReadMover(session, peer, chunks, self._intake.addresses, remote, next(iter(devices), None), tcp)

    def _connect(self, lease_id: str, chunk_port: int) -> Mover:
        intake, settings = self._intake, self._settings
        fingerprint = intake.layout.fingerprint
        answer = self._client.open_transfer(lease_id, fingerprint, b"", (), mx_pb2.OPERATION_SEND)
        if answer.operation != mx_pb2.OPERATION_SEND or len(answer.token) != TOKEN_BYTES:
            raise SourceRefused(f"worker {self.source.worker_id} opened another transfer than was asked for")
        return TcpMover(
            self._client,
            chunk_port,
            answer.token,
            intake.chunks,
            intake.addresses,
            hashed=intake.hashed_on_arrival,
            connections=settings.tcp_connections,
            stall_timeout_seconds=settings.stall_timeout_seconds,
        )


class _Verifier:
    """Compares chunks with their digests while others arrive, and books those that are right."""

    def __init__(self, intake: Intake, holder: str) -> None:
        self._intake = intake
        self._holder = holder
        self._pool = ThreadPoolExecutor(_VERIFY_THREADS, thread_name_prefix="mx-verify")
        self._running: set[Future[None]] = set()

    def submit(self, chunk: int, digest: bytes | None, then: Callable[[], None]) -> None:
        """Takes a chunk that has arrived, with its digest if there is one. Raises DigestMismatch in that case.

        Without one, `then` is called when the chunk is booked, or was refused.
        """
        if digest is not None:
            self._book(chunk, self._intake.verify(chunk, digest))
            return
        running = self._pool.submit(self._verify, chunk)
        self._running.add(running)
        running.add_done_callback(lambda _: then())

    def collect(self, *, wait: bool) -> None:
        """Raises what the verification of chunks raised (DigestMismatch); with `wait`, once all are through."""
        for running in [running for running in self._running if wait or running.done()]:
            self._running.remove(running)
            running.result()

    def _verify(self, chunk: int) -> None:
        self._book(chunk, self._intake.verify(chunk))

    def _book(self, chunk: int, right: bool) -> None:
        if not right:
            raise DigestMismatch(
                f"chunk {chunk} from worker {self._holder} is not what its digest promises; it is refused"
            )
        self._intake.accept(self._holder, chunk)

    def close(self) -> None:
        """Waits for what runs: nothing reads the memory afterwards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
