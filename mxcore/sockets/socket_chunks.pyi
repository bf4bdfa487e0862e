"""Chunks over TCP connections, out of one process' memory into another's: nothing arrives once they are closed.

What is said on a connection is in socket_chunks.h. Connections are connected, blocking stream sockets: the caller's,
to be kept open until the object that uses them is done. An `ssl.SSLSocket`, after its handshake, sends and takes by TLS
in the same threads; who cuts one off from another thread calls `socket.socket.shutdown`, which keeps its keys.
"""

import socket
from collections.abc import Iterable, Sequence

from typing_extensions import Buffer

class SocketReads:
    """Takes chunks from one holder's connections, a thread each, which wait for Python by TLS only. Thread-safe.

    With `hashed`, each chunk's XXH3-64 is made of what has arrived. Closed with `close`, or when it is no more used;
    after a fork the child's copy does nothing. Changes SO_RCVTIMEO and SO_RCVLOWAT of the sockets.

    Raises ValueError for no connection or more than 64, OSError when no thread can be started.
    """

    def __init__(self, connections: Sequence[socket.socket], *, hashed: bool) -> None: ...
    def ask(self, chunk: int, addresses: Iterable[int], lengths: Iterable[int]) -> None:
        """Requests a chunk (32 bits) whose bytes go to these stretches of memory, the caller's to keep mapped.

        The first asked for are the first requested, two at a time of a connection. Raises ValueError: closed, no bytes,
        not as many addresses as lengths.
        """

    def ended(self, seconds: float) -> list[tuple[int, int, bytes]]:
        """Waits for so long at most; takes all that has ended: chunk, errno or 0, digest (empty unless hashed).

        errno is ECONNRESET (the holder has closed the connection), ENODATA (it does not have the chunk), EPROTO (it
        answered something else), EBADMSG (by TLS: somebody changed the bytes on their way) or a socket's. After an
        error the connection is of no use. Empty also when nothing is asked for that was not taken, when it is closed,
        and after `wake`.
        """

    def wake(self) -> None:
        """Makes `ended` return, or the next one if nobody waits in it. From any thread."""

    @property
    def received_bytes(self) -> int:
        """Bytes of chunks that have come over all connections."""

    def close(self) -> None:
        """Shuts the connections down and waits for the threads: nothing is written here any more. Idempotent."""

class ChunkSender:
    """Sends chunks of this process' memory to one reader, on its connections, each as often as allowed. Thread-safe.

    `addresses`, `lengths` and `segment_starts` are one-dimensional buffers of native uint64 (array.array("Q")), kept as
    long as this object: chunk i is the segments from `segment_starts[i]` up to `segment_starts[i + 1]`. The memory is
    the caller's to keep mapped while anybody is in `serve`. Raises ValueError where these do not fit together.
    """

    def __init__(self, addresses: Buffer, lengths: Buffer, segment_starts: Buffer) -> None: ...
    def allow(self, chunks: Iterable[int]) -> None:
        """These chunks may be sent, once each; none at first. Raises ValueError for a number that is no chunk."""

    def forbid_all(self) -> None:
        """No chunk may be sent, until it is allowed again; one that is being sent goes on."""

    def serve(self, connection: socket.socket) -> int:
        """Answers what is asked on a connection until the other side closes it (0), or errno; without the GIL.

        Ends too when another thread shuts the socket down. A chunk that is not allowed is answered as not here.
        """

    @property
    def sent_bytes(self) -> int:
        """Bytes of chunks that were given to the kernel, over all connections."""
