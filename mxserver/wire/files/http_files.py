"""Files by HTTP/1.1 ranges, straight into the caller's memory."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import grpc
import xxhash

from mxserver.wire.address import split_scheme
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.files.file_connection import READ_BYTES, FileConnection, take_buffered
from mxserver.wire.files.pieces import DIGEST_OF_LAST, CallFailed, FilesPlace, Piece

_LONGEST_REFUSAL_BYTES = 64 * 1024
_LONGEST_LINE_BYTES = 4096


class NotThere(Exception):
    """Nothing of ours can be reached at the port for files; the text says why."""


class HttpFiles:
    """Reads over one connection, kept from one file to the next. Not thread-safe, except `abort`."""

    def __init__(self, address: str, credentials: ClientCredentials, place: FilesPlace) -> None:
        """`address`: the server's for calls; files come from the same host, by TLS where calls do."""
        self._address = address
        self._credentials = credentials
        self._place = place
        scheme, target = split_scheme(address)
        self._tls = scheme == "https"
        self._host = target.rpartition(":")[0].removeprefix("[").removesuffix("]")
        self._http: http.client.HTTPConnection | None = None
        self.has_worked = False
        self._is_busy = False  # with an answer that was not read to its end
        self._has_mismatch = False
        self._connection: FileConnection | None = None

    def blocks(self, path: str, offset: int, length: int, file_digest: str) -> Iterator[Piece]:
        """The file's bytes [offset, offset + length), in blocks that are valid until the next one. If the file has
        another digest by now, nothing comes.

        Raises NotThere before the first byte, and CallFailed.
        """
        answer = self._asked(path, offset, length, {"If-Range": f'"{file_digest}"'} if file_digest else {})
        block = memoryview(bytearray(min(READ_BYTES, length)))
        done = 0
        while done < length:
            left = length - done
            count, failed = self._filled(answer, block[:left], behind=max(0, left - len(block)), buffered=not done)
            done += count
            if done == length:
                answer.close()
                self._is_busy = False
            if count:  # also of a block that was cut: it need not come again
                yield Piece(path, offset + done - count, block[:count], None)
            if failed is not None:
                raise failed

    def pieces(self, path: str, offset: int, into: memoryview) -> Iterator[Piece]:
        """Fills `into` with the file's bytes from `offset` on, in pieces of which the server tells the digest.

        Raises NotThere before the first byte, and CallFailed.
        """
        headers = {"MX-Want-Digest": "xxh3-64"}
        if self._has_mismatch:  # the server may remember a digest of bytes that it read wrong
            headers["Cache-Control"] = "no-cache"
        answer = self._asked(path, offset, len(into), headers)
        done = 0
        count, _ = self._chunk_line(answer)
        while done < len(into):
            if not 0 < count <= len(into) - done:
                self.close()
                raise CallFailed(grpc.StatusCode.UNAVAILABLE, f"a chunk has {count} bytes, not {len(into) - done}")
            data = into[done : done + count]
            hasher = xxhash.xxh3_64()
            _, failed = self._filled(answer, data, hasher)
            if failed is not None:
                raise failed
            self._line(answer)
            count, digest = self._chunk_line(answer)
            if count == 0:
                self._line(answer)
                answer.close()
                self._is_busy = False
            if digest is None:
                self.close()
                raise (
                    NotThere("a proxy on the way drops the digests")
                    if not done
                    else CallFailed(grpc.StatusCode.UNAVAILABLE, "a chunk came without its digest")
                )
            self.has_worked = True
            received = hasher.intdigest()
            self._has_mismatch = received != digest
            yield Piece(path, offset + done, data, digest, received)
            done += len(data)

    def _chunk_line(self, answer: Any) -> tuple[int, int | None]:
        """The size of the next chunk, and the digest of the one before."""
        size, *more = self._line(answer).split(b";")
        known = dict(part.strip().partition(b"=")[::2] for part in more)
        digest = known.get(DIGEST_OF_LAST.encode())
        try:
            return int(size, 16), int(digest, 16) if digest is not None else None
        except ValueError as error:
            self.close()
            raise CallFailed(grpc.StatusCode.UNAVAILABLE, f"a chunk begins with {size[:20]!r}") from error

    def _line(self, answer: Any) -> bytes:
        try:
            line: bytes = answer.fp.readline(_LONGEST_LINE_BYTES)
        except (OSError, ValueError) as error:
            self.close()
            raise CallFailed(grpc.StatusCode.UNAVAILABLE, _text(error)) from error
        if not line.endswith(b"\n"):
            self.close()
            raise CallFailed(grpc.StatusCode.UNAVAILABLE, "the answer ended early")
        return line.rstrip(b"\r\n")

    def _asked(self, path: str, offset: int, count: int, more: dict[str, str]) -> http.client.HTTPResponse:
        headers = {"Range": f"bytes={offset}-{offset + count - 1}", "Accept-Encoding": "identity", **more}
        if token := self._credentials.authorization(self._address):
            headers["Authorization"] = token
        if self._is_busy:  # with the rest of an answer that nobody wants any more
            self.close()
        self._is_busy = True
        answer = self._answered(self._place.path + quote(path), headers)
        if answer.status == http.HTTPStatus.PARTIAL_CONTENT:
            if "MX-Want-Digest" in more:
                if answer.chunked and _has_range(answer, offset, count):
                    return answer
            elif answer.length == count and _has_range(answer, offset, count):
                self.has_worked = True
                return answer
        if answer.status == http.HTTPStatus.OK and "If-Range" in more:
            self.close()
            raise CallFailed(grpc.StatusCode.FAILED_PRECONDITION, f"{path} has changed since it was listed")
        status, text = answer.getheader("MX-Status"), ""
        with suppress(OSError, http.client.HTTPException):
            text = answer.read(_LONGEST_REFUSAL_BYTES).decode(errors="replace").strip()
        self.close()
        if status is None or status not in grpc.StatusCode.__members__:
            raise NotThere(f"what answers there is no ModelExpress server (HTTP status {answer.status})")
        raise CallFailed(grpc.StatusCode[status], text)

    def _answered(self, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        kept = self._http is not None
        while True:
            try:
                connected = self._connected()
                connected.request("GET", path, headers=headers)
                return connected.getresponse()
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if not kept:
                    raise CallFailed(grpc.StatusCode.UNAVAILABLE, _text(error)) from error
                kept = False  # the server closed what was idle: once more, over a new one

    def _connected(self) -> http.client.HTTPConnection:
        """Raises NotThere where nothing accepts the connection."""
        if self._http is None:
            try:
                self._connection = FileConnection(
                    self._host, self._place.port, self._credentials.ssl_context() if self._tls else None
                )
            except OSError as error:
                raise NotThere(_text(error)) from error
            self._http = http.client.HTTPConnection(self._host, self._place.port)
            self._http.auto_open = 0
            self._http.sock = self._connection
        return self._http

    def _filled(
        self,
        answer: Any,
        into: memoryview,
        hasher: xxhash.xxh3_64 | None = None,
        *,
        behind: int = 0,
        buffered: bool = True,
    ) -> tuple[int, CallFailed | None]:
        """How many bytes came, and why not all. `hasher` takes them while they are in the core's cache; so many more
        bytes follow `behind` these; `buffered`: the reader of lines may have some of them.
        """
        done = 0
        try:
            if (connection := self._connection) is None:
                raise ConnectionError("the connection was closed")
            while done < len(into):
                part = into[done : done + READ_BYTES]
                if buffered and not done:
                    count = take_buffered(answer.fp, part)
                else:
                    connection.await_bytes(len(into) - done + behind)
                    count = connection.recv_into(part)
                if not count:
                    raise http.client.IncompleteRead(b"", len(into) - done)
                if hasher is not None:
                    hasher.update(part[:count])
                done += count
            connection.await_bytes(behind)
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.close()
            return done, CallFailed(grpc.StatusCode.UNAVAILABLE, _text(error))
        return done, None

    def abort(self) -> None:
        """Ends a read that runs in another thread: CallFailed there."""
        if (connected := self._connection) is not None:
            connected.abort()

    def close(self) -> None:
        """Idempotent; another read connects again."""
        made, self._http = self._http, None
        connection, self._connection = self._connection, None
        self._is_busy = False
        if made is not None:
            made.close()
        if connection is not None:
            connection.end()


def _has_range(answer: http.client.HTTPResponse, offset: int, count: int) -> bool:
    return (answer.getheader("Content-Range") or "").startswith(f"bytes {offset}-{offset + count - 1}/")


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
