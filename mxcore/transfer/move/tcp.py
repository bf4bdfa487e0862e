"""Chunks fetched over TCP connections to the holder, without an agent of either side.

NIXL could do it too, by UCX. Our own connections cost nothing a tensor (many stretches are one call of the kernel, on
both sides), hash each piece while it is in the core's cache, and are over when they are closed: there is nothing to
fence, and a holder that dies, or whose receiver does, ends nobody.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from array import array
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from mxcore.errors import NoChunkPort, PeerLost, SourceRefused, TransferError, TransferStalled
from mxcore.sockets.socket_chunks import SocketReads
from mxcore.transfer.layout.chunks import Chunks
from mxcore.transfer.move.chunk_greeting import show_token
from mxcore.transfer.move.movers import LeaseKeeper
from mxcore.transfer.move.source_client import SourceClient

__all__ = ["PullBySocket", "connections_of"]

_MOST_CONNECTIONS = 4


def connections_of(cores: int, asked_for: int) -> int:
    """How many connections to one holder; `asked_for` 0: one for every two cores, at most 4.

    One is the limit of a core on either side; on two cores a second one only takes from the first.
    """
    return asked_for or min(max(1, cores // 2), _MOST_CONNECTIONS)


class PullBySocket:
    """Asks a holder for chunks on connections to its `port` with `token`; the compiled core takes them in.

    With `hashed`, `digest_of` has the XXH3-64 of what arrived. `connections` as for `connections_of`. Used by one
    thread but for `wake` and `interrupt`; `arrived` waits no longer than until these.
    """

    needs_this_thread = False  # the threads of the core go on

    def __init__(
        self,
        client: SourceClient,
        lease_id: str,
        port: int,
        token: bytes,
        chunks: Chunks,
        local: array[int],
        *,
        hashed: bool,
        connections: int,
        stall_timeout_seconds: float,
    ) -> None:
        """Connects. Raises NoChunkPort where that fails, OSError when no thread can be started."""
        self._lease = LeaseKeeper(client, lease_id)
        self._holder = client.source.worker_id
        self._chunks = chunks
        self._local = local
        self._stall_timeout_seconds = stall_timeout_seconds
        self._expected: set[int] = set()
        self._digests: dict[int, bytes] = {}
        self._error: TransferError | None = None
        self._news = 0.0  # when bytes last came, or the first chunk of several was asked for
        self._received_bytes = 0
        self._sockets: list[socket.socket] = []
        try:
            for _ in range(connections_of(len(os.sched_getaffinity(0)), connections)):
                self._sockets.append(_connect(client, port, token))
            self._reads = SocketReads([each.fileno() for each in self._sockets], hashed=hashed)
        except BaseException:
            self._close_sockets()
            raise

    def __enter__(self) -> Self:
        self._lease.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reads.close()  # afterwards nothing is written here any more
        self._close_sockets()
        self._lease.__exit__(kind, error, trace)

    def interrupt(self, error: TransferError) -> None:
        """Makes `arrived` raise `error` instead of waiting on; from any thread."""
        self._error = self._error or error
        self.wake()

    def wake(self) -> None:
        """Makes `arrived` return; from any thread."""
        self._reads.wake()

    @property
    def idle(self) -> bool:
        """Whether everything that was asked for has arrived."""
        return not self._expected

    def ask(self, chunks: Sequence[int]) -> None:
        """Adds chunks to what is fetched."""
        if self.idle:
            self._news = time.monotonic()
        self._expected.update(chunks)
        for chunk in chunks:
            self._reads.ask(
                chunk,
                self._chunks.slice_of(self._local, chunk),
                self._chunks.slice_of(self._chunks.lengths, chunk),
            )

    def arrived(self) -> Iterator[int]:
        """Waits; yields chunks whose bytes are there. Raises PeerLost, SourceRefused, TransferStalled."""
        self._lease.check()
        if self._expected:
            waits = self._news + self._stall_timeout_seconds - time.monotonic()
            for chunk, error, digest in self._reads.ended(waits):
                if error:
                    raise self._as_error(chunk, error)
                self._expected.discard(chunk)
                self._digests[chunk] = digest
                yield chunk
        if self._error is not None:
            raise self._error
        if (received := self._reads.received_bytes) != self._received_bytes:
            self._received_bytes = received
            self._news = time.monotonic()
        elif self._expected and time.monotonic() > self._news + self._stall_timeout_seconds:
            raise TransferStalled(
                f"worker {self._holder} sent nothing of chunks {sorted(self._expected)[:5]} for "
                f"{time.monotonic() - self._news:.1f} s"
            )

    def digest_of(self, chunk: int) -> bytes:
        """The digest of a chunk that has arrived, once; empty if none was made."""
        return self._digests.pop(chunk, b"")

    def _as_error(self, chunk: int, error: int) -> TransferError:
        text = f"chunk {chunk} from worker {self._holder}: {os.strerror(error)}"
        refused = {errno.ENODATA: "it does not have the chunk", errno.EPROTO: "it answered for another chunk"}
        return SourceRefused(f"{text}: {refused[error]}") if error in refused else PeerLost(text)

    def _close_sockets(self) -> None:
        for each in self._sockets:
            each.close()


def _connect(client: SourceClient, port: int, token: bytes) -> socket.socket:
    host = client.source.endpoint.rpartition(":")[0].strip("[]")
    try:
        connection = socket.create_connection((host, port), client.timeout_seconds)
    except OSError as error:
        raise NoChunkPort(f"worker {client.source.worker_id}: no connection to {host}, port {port}: {error}") from error
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        show_token(connection, token, client.timeout_seconds)
    except OSError as error:
        connection.close()
        where = f"worker {client.source.worker_id} at {host}, port {port}"
        raise NoChunkPort(f"{where}, gives no chunks: {error}") from error
    return connection
