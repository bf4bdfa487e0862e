"""Chunks fetched over TCP connections to the holder, without an agent on either side.

NIXL could do it too, by UCX. Our own connections cost nothing per tensor (one system call moves many stretches, on both
sides), hash each piece while it is in the core's cache, and nothing arrives once they are closed: there is nothing to
fence, and the death of a holder or receiver does not end the other process.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from array import array
from collections.abc import Iterator, Sequence

from mxcore.errors import NoChunkPort, NotEncrypted, PeerLost, SourceRefused, TransferError
from mxcore.sockets import SocketReads
from mxcore.transfer.layout import Chunks
from mxcore.transfer.move.chunk_greeting import ChunkTls, show_token
from mxcore.transfer.move.movers import Arrived, Awaited
from mxcore.transfer.move.source_client import SourceClient
from mxserver.wire.calls import Closing

__all__ = ["TcpMover", "connections_of"]

_MOST_CONNECTIONS = 4
_MOST_TLS_CONNECTIONS = 8  # a core does a third as much by TLS


def connections_of(cores: int, *, by_tls: bool = False) -> int:
    """How many connections to one holder: one for every two cores, at most 4; by TLS one a core, at most 8.

    A connection keeps a core busy on either side; on two cores a second one only takes from the first.
    """
    return min(cores, _MOST_TLS_CONNECTIONS) if by_tls else min(max(1, cores // 2), _MOST_CONNECTIONS)


class TcpMover(Closing):
    """Asks a holder for chunks on connections to its `port` with `token`; the compiled core takes them in. See Mover.

    With `hashed`, digests are made on the way. With `tls` the connections are
    TLS, and nothing is taken in clear.
    """

    def __init__(
        self,
        client: SourceClient,
        port: int,
        token: bytes,
        chunks: Chunks,
        local: array[int],
        *,
        hashed: bool,
        stall_timeout_seconds: float,
        tls: ChunkTls | None = None,
    ) -> None:
        """Connects. Raises NoChunkPort and NotEncrypted where that fails, OSError when no thread can be started."""
        self._holder = client.source.worker_id
        self._chunks = chunks
        self._local = local
        self._awaited = Awaited(f"worker {self._holder} sent nothing of", stall_timeout_seconds)
        self._received_bytes = 0
        self._sockets: list[socket.socket] = []
        try:
            cores = len(os.sched_getaffinity(0))
            for _ in range(connections_of(cores, by_tls=tls is not None)):
                self._sockets.append(_connect(client, port, token, tls))
            self._reads = SocketReads(self._sockets, hashed=hashed)
        except BaseException:
            self._close_sockets()
            raise

    def close(self) -> None:
        """Closes the connections: afterwards nothing is written here any more. Idempotent."""
        self._reads.close()
        self._close_sockets()

    def interrupt(self, error: TransferError) -> None:
        """See Mover."""
        self._awaited.interrupt(error)
        self.wake()

    def wake(self) -> None:
        """See Mover."""
        self._reads.wake()

    @property
    def idle(self) -> bool:
        """See Mover."""
        return not self._awaited.chunks

    def ask(self, chunks: Sequence[int]) -> None:
        """See Mover."""
        self._awaited.add(chunks)
        for chunk in chunks:
            self._reads.ask(
                chunk,
                self._chunks.slice_of(self._local, chunk),
                self._chunks.slice_of(self._chunks.lengths, chunk),
            )

    def arrived(self) -> Iterator[Arrived]:
        """See Mover; a part of a chunk is progress, too."""
        for chunk, error, digest in self._reads.ended(self._awaited.seconds_left):
            if error:
                raise self._as_error(chunk, error)
            self._awaited.remove(chunk)
            yield Arrived(chunk, digest or None)
        if (received := self._reads.received_bytes) != self._received_bytes:
            self._received_bytes = received
            self._awaited.news()
        self._awaited.check()

    def _as_error(self, chunk: int, error: int) -> TransferError:
        text = f"chunk {chunk} from worker {self._holder}: {os.strerror(error)}"
        if error == errno.EBADMSG:
            return PeerLost(f"chunk {chunk} from worker {self._holder}: a TLS record was changed on its way")
        refused = {errno.ENODATA: "it does not have the chunk", errno.EPROTO: "it answered for another chunk"}
        return SourceRefused(f"{text}: {refused[error]}") if error in refused else PeerLost(text)

    def _close_sockets(self) -> None:
        for each in self._sockets:
            each.close()


def _connect(client: SourceClient, port: int, token: bytes, tls: ChunkTls | None) -> socket.socket:
    host = client.source.endpoint.rpartition(":")[0].strip("[]")
    try:
        connection = socket.create_connection((host, port), client.timeout_seconds)
    except OSError as error:
        raise NoChunkPort(f"worker {client.source.worker_id}: no connection to {host}, port {port}: {error}") from error
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            connection = tls.secured(connection, host, client.timeout_seconds)
        show_token(connection, token, client.timeout_seconds)
    except OSError as error:
        connection.close()
        where = f"worker {client.source.worker_id} at {host}, port {port}"
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            raise NotEncrypted(f"{where}: no TLS connection for chunks, and none in clear is taken: {error}") from error
        raise NoChunkPort(f"{where}, gives no chunks: {error}") from error
    return connection
