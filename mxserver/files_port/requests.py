"""GET of one file of a cached model, whole or a range of it: /files/PROVIDER/MODEL/REVISION/PATH, each part quoted.

An answer has the file's digest as its ETag, for If-Range. With `MX-Want-Digest: xxh3-64` it comes in chunks of up to
8 MiB, which end at multiples of 8 MiB of the file; behind each, in the line of the next, its digest is a chunk
extension (RFC 9112, 7.1.1, made for "per-chunk metadata (such as a signature or hash)"). So the first bytes go out
before the last ones were hashed, and one request brings as much as its client has room for. `Cache-Control: no-cache`
has digests made afresh. A refusal has `MX-Status`, the status that gRPC has for it.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import socket
import struct
import threading
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import grpc

from mxserver.files_port.range_digests import RangeDigests, read_blocks
from mxserver.files_port.tls_connection import TlsConnection
from mxserver.models import (
    FileDamaged,
    FileRecord,
    OpenCache,
    checked_revision,
    errors,
    model_name,
    opened_file,
)
from mxserver.security import AccessError, AccessUnknown, Authenticator, Role, Unauthenticated, bearer_token
from mxserver.wire import MxError, path_problem
from mxserver.wire.files import DIGEST_OF_LAST, FILES_FOLDER, MOST_DIGESTED_BYTES
from mxserver.wire.proto import model_pb2

_RANGE = re.compile(r"bytes=(\d{1,19})-(\d{0,19})")
_PROVIDERS = set(model_pb2.ModelProvider.keys())
SMALL_BYTES = 16 * 1024
_NOT_FOUND = (errors.ModelNotCached, errors.RevisionNotFound)


class Shared(NamedTuple):
    """What all connections use."""

    opened: OpenCache
    authenticator: Authenticator | None
    digests: RangeDigests
    answers: Answers
    silence_seconds: float  # how long a client may be without a request, and take no byte of an answer


class Answers:
    """The answers under way. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self.are_last = False  # of their connections: the server drains

    def __enter__(self) -> None:
        with self._changed:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Until there is none; returns whether that was so within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._count, seconds)


class Refusal(Exception):
    """Why a request is not answered with bytes."""

    def __init__(self, code: HTTPStatus, status: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.status = status


class FileRequests(http.server.BaseHTTPRequestHandler):
    """The requests of one connection, one after the other.

    While they are of one model that stays in use, as during a stream over gRPC, and its record is read once.
    """

    protocol_version = "HTTP/1.1"
    server_version = "mxserver"
    sys_version = ""
    disable_nagle_algorithm = True
    wbufsize = 2 * SMALL_BYTES  # the head and a small body are one packet

    def setup(self) -> None:
        self._shared: Shared = self.server.shared  # type: ignore[attr-defined]
        seconds, rest = divmod(self._shared.silence_seconds, 1)
        self.request.settimeout(self._shared.silence_seconds)
        self.request.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(rest * 1_000_000))
        )
        self._model = contextlib.ExitStack()  # what keeps the model in the cache
        self._of: tuple[str, ...] = ()
        self._files: dict[str, FileRecord] = {}
        super().setup()

    def finish(self) -> None:
        self._model.close()
        super().finish()

    def log_message(self, *_: Any) -> None:
        """Nothing: who takes which file is not logged."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with self._shared.answers:
            self._do_get()
            self.close_connection = self.close_connection or self._shared.answers.are_last

    def _do_get(self) -> None:
        try:
            self._admit()
            file = self._file()
            begin, end, is_range = self._range(file)
            handle = opened_file(self._shared.opened.cache.layout.root, file)
        except Refusal as refusal:
            self._refuse(refusal.code, refusal.status, str(refusal))
        except _NOT_FOUND as error:
            self._refuse(HTTPStatus.NOT_FOUND, grpc.StatusCode.NOT_FOUND, str(error))
        except FileDamaged as error:
            self._refuse(HTTPStatus.CONFLICT, grpc.StatusCode.DATA_LOSS, str(error))
        except errors.BadModelName as error:
            self._refuse(HTTPStatus.BAD_REQUEST, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except errors.CacheUnusable as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except (MxError, OSError) as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, str(error))
        else:
            with os.fdopen(handle, "rb", buffering=0) as opened:
                self._answer(file, opened, begin, end, is_range=is_range)

    def _admit(self) -> None:
        judge = self._shared.authenticator
        if judge is None:
            return
        try:
            caller = judge.authenticate(bearer_token(self.headers.get("authorization", "")))
        except AccessUnknown as error:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, str(error)) from error
        except Unauthenticated as error:
            raise Refusal(HTTPStatus.UNAUTHORIZED, grpc.StatusCode.UNAUTHENTICATED, str(error)) from error
        except AccessError as error:
            raise Refusal(HTTPStatus.FORBIDDEN, grpc.StatusCode.PERMISSION_DENIED, str(error)) from error
        if caller.role < Role.READ:
            raise Refusal(HTTPStatus.FORBIDDEN, grpc.StatusCode.PERMISSION_DENIED, f"{caller.subject} may not read")

    def _file(self) -> FileRecord:
        parts = urlsplit(self.path).path.removeprefix(FILES_FOLDER).split("/", 3)
        if not self.path.startswith(FILES_FOLDER) or len(parts) < 4:
            raise Refusal(HTTPStatus.NOT_FOUND, grpc.StatusCode.NOT_FOUND, f"there is {FILES_FOLDER} and nothing else")
        provider, name, revision, path = (unquote(part) for part in parts)
        if problem := path_problem(path):
            raise errors.BadModelName(f"file {path[:200]!r} of {name[:200]} is refused: {problem}")
        if (provider, name, revision) != self._of:
            self._hold(provider, name, revision)
        file = self._files.get(path)
        if file is None:
            raise errors.ModelNotCached(f"{name} has no file {path!r} in the cache")
        return file

    def _hold(self, provider: str, name: str, revision: str) -> None:
        """Keeps this model in the cache from now on, and the one before no longer."""
        self._model.close()
        self._of, self._files = (), {}
        if provider not in _PROVIDERS:
            raise errors.BadModelName(f"{provider[:100]!r} is no provider")
        model = model_name(model_pb2.ModelProvider.Value(provider), name)
        record = self._model.enter_context(self._shared.opened.cache.reading(model, checked_revision(model, revision)))
        self._of, self._files = (provider, name, revision), {file.path: file for file in record.files}

    def _range(self, file: FileRecord) -> tuple[int, int, bool]:
        """[begin, end) in bytes, and whether it is a range rather than the whole file (RFC 9110, 14.2)."""
        wanted = self.headers.get("range")
        matches = self.headers.get("if-range", _etag(file)) == _etag(file)
        asked = _RANGE.fullmatch(wanted) if wanted and matches else None
        if asked is None:
            return 0, file.size, False
        begin, last = int(asked[1]), int(asked[2] or file.size - 1)
        if begin >= file.size or last < begin or last >= file.size:
            raise Refusal(
                HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{file.path!r} has {file.size} bytes, but the range from {begin} to {last + 1} was requested",
            )
        return begin, last + 1, True

    def _answer(self, file: FileRecord, opened: Any, begin: int, end: int, *, is_range: bool) -> None:
        with_digests = self.headers.get("mx-want-digest") == "xxh3-64" and self.request_version != "HTTP/1.0"
        self.send_response(HTTPStatus.PARTIAL_CONTENT if is_range else HTTPStatus.OK)
        if with_digests:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(end - begin))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", _etag(file))
        if is_range:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{file.size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if not (self._send_chunks if with_digests else self._send)(opened, begin, end):
            self.close_connection = True  # the file was truncated: the client sees that the answer ends early

    def _send_chunks(self, opened: Any, begin: int, end: int) -> bool:
        afresh = self.headers.get("cache-control") == "no-cache"
        before = ""
        while begin < end:
            stop = min(end, (begin // MOST_DIGESTED_BYTES + 1) * MOST_DIGESTED_BYTES)
            self.wfile.write(f"{stop - begin:x}{before}\r\n".encode())
            if not self._send(opened, begin, stop):
                return False
            before = f";{DIGEST_OF_LAST}={self._shared.digests.of(opened.fileno(), begin, stop, afresh=afresh)}"
            self.wfile.write(b"\r\n")
            begin = stop
        self.wfile.write(f"0{before}\r\n\r\n".encode())
        return True

    def _send(self, opened: Any, begin: int, end: int) -> bool:
        """Whether the file had all these bytes."""
        if end - begin <= SMALL_BYTES:
            return read_blocks(opened.fileno(), begin, end, self.wfile.write) == end - begin
        self.wfile.flush()
        if isinstance(self.connection, TlsConnection):
            return read_blocks(opened.fileno(), begin, end, self.connection.sendall) == end - begin
        return self._send_file(opened.fileno(), begin, end)

    def _send_file(self, handle: int, begin: int, end: int) -> bool:
        """By sendfile, which sends all that it is asked to where the socket waits in the kernel (SO_SNDTIMEO)."""
        self.connection.settimeout(None)
        try:
            while begin < end:
                count = os.sendfile(self.connection.fileno(), handle, begin, end - begin)
                if not count:
                    return False
                begin += count
        finally:
            self.connection.settimeout(self._shared.silence_seconds)
        return True

    def _refuse(self, code: HTTPStatus, status: grpc.StatusCode, text: str) -> None:
        body = f"{text}\n".encode(errors="replace")
        self.send_response(code)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("MX-Status", status.name)
        if code is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(file: FileRecord) -> str:
    return f'"{file.digest}"'
