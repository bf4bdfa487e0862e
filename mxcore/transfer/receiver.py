"""Pulls all chunks of a layout from holders into this process' memory, and verifies each one.

Nothing may be used before `receive` has returned: then every chunk's bytes have been compared with its holder's
digest, after the agent that they came through was destroyed or while nothing else could be written by it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeAlias

from mxcore.digest import xxh3_64_segments
from mxcore.errors import (
    DigestMismatch,
    LayoutMismatch,
    NotOneSided,
    SourceRefused,
    SourceUnreachable,
    TransferError,
    TransferStalled,
)
from mxcore.settings import WorkerSettings
from mxcore.transfer.agent_session import AgentSession, require_host_memory
from mxcore.transfer.chunks import CHUNK_BYTES, DIGEST_BYTES, DIGEST_KIND, ChunkPlan, Chunks
from mxcore.transfer.layout import Layout, Placement
from mxcore.transfer.movers import PullByRead, PullByWrite
from mxcore.transfer.scalars import scalars_digest, scalars_from_proto
from mxcore.transfer.source_client import Source, SourceClient
from mxcore.transfer.transports import Route, UcxPolicy, choose_route
from mxserver.wire import mx_pb2

__all__ = ["ReceiveReport", "Receiver"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_Digests: TypeAlias = bytes  # ReceiveReport has a field of that name

_NAMED_DIFFERENCES = 5
_VERIFY_THREADS = 1
_IN_FLIGHT_CHUNKS = 32  # of one holder: asked for and not verified yet


@dataclass(frozen=True)
class ReceiveReport:
    """What `receive` did. `digests`: 8 bytes little-endian a chunk, so that serving needs no second pass."""

    bytes: int
    tensors: int
    chunks_verified: int
    seconds: float
    source_worker_id: str
    operation: str
    transport: str
    scalars: dict[str, float]
    digests: _Digests
    failures: tuple[str, ...] = ()

    @property
    def gigabytes_per_second(self) -> float:
        """10^9 bytes a second, from the first call to the last verified chunk."""
        return self.bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class _Offer:
    """What a holder has, checked against what is wanted here."""

    digests: bytes
    scalars: dict[str, float]
    route: Route


class Receiver:
    """One attempt of one worker to fill its memory; use it once, from one thread.

    `scalar_names` must be exactly the holder's. `progress` is called with (bytes verified, bytes in all).
    """

    def __init__(
        self,
        layout: Layout,
        placement: Placement,
        *,
        settings: WorkerSettings,
        worker_id: str,
        scalar_names: Sequence[str] = (),
        progress: Progress | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        require_host_memory(placement)
        self._layout = layout
        self._placement = placement
        self._settings = settings
        self._worker_id = worker_id
        self._scalar_names = frozenset(scalar_names)
        self._progress = progress
        self._policy = UcxPolicy.from_environment(settings.transport)
        self._chunks = Chunks(layout, chunk_bytes)
        self._addresses = self._chunks.local_addresses(placement)
        self._plan = ChunkPlan(range(len(self._chunks)), in_flight_limit=_IN_FLIGHT_CHUNKS)
        self._digests = b""
        self._bytes_done = 0

    def receive(self, sources: Sequence[Source]) -> ReceiveReport:
        """Tries the sources in turn until every chunk is verified; each goes on where the one before stopped.

        Raises:
            TransferError: the last source's error, when none of them could give everything. The memory then holds
                anything, and nothing arrives in it any more.
        """
        started = time.monotonic()
        deadline = started + self._settings.transfer_timeout_seconds
        failures: list[TransferError] = []
        for source in sources:
            if failures and time.monotonic() > deadline:
                break
            try:
                offer = self._receive_from(source, deadline)
            except TransferError as error:
                logger.warning("worker %s (%s) gives no weights: %s", source.worker_id, source.endpoint, error)
                failures.append(error)
                continue
            return ReceiveReport(
                bytes=self._layout.total_bytes,
                tensors=len(self._layout.tensors),
                chunks_verified=len(self._plan.completed),
                seconds=time.monotonic() - started,
                source_worker_id=source.worker_id,
                operation=offer.route.operation,
                transport=offer.route.transport,
                scalars=offer.scalars,
                digests=self._digests,
                failures=tuple(str(error) for error in failures),
            )
        if not failures:
            raise SourceUnreachable("there is no worker to receive weights from")
        raise failures[-1]

    def _receive_from(self, source: Source, deadline: float) -> _Offer:
        with SourceClient(source, timeout_seconds=self._settings.server_timeout_seconds) as client:
            offer = self._check(client)
            if offer.digests != self._digests:  # other bytes than an earlier holder's: none of those is kept
                self._digests = offer.digests
                self._plan.reopen(self._plan.completed)
                self._bytes_done = 0
            if self._plan.finished:
                return offer
            try:
                self._under_lease(client, offer, deadline)
            except NotOneSided as error:
                logger.info("%s; it WRITEs instead", error)
                offer = replace(offer, route=Route("write", "tcp", self._policy.fenceable))
                self._under_lease(client, offer, deadline)
            return offer

    def _under_lease(self, client: SourceClient, offer: _Offer, deadline: float) -> None:
        lease_id = client.prepare()
        try:
            self._transfer(client, lease_id, offer, deadline)
        finally:
            self._release(client, lease_id)

    def _check(self, client: SourceClient) -> _Offer:
        answer = client.get_layout(self._layout.fingerprint)
        where = f"worker {client.source.worker_id}"
        if answer.fingerprint != self._layout.fingerprint:
            raise LayoutMismatch(f"{where} has another layout: {self._differences(answer.layout)}")
        if answer.chunk_bytes != self._chunks.chunk_bytes or answer.digest_kind != DIGEST_KIND:
            raise SourceRefused(
                f"{where} has chunks of {answer.chunk_bytes} bytes with {answer.digest_kind!r} digests; "
                f"this worker needs {self._chunks.chunk_bytes} and {DIGEST_KIND!r}"
            )
        if len(answer.digests) != DIGEST_BYTES * len(self._chunks):
            raise SourceRefused(f"{where} has {len(answer.digests)} bytes of digests for {len(self._chunks)} chunks")
        return _Offer(answer.digests, self._check_scalars(where, answer), choose_route(self._policy, answer.transport))

    def _check_scalars(self, where: str, answer: mx_pb2.GetLayoutResponse) -> dict[str, float]:
        scalars = scalars_from_proto(answer.scalars)
        if scalars.keys() != self._scalar_names:
            missing = sorted(self._scalar_names - scalars.keys())
            extra = sorted(scalars.keys() - self._scalar_names)
            raise LayoutMismatch(
                f"{where} has other scalars: without {missing[:_NAMED_DIFFERENCES]}, "
                f"with {extra[:_NAMED_DIFFERENCES]} that are unknown here"
            )
        if scalars_digest(scalars) != answer.scalars_digest:
            raise DigestMismatch(f"{where}: the scalars are not those that their digest promises")
        return scalars

    def _differences(self, message: mx_pb2.Layout) -> str:
        lines = self._layout.differences(Layout.from_proto(message))
        more = f" and {len(lines) - _NAMED_DIFFERENCES} more" if len(lines) > _NAMED_DIFFERENCES else ""
        return "; ".join(lines[:_NAMED_DIFFERENCES]) + more

    def _transfer(self, client: SourceClient, lease_id: str, offer: _Offer, deadline: float) -> None:
        holder = client.source.worker_id
        self._plan.add_holder(holder)
        clean = False
        session = AgentSession(
            self._worker_id,
            tls=offer.route.tls,
            backend=self._settings.nixl_backend,
            stall_timeout_seconds=self._settings.stall_timeout_seconds,
        )
        verifying = _Verifier(self, holder)
        try:
            session.register(self._layout, self._placement)
            mover = self._open(client, lease_id, offer.route, session)
            with mover:
                while not self._plan.finished:
                    if time.monotonic() > deadline:
                        raise TransferStalled(
                            f"the transfer took longer than {self._settings.transfer_timeout_seconds:g} s "
                            "(MX_TRANSFER_TIMEOUT)"
                        )
                    mover.ask(self._plan.take(holder))
                    for chunk in mover.arrived():
                        verifying.submit(chunk)
                    verifying.collect(wait=mover.idle)
            clean = True
        finally:
            session.fence()
            verifying.close()
            self._plan.drop_holder(holder)
            if not clean:
                self._recheck()

    def _open(
        self, client: SourceClient, lease_id: str, route: Route, session: AgentSession
    ) -> PullByRead | PullByWrite:
        placement = self._placement
        extents = [
            mx_pb2.Extent(address=address, device_id=device)
            for address, device in zip(placement.addresses, placement.device_indices, strict=True)
        ]
        reads = route.operation == "read"
        operation = mx_pb2.OPERATION_READ if reads else mx_pb2.OPERATION_WRITE
        answer = client.open_transfer(lease_id, self._layout.fingerprint, session.metadata(), extents, operation)
        if answer.operation != operation or len(answer.extents) != len(extents):
            raise SourceRefused(f"worker {client.source.worker_id} opened another transfer than was asked for")
        stall = self._settings.stall_timeout_seconds
        if not reads:
            return PullByWrite(client, lease_id, stall_timeout_seconds=stall)
        peer = session.connect(answer.nixl_metadata)
        remote = self._chunks.addresses([extent.address for extent in answer.extents])
        return PullByRead(client, lease_id, session, peer, self._chunks, self._addresses, remote, route.transport)

    def verify(self, chunk: int) -> bool:
        """Whether the chunk's bytes here are those of the digest."""
        expected = self._digests[DIGEST_BYTES * chunk : DIGEST_BYTES * (chunk + 1)]
        addresses = self._chunks.slice_of(self._addresses, chunk)
        digest = xxh3_64_segments(addresses, self._chunks.slice_of(self._chunks.lengths, chunk))
        return digest.to_bytes(DIGEST_BYTES, "little") == expected

    def accept(self, holder: str, chunk: int) -> None:
        """Takes a verified chunk into the books."""
        self._plan.done(holder, chunk)
        self._bytes_done += self._chunks.bytes_of(chunk)
        if self._progress is not None:
            self._progress(self._bytes_done, self._layout.total_bytes)

    def _recheck(self) -> None:
        """After a failure and the fence: what was verified before must still be right, or is fetched anew."""
        wrong = [chunk for chunk in self._plan.completed if not self.verify(chunk)]
        if wrong:
            logger.warning("chunks %s were overwritten after they were verified; they are fetched again", wrong)
            self._plan.reopen(wrong)
            self._bytes_done -= sum(map(self._chunks.bytes_of, wrong))

    def _release(self, client: SourceClient, lease_id: str) -> None:
        try:
            client.release(lease_id)
        except TransferError as error:  # the lease ends by itself
            logger.debug("%s", error)


class _Verifier:
    """Compares chunks with their digests while others arrive."""

    def __init__(self, receiver: Receiver, holder: str) -> None:
        self._receiver = receiver
        self._holder = holder
        self._pool = ThreadPoolExecutor(_VERIFY_THREADS, thread_name_prefix="mx-verify")
        self._running: dict[Future[bool], int] = {}

    def submit(self, chunk: int) -> None:
        self._running[self._pool.submit(self._receiver.verify, chunk)] = chunk

    def collect(self, *, wait: bool) -> None:
        """Books what is verified; with `wait`, all of it. Raises DigestMismatch."""
        for future in [future for future in self._running if wait or future.done()]:
            chunk = self._running.pop(future)
            if not future.result():
                raise DigestMismatch(
                    f"chunk {chunk} from worker {self._holder} is not what its digest promises; it is refused"
                )
            self._receiver.accept(self._holder, chunk)

    def close(self) -> None:
        """Waits for what runs: nothing reads the memory afterwards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
