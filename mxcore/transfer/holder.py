"""What a worker serves: its layout's bytes in memory, their digests, and leases on them.

A lease says that somebody reads. It ends when it is released, or by itself when its receiver gave no sign for a
while; the holder's memory stays as it is until every lease has ended (`drain`).
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mxcore.digest import xxh3_64_many
from mxcore.errors import HolderDraining, LayoutMismatch, LeaseEnded, NixlError, TransferError
from mxcore.transfer.agent_session import AgentSession, Move, require_host_memory
from mxcore.transfer.chunks import CHUNK_BYTES, DIGEST_BYTES, Chunks
from mxcore.transfer.layout import Layout, Placement

__all__ = ["Holder", "Lease", "chunk_digests"]

logger = logging.getLogger(__name__)

LEASE_SECONDS = 15.0
_PUSHES_IN_FLIGHT = 4  # chunks of one receiver


@dataclass
class Lease:
    """One receiver's right to read. The holder's lock guards it."""

    lease_id: str
    deadline: float  # monotonic seconds; moved by every sign of the receiver
    peer: str | None = None  # the receiver's agent, once a transfer is open
    remote_addresses: array[int] = field(default_factory=lambda: array("Q"))  # of every segment, there
    pushes: int = 0  # streams that are running
    ended: bool = False


class Holder:
    """The bytes of one layout, complete and with digests; thread-safe.

    Keeps `keep_alive` (the engine's model) until it is closed. Exists only with registered memory: raises NixlError,
    NixlMissing, LayoutUnsupported.
    """

    def __init__(
        self,
        layout: Layout,
        placement: Placement,
        session: AgentSession,
        *,
        scalars: Mapping[str, float] | None = None,
        digests: bytes | None = None,
        keep_alive: object = None,
        chunk_bytes: int = CHUNK_BYTES,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        require_host_memory(placement)
        self.layout = layout
        self.placement = placement
        self.session = session
        self.scalars = dict(scalars or {})
        self.chunks = Chunks(layout, chunk_bytes)
        self.addresses = self.chunks.local_addresses(placement)
        self.digests = chunk_digests(self.chunks, self.addresses) if digests is None else digests
        if len(self.digests) != DIGEST_BYTES * len(self.chunks):
            raise ValueError(f"{len(self.digests)} bytes of digests for {len(self.chunks)} chunks")
        self.regions = session.register(layout, placement)
        self.lease_seconds = lease_seconds
        self._keep_alive = keep_alive
        self._changed = threading.Condition()
        self._leases: dict[str, Lease] = {}
        self._draining = False

    @property
    def draining(self) -> bool:
        """Whether new readers are refused."""
        return self._draining

    @property
    def live_leases(self) -> int:
        """Receivers that are reading, as far as known."""
        with self._changed:
            self._expire()
            return len(self._leases)

    def grant(self) -> Lease:
        """A new lease. Raises HolderDraining."""
        with self._changed:
            if self._draining:
                raise HolderDraining("this worker is leaving and takes no new readers; ask another one")
            self._expire()
            lease = Lease(uuid.uuid4().hex, time.monotonic() + self.lease_seconds)
            self._leases[lease.lease_id] = lease
            return lease

    def renew(self, lease_id: str) -> Lease:
        """A sign of the receiver. Raises LeaseEnded."""
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
            self._end(self.renew(lease_id))

    def open_transfer(self, lease_id: str, metadata: bytes, extent_addresses: Sequence[int]) -> None:
        """Makes the receiver's agent and memory known under its lease, for WRITEs into it.

        Raises LeaseEnded, LayoutMismatch (another number of extents), NixlError (metadata of no use).
        """
        lease = self.renew(lease_id)
        if len(extent_addresses) != len(self.layout.extent_bytes):
            raise LayoutMismatch(
                f"the receiver has {len(extent_addresses)} extents, this worker has {len(self.layout.extent_bytes)}"
            )
        peer = self.session.connect(metadata)
        with self._changed:
            lease.peer = peer
            lease.remote_addresses = self.chunks.addresses(extent_addresses)

    def push(self, lease_id: str, chunks: Sequence[int], cancelled: Callable[[], bool]) -> Iterator[int]:
        """WRITEs chunks into the receiver's memory; yields each one that has arrived there.

        Raises LeaseEnded (also while it runs: the lease was ended), PeerLost, TransferStalled, NixlError, and
        ValueError for chunks that are not there or a transfer that was not opened.
        """
        if bad := [chunk for chunk in chunks if not 0 <= chunk < len(self.chunks)]:
            raise ValueError(f"chunks {bad[:5]} of {len(self.chunks)}")
        with self._changed:
            lease = self.renew(lease_id)
            if lease.peer is None:
                raise ValueError(f"lease {lease_id!r} has no open transfer that WRITEs")
            lease.pushes += 1

        def moves() -> Iterator[Move]:
            for chunk in chunks:
                local, remote, lengths = (
                    self.chunks.slice_of(values, chunk)
                    for values in (self.addresses, lease.remote_addresses, self.chunks.lengths)
                )
                yield Move(chunk, local, remote, lengths)

        try:
            for chunk in self.session.run(
                "write",
                moves(),
                lease.peer,
                in_flight_limit=_PUSHES_IN_FLIGHT,
                cancelled=lambda: lease.ended or cancelled(),
            ):
                self.renew(lease_id)
                yield chunk
        except TransferError:
            with self._changed:
                self._end(lease)  # the receiver is gone, or as good as
            raise
        finally:
            with self._changed:
                lease.pushes -= 1
                self._disconnect(lease)

    def drain(self, timeout_seconds: float) -> bool:
        """Refuses new readers and waits until the ones that read are done or silent; False when some still read."""
        give_up = time.monotonic() + timeout_seconds
        with self._changed:
            self._draining = True
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
        """Ends all leases, destroys the agent, then lets go of the memory. Idempotent; never waits for readers."""
        with self._changed:
            self._draining = True
            for lease in list(self._leases.values()):
                self._end(lease)
        self.session.fence()
        self._keep_alive = None

    def _expire(self) -> None:
        now = time.monotonic()
        for lease in [lease for lease in self._leases.values() if lease.deadline < now]:
            logger.info("lease %s ended: no sign of its receiver for %g s", lease.lease_id, self.lease_seconds)
            self._end(lease)

    def _end(self, lease: Lease) -> None:
        self._leases.pop(lease.lease_id, None)
        lease.ended = True
        self._disconnect(lease)
        self._changed.notify_all()

    def _disconnect(self, lease: Lease) -> None:
        """Forgets the receiver of an ended lease once nothing is being pushed to it."""
        if not lease.ended or lease.pushes or lease.peer is None:
            return
        peer, lease.peer = lease.peer, None
        try:
            self.session.disconnect(peer)
        except NixlError as error:  # the agent was destroyed meanwhile, and the connection with it
            logger.debug("forgetting %s: %s", peer, error)


def chunk_digests(chunks: Chunks, addresses: array[int], threads: int = 1) -> bytes:
    """XXH3-64 of every chunk in this process' memory, 8 bytes little-endian each."""
    if not len(chunks):
        return b""
    return xxh3_64_many(addresses, chunks.lengths, chunks.segment_starts, threads=threads)
