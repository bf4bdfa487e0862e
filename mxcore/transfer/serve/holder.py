"""What a worker serves: its layout's bytes in memory, their digests, and leases on them.

A holder may be incomplete: a worker that is still receiving serves each chunk as soon as it is verified. Readers ask
before they fetch: that renews their lease, tells them what is there, and lets the holder choose the chunks that it
granted least often, and how many. A lease says that somebody reads. It ends when it is released, or expires when its
receiver was silent for too long; the holder's memory stays as it is until every lease has ended (`drain`).
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
import uuid
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence

from mxcore.errors import FenceFailed, HolderBusy, HolderDraining, LayoutMismatch, LeaseEnded, NixlError, TransferError
from mxcore.metrics import GIVEN_BYTES, LEASES, LEASES_NOW, SERVING
from mxcore.sockets import ChunkSender
from mxcore.transfer.layout import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    ChunkDigests,
    ChunkRequest,
    Chunks,
    GrantCounts,
    Layout,
    Placement,
    Scalars,
    all_chunks,
    chunk_digests,
)
from mxcore.transfer.move import FENCE_SECONDS, GREETING, TOKEN_BYTES, AgentSession, Move, cut_off
from mxcore.transfer.route import digester_of, require_movable
from mxcore.transfer.serve.holder_agent import HolderAgent
from mxcore.transfer.serve.lease import AskAnswer, Lease
from mxcore.transfer.serve.origin import Origin
from mxcore.transfer.serve.rate_limit import RateLimit
from mxcore.transfer.serve.staging import Staging
from mxserver.wire.proto import mx_pb2

__all__ = ["MOST_CONNECTIONS", "Holder"]

logger = logging.getLogger(__name__)

LEASE_SECONDS = 15.0
MOST_READERS = 8
MOST_CONNECTIONS = 8  # of one reader to the chunk port
_IDLE_LEASES = 2.0  # times a lease's seconds without anything read, then another reader may have the place
_MOST_TIMES_GRANTED = 2  # each chunk, to one lease; a wrong one is asked for again
_MORE_GRANTED = 16  # of a small model
_PUSHES_IN_FLIGHT = 4  # chunks of one receiver
_PUSHED_BYTES_IN_FLIGHT = 32 << 20  # enough for any link; UCX completes all that is begun at about the same time
_MOST_WAITING = 16  # readers that wait for new chunks; more are answered at once
_UNASKED_PAUSE_SECONDS = 0.1


_never_freed: list[object] = []  # memory that readers may still reach (FenceFailed)


class Holder:
    """The bytes of one layout with digests, complete or (with `have`, a set of chunks) not yet; thread-safe.

    Keeps `keep_alive` (the engine's model) until it is closed. `make_session` is called when a reader first needs an
    agent (`agent`). At most `most_readers` have leases at a time, and all together are granted `rate_limit` bytes a
    second (0: no limit). `origin`: who made the `digests`; unless said, another worker where they are given, else this
    one. Raises LayoutUnsupported.
    """

    def __init__(
        self,
        layout: Layout,
        placement: Placement,
        make_session: Callable[[], AgentSession],
        *,
        scalars: Scalars | None = None,
        digests: ChunkDigests | None = None,
        keep_alive: object = None,
        chunk_bytes: int = CHUNK_BYTES,
        lease_seconds: float = LEASE_SECONDS,
        have: int | None = None,
        most_readers: int = MOST_READERS,
        rate_limit: float = 0.0,
        origin: Origin | None = None,
    ) -> None:
        require_movable(placement)
        self.layout = layout
        self.placement = placement
        self.agent = HolderAgent(make_session, layout, placement)
        self.scalars = dict(scalars or {})
        self.chunks = Chunks(layout, chunk_bytes)
        self.addresses = self.chunks.local_addresses(placement)
        self.staging = Staging(self.chunks, self.addresses, placement)
        self.origin = origin or (Origin.own(layout) if digests is None else Origin.received({}))
        self.digests = digests or chunk_digests(digester_of(placement), self.chunks, self.addresses)
        if len(self.digests.values) != DIGEST_BYTES * len(self.chunks):
            raise ValueError(f"{len(self.digests.values)} bytes of digests for {len(self.chunks)} chunks")
        self.lease_seconds = lease_seconds
        self.most_readers = most_readers
        self._rate_limit = RateLimit(rate_limit, burst_bytes=chunk_bytes)
        self._everything = all_chunks(len(self.chunks))
        self._have = self._everything if have is None else have
        self._version = 1
        self._grant_counts = GrantCounts()
        self._waiting = 0
        self._sending = 0  # connections that chunks are sent on
        self._bytes_sent = 0
        self._keep_alive = keep_alive
        self._changed = threading.Condition()
        self._leases: dict[str, Lease] = {}
        self._draining = False
        self._closed = False
        SERVING.add()

    @property
    def draining(self) -> bool:
        """Whether new readers are refused."""
        return self._draining

    @property
    def live_leases(self) -> int:
        """How many leases have not ended."""
        with self._changed:
            self._expire()
            return len(self._leases)

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return self._have == self._everything

    @property
    def chunks_had(self) -> int:
        """How many chunks are there."""
        return self._have.bit_count()

    @property
    def bytes_granted(self) -> int:
        """What readers were allowed to fetch so far."""
        return self._bytes_sent

    def serves(self, layout: Layout, placement: Placement, scalars: Scalars, digests: ChunkDigests | None) -> bool:
        """Whether it serves exactly these weights, and is not draining."""
        ours = (self.layout.fingerprint, self.placement, self.scalars, self.digests)
        return ours == (layout.fingerprint, placement, dict(scalars), digests) and not self._draining

    def unchanged(self) -> bool:
        """Whether the memory still has the digests; also after `close`, while the memory is kept."""
        digester = digester_of(self.placement)
        return chunk_digests(digester, self.chunks, self.addresses, kind=self.digests.kind) == self.digests

    def wrong_chunks(self, first: int, end: int) -> list[int]:
        """Those of the chunks from `first` up to `end` whose bytes in memory do not have their digests.

        Raises CudaError, HostMemoryLimit.
        """
        starts = self.chunks.segment_starts
        begin, after = starts[first], starts[end]
        made = digester_of(self.placement).many(
            self.digests.kind,
            self.addresses[begin:after],
            self.chunks.lengths[begin:after],
            array("Q", [start - begin for start in starts[first : end + 1]]),
        )
        expected = self.digests.values[DIGEST_BYTES * first : DIGEST_BYTES * end]
        if made == expected:
            return []
        found = ChunkDigests(made, self.digests.kind)
        return [chunk for chunk in range(first, end) if found.of_chunk(chunk - first) != self.digests.of_chunk(chunk)]

    def keep(self, keep_alive: object) -> None:
        """Keeps another object alive as well until it is closed."""
        self._keep_alive = (self._keep_alive, keep_alive)

    def never_free(self) -> None:
        """Keeps the memory for ever: somebody reads it, and does not end."""
        _never_freed.append(self._keep_alive)

    def update(self, have: int) -> None:
        """Sets which chunks are there and verified, while the worker is still receiving."""
        with self._changed:
            if have != self._have:
                if self._have & ~have:
                    self.staging.forbid_all()
                    for lease in self._leases.values():
                        if lease.sender is not None:
                            lease.sender.forbid_all()
                self._have = have
                self._version += 1
                self._changed.notify_all()

    def ask(
        self,
        lease_id: str,
        wanted: ChunkRequest,
        known_version: int,
        wait_seconds: float = 0.0,
        declined: Sequence[int] = (),
    ) -> AskAnswer:
        """What a reader may fetch now; renews its lease.

        With nothing to grant, it waits up to `wait_seconds` for a version after `known_version`. `declined` are
        chunks that were granted and that the reader does not fetch. Raises LeaseEnded, also for a reader that was
        granted everything twice: it takes nothing of it.
        """
        with self._changed:
            lease = self.renew(lease_id)
            given_back = [chunk for chunk in declined if 0 <= chunk < len(self.chunks)]
            self._grant_counts.take_back(given_back)
            lease.granted -= min(len(given_back), lease.granted)
            if lease.granted > _MOST_TIMES_GRANTED * len(self.chunks) + _MORE_GRANTED:
                self._end(lease)
                raise LeaseEnded(f"lease {lease_id!r} was granted each chunk {_MOST_TIMES_GRANTED} times; it has ended")
            pause = 0.0
            if not wanted.chunks & self._have and wait_seconds > 0:
                pause = self._wait_for_news(lease, known_version, wait_seconds)
            granted: list[int] = []
            available = wanted.chunks & self._have
            if available:
                most, pause = self._rate_limit.allowed(min(wanted.most, available.bit_count()), self.chunks.chunk_bytes)
                granted = self._grant_counts.grant(available, wanted.preferred, most)
                self._note_granted(lease, granted)
                granted_bytes = sum(map(self.chunks.bytes_of, granted))
                self._bytes_sent += granted_bytes
                GIVEN_BYTES.add(lease.transport, amount=granted_bytes)
            return AskAnswer(granted, self._version, self._have, self.complete, self._draining, pause)

    def _note_granted(self, lease: Lease, granted: Sequence[int]) -> None:
        if granted:
            lease.read_at = time.monotonic()
            lease.granted += len(granted)
            if lease.sender is not None:
                lease.sender.allow(granted)
            self.staging.allow(lease.lease_id, granted)

    def _wait_for_news(self, lease: Lease, known_version: int, wait_seconds: float) -> float:
        """Waits for another version; returns the seconds to pause where too many wait already."""
        if self._waiting >= _MOST_WAITING:
            return _UNASKED_PAUSE_SECONDS
        self._waiting += 1
        try:
            self._changed.wait_for(
                lambda: self._version != known_version or self._draining or lease.ended, wait_seconds
            )
        finally:
            self._waiting -= 1
        return 0.0

    def grant(self, reader: str = "") -> Lease:
        """A new lease for `reader`. Raises HolderDraining, HolderBusy.

        Where all places are taken, a lease ends for it that read nothing for long, or one of a reader that has all.
        """
        with self._changed:
            if self._draining:
                LEASES.add("draining")
                raise HolderDraining("this worker is leaving and takes no new readers; ask another one")
            self._expire()
            if len(self._leases) >= self.most_readers:
                if (other := self._replaceable(reader)) is None:
                    LEASES.add("busy")
                    raise HolderBusy(f"{len(self._leases)} workers are reading from this one; ask another one")
                logger.info("lease %s of %s ends: another reader needs its place", other.lease_id, other.reader)
                self._end(other, "replaced")
            now = time.monotonic()
            lease = Lease(uuid.uuid4().hex, now + self.lease_seconds, reader=reader, read_at=now)
            self._leases[lease.lease_id] = lease
            LEASES.add("granted")
            LEASES_NOW.add()
            return lease

    def _replaceable(self, reader: str) -> Lease | None:
        """A lease whose place another `reader` may take: the one that read nothing for longest."""
        lease = min(self._leases.values(), key=lambda lease: lease.read_at)
        if time.monotonic() - lease.read_at > _IDLE_LEASES * self.lease_seconds:
            return lease
        readers = {each.reader for each in self._leases.values()}
        return lease if len(self._leases) > 1 and len(readers) == 1 and reader not in readers else None

    def renew(self, lease_id: str) -> Lease:
        """Extends a lease. Raises LeaseEnded."""
        with self._changed:
            self._expire()
            lease = self._leases.get(lease_id)
            if lease is None:
                raise LeaseEnded(f"lease {lease_id!r} has ended or never was; prepare a new read")
            lease.deadline = time.monotonic() + self.lease_seconds
            return lease

    def release(self, lease_id: str) -> None:
        """Ends a lease. Raises LeaseEnded."""
        with self._changed:
            self._end(self.renew(lease_id), "released")

    def open_transfer(
        self, lease_id: str, metadata: bytes, extent_addresses: Sequence[int], device: int | None = None
    ) -> None:
        """Makes the receiver's agent and memory (on its `device`) known under its lease, for WRITEs into it.

        Raises LeaseEnded, LayoutMismatch (another number of extents), NixlError (metadata of no use, or no agent here).
        """
        lease = self.renew(lease_id)
        if len(extent_addresses) != len(self.layout.extent_bytes):
            raise LayoutMismatch(
                f"the receiver has {len(extent_addresses)} extents, this worker has {len(self.layout.extent_bytes)}"
            )
        session = self.agent.session()
        peer = session.connect(metadata)
        with self._changed:
            if lease.ended or lease.peer is not None:
                session.disconnect(peer)
                raise LeaseEnded(f"lease {lease_id!r} has ended, or has an open transfer already")
            lease.connecting.enter_context(session.progressing())
            lease.peer, lease.transport = peer, "tcp"
            lease.remote_addresses = self.chunks.addresses(extent_addresses)
            lease.remote_device = device

    def open_sending(self, lease_id: str) -> bytes:
        """The token by which the receiver's connections to the chunk port belong to this lease.

        Raises LeaseEnded.
        """
        with self._changed:
            lease = self.renew(lease_id)
            lease.token = lease.token or secrets.token_bytes(TOKEN_BYTES)
            lease.transport = "tcp"
            if lease.sender is None:
                lease.sender = ChunkSender(self.addresses, self.chunks.lengths, self.chunks.segment_starts)
            return lease.token

    def open_staging(self, lease_id: str) -> mx_pb2.StagingBuffer:
        """The buffer that the lease's chunks come through. Raises LeaseEnded, CudaError."""
        with self._changed:
            lease = self.renew(lease_id)
            lease.transport = "cuda-ipc"
            return self.staging.open(lease.lease_id)

    def send_chunks(self, token: bytes, connection: socket.socket) -> None:
        """Greets the receiver that showed `token`, and sends the chunks that it was granted, once each.

        Until either side ends it.

        A receiver that is lost in the middle of a chunk loses its lease. Raises LeaseEnded for an unknown token,
        HolderBusy where its receiver has too many connections, OSError where the connection fails.
        """
        with self._changed:
            self._expire()
            lease = next((each for each in self._leases.values() if secrets.compare_digest(each.token, token)), None)
            if lease is None or (sender := lease.sender) is None:
                raise LeaseEnded("a connection to the chunk port shows no lease's token")
            if len(lease.connections) >= MOST_CONNECTIONS:
                raise HolderBusy(f"a reader has {MOST_CONNECTIONS} connections to the chunk port")
            lease.connections.add(connection)
            self._sending += 1
        try:
            connection.sendall(GREETING)
            if error := sender.serve(connection):
                raise OSError(error, os.strerror(error))
        except OSError:
            with self._changed:
                self._end(lease)
            raise
        finally:
            with self._changed:
                lease.connections.discard(connection)
                self._sending -= 1
                self._changed.notify_all()

    def push(
        self, lease_id: str, chunks: Sequence[int], cancelled: Callable[[], bool], *, notify: bool = False
    ) -> Iterator[int]:
        """WRITEs chunks into the receiver's memory; yields each one that has arrived there.

        With `notify` the receiver's agent is notified of each as well, which costs both sides less than a message.

        Raises LeaseEnded (also while it runs: the lease was ended), PeerLost, TransferStalled, NixlError, and
        ValueError for chunks that are not there or a transfer that was not opened.
        """
        if bad := [chunk for chunk in chunks if not (0 <= chunk < len(self.chunks) and self._have >> chunk & 1)]:
            raise ValueError(f"chunks {bad[:5]} of {len(self.chunks)} are not here")
        with self._changed:
            lease = self.renew(lease_id)
            if lease.peer is None:
                raise ValueError(f"lease {lease_id!r} has no open transfer that WRITEs")
            lease.pushes += 1

        moves = self._moves(lease, chunks)
        try:
            session = self.agent.session()
            with session.progressing():
                for chunk in session.run(
                    "write",
                    moves,
                    lease.peer,
                    in_flight_limit=max(2, min(_PUSHES_IN_FLIGHT, _PUSHED_BYTES_IN_FLIGHT // self.chunks.chunk_bytes)),
                    notify=notify,
                    cancelled=lambda: lease.ended or cancelled(),
                ):
                    self.renew(lease_id)
                    yield chunk
        except TransferError:
            with self._changed:
                self._end(lease)  # the receiver is gone, or as good as
            raise
        finally:
            moves.close()
            with self._changed:
                lease.pushes -= 1
                lease.connecting.close()
                self._disconnect(lease)

    def _moves(self, lease: Lease, chunks: Sequence[int]) -> Generator[Move, None, None]:
        """The WRITEs of chunks, after the lease's earlier stream has begun all of its own.

        So chunks arrive one after the other, and are verified meanwhile, instead of all at the end.
        """
        with lease.turn:
            for chunk in chunks:
                local, remote, lengths = (
                    self.chunks.slice_of(values, chunk)
                    for values in (self.addresses, lease.remote_addresses, self.chunks.lengths)
                )
                yield Move(chunk, local, remote, lengths, lease.remote_device)

    def drain(self, timeout_seconds: float) -> bool:
        """Refuses new readers and waits until all leases have ended; False when some still read after the time-out."""
        give_up = time.monotonic() + timeout_seconds
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            while True:
                self._expire()
                if not self._leases:
                    return True
                now = time.monotonic()
                if now >= give_up:
                    logger.warning("%d readers are still reading after %g s", len(self._leases), timeout_seconds)
                    return False
                next_end = min(lease.deadline for lease in self._leases.values())
                self._changed.wait(max(0.01, min(give_up, next_end) - now))

    def close(self) -> None:
        """Ends all leases, destroys the agent, then lets go of the memory. Idempotent; never waits for readers.

        Where that does not end in time, the memory is kept for ever, and the log says so.
        """
        with self._changed:
            SERVING.add(amount=0 if self._closed else -1)
            self._draining = self._closed = True
            for lease in list(self._leases.values()):
                self._end(lease)
            over = self._changed.wait_for(lambda: not self._sending, FENCE_SECONDS)  # shut down: they end at once
        over = self.staging.close(FENCE_SECONDS) and over
        try:
            self.agent.close()
        except FenceFailed as error:
            over = False
            logger.critical("readers may still reach weights that are no longer served: %s", error)
        if not over:
            self.never_free()
        self._keep_alive = None

    def _expire(self) -> None:
        now = time.monotonic()
        for lease in [lease for lease in self._leases.values() if lease.deadline < now]:
            logger.info("lease %s ended: no sign of its receiver for %g s", lease.lease_id, self.lease_seconds)
            self._end(lease, "expired")

    def _end(self, lease: Lease, event: str = "cut") -> None:
        if self._leases.pop(lease.lease_id, None) is not None:
            LEASES.add(event)
            LEASES_NOW.add(amount=-1)
        lease.ended = True
        for connection in lease.connections:
            cut_off(connection)
        lease.connecting.close()
        self.staging.end(lease.lease_id)
        self._disconnect(lease)
        self._changed.notify_all()

    def _disconnect(self, lease: Lease) -> None:
        """Forgets the receiver of an ended lease once nothing is being pushed to it."""
        if not lease.ended or lease.pushes or lease.peer is None:
            return
        peer, lease.peer = lease.peer, None
        try:
            self.agent.session().disconnect(peer)
        except NixlError as error:  # the agent was destroyed meanwhile, and the connection with it
            logger.debug("forgetting %s: %s", peer, error)
