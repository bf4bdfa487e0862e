"""TLS whose records come and go through memory, many in one call of the kernel.

A TLS socket of Python's has a call of the kernel for each record of 16 KiB that it sends, and two for each it reads;
each may wake the other end.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable

ENCRYPTED_BYTES = 512 * 1024
SENT_BYTES = 60 * 1024  # below what a server has the system give afresh each time (calls/freed_memory)


class TlsRecords:
    """One end of a TLS connection. Not thread-safe. What `received` and `sent` raise passes."""

    def __init__(
        self,
        context: ssl.SSLContext,
        received: Callable[[memoryview], int],
        sent: Callable[[bytes], None],
        *,
        server_name: str | None,
        encrypted_bytes: int = ENCRYPTED_BYTES,
    ) -> None:
        """Shakes hands: as the client of a server that has to be `server_name`, or as a server where that is None.

        `received` reads at least one encrypted byte, 0 at the end; `sent` sends all of them. At most `encrypted_bytes`
        are brought in one read. Raises ssl.SSLError.
        """
        self._received = received
        self._sent = sent
        self._encrypted = memoryview(bytearray(encrypted_bytes))
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._bring()
            except ssl.SSLError:
                self._send()  # the alert: it tells the other end why
                raise
            else:
                break
        self._send()

    def recv_into(self, into: memoryview) -> int:
        """Reads at least one byte, and as many as are there; 0 at the connection's end."""
        done = 0
        while done < len(into):
            try:
                count: int = self._tls.read(len(into) - done, into[done:])  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                if done:
                    break
                self._bring()
            else:
                if not count:
                    break
                done += count
        return done

    def sendall(self, data: bytes | memoryview) -> None:
        """Sends all of it."""
        self._tls.write(data)
        self._send()

    def _bring(self) -> None:
        self._send()
        if count := self._received(self._encrypted):
            self._incoming.write(self._encrypted[:count])
        else:
            self._incoming.write_eof()  # TLS says whether it may end here

    def _send(self) -> None:
        while self._outgoing.pending:
            self._sent(self._outgoing.read(SENT_BYTES))
