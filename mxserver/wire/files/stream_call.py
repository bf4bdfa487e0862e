"""A gRPC call whose answer is a stream of large messages, received without copies over a connection of its own.

The protocol is gRPC's (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md), so it works with every server
and proxy that works with grpcio.
"""

from __future__ import annotations

import socket
import ssl
import struct
from urllib.parse import unquote

import grpc

from mxserver.wire.address import split_scheme
from mxserver.wire.calls import KEEPALIVE_INTERVAL_MS, KEEPALIVE_TIMEOUT_MS, MAX_MESSAGE_BYTES, Closing
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.files.http2 import Headers, Http2Connection, Http2Error, StreamReset

WINDOW_BYTES = 16 * 1024 * 1024  # what may be in flight to one stream
CONNECT_SECONDS = 20.0
_PREFIX_BYTES = 5

_STATUSES = {status.value[0]: status for status in grpc.StatusCode}
_RESETS = {  # "Errors" in gRPC's description
    7: grpc.StatusCode.UNAVAILABLE,  # REFUSED_STREAM
    8: grpc.StatusCode.CANCELLED,
    11: grpc.StatusCode.RESOURCE_EXHAUSTED,  # ENHANCE_YOUR_CALM
    12: grpc.StatusCode.PERMISSION_DENIED,  # INADEQUATE_SECURITY
}
_HTTP = {  # doc/http-grpc-status-mapping.md: answers of something that is not a gRPC server
    "400": grpc.StatusCode.INTERNAL,
    "401": grpc.StatusCode.UNAUTHENTICATED,
    "403": grpc.StatusCode.PERMISSION_DENIED,
    "404": grpc.StatusCode.UNIMPLEMENTED,
    **dict.fromkeys(("429", "502", "503", "504"), grpc.StatusCode.UNAVAILABLE),
}


class CallFailed(grpc.RpcError):
    """A call ended with another status than OK. It has the interface of grpcio's own errors."""

    def __init__(self, status: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{status.name}: {details}")
        self._status = status
        self._details = details

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return self._details


class StreamConnection(Closing):
    """One call after the other, over a connection that the first call opens. Not thread-safe, except `abort`.

    All methods raise CallFailed, with the status that grpcio would show: UNAVAILABLE if the connection broke or cannot
    be made. After that the connection is closed, and the next call opens another.
    """

    def __init__(self, address: str, credentials: ClientCredentials | None = None) -> None:
        """`address` is what `parse_server_address` returns. Without `credentials`, they are the environment's."""
        self._address = address
        self._credentials = credentials
        self._http: Http2Connection | None = None
        self._left = 0  # bytes of the message that is read
        self._prefix = memoryview(bytearray(_PREFIX_BYTES))

    def call(self, method: str, request: bytes) -> None:
        """Begins a call of `/package.Service/Method` with a serialised request. An unfinished call is abandoned.

        Raises SettingError too: certificates or a token that cannot be used.
        """
        if self._http is not None and (self._left or not self._http.is_free):
            self.close()
        self._left = 0
        credentials = self._credentials or ClientCredentials.from_environ()
        scheme, target = split_scheme(self._address)
        headers = [
            (":method", "POST"),
            (":scheme", scheme),
            (":path", method),
            (":authority", target),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "mx-modelexpress"),
            *([("authorization", token)] if (token := credentials.authorization(self._address)) else []),
        ]
        try:
            if self._http is None:
                self._http = self._opened(scheme, target, credentials)
            self._http.request(headers, struct.pack(">BI", 0, len(request)) + request)
        except (Http2Error, OSError) as error:
            raise self._failed(error) from error

    def _opened(self, scheme: str, target: str, credentials: ClientCredentials) -> Http2Connection:
        host, _, port = target.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        connected = socket.create_connection((host, int(port)), CONNECT_SECONDS)
        try:
            # Requests are short. This, or our pings, notices a peer whose host vanished.
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, KEEPALIVE_INTERVAL_MS)
            if scheme == "https":
                connected = _with_tls(connected, host, credentials)
            connected.settimeout(None)
            return Http2Connection(
                connected,
                window_bytes=WINDOW_BYTES,
                silence_seconds=KEEPALIVE_INTERVAL_MS / 1000,
                ping_seconds=KEEPALIVE_TIMEOUT_MS / 1000,
            )
        except BaseException:
            connected.close()
            raise

    def next_message(self) -> int | None:
        """The size of the next message in bytes, which `read_into` then takes; None after the last one."""
        if self._left:
            raise ValueError(f"{self._left} bytes of the message before were not read")
        http = self._open()
        try:
            count = http.read_into(self._prefix)
        except Http2Error as error:
            raise self._failed(error) from error
        if not count:
            self._check_end(http)
            return None
        compressed, self._left = struct.unpack(">BI", self._prefix)
        if count < _PREFIX_BYTES or compressed or self._left > MAX_MESSAGE_BYTES:
            self.close()
            raise CallFailed(grpc.StatusCode.INTERNAL, f"a message begins with {bytes(self._prefix).hex()}")
        return self._left

    def read_into(self, view: memoryview) -> None:
        """Fills `view`, which is no longer than what is left of the message, with its next bytes."""
        if len(view) > self._left:
            raise ValueError(f"the message has {self._left} bytes left, not {len(view)}")
        http = self._open()
        try:
            count = http.read_into(view)
        except Http2Error as error:
            raise self._failed(error) from error
        if count < len(view):
            self._check_end(http)
            self.close()
            raise CallFailed(grpc.StatusCode.INTERNAL, "the stream ended within a message")
        self._left -= count

    def abort(self) -> None:
        """Ends a call that runs in another thread: CallFailed there."""
        if (http := self._http) is not None:
            http.abort()

    def close(self) -> None:
        """Ends the call, and the connection. Idempotent; another call may follow."""
        http, self._http, self._left = self._http, None, 0
        if http is not None:
            http.close()

    def _open(self) -> Http2Connection:
        if self._http is None:
            raise CallFailed(grpc.StatusCode.CANCELLED, "the connection is closed")
        return self._http

    def _failed(self, error: Exception) -> CallFailed:
        self.close()
        if isinstance(error, StreamReset):
            return CallFailed(_RESETS.get(error.code, grpc.StatusCode.INTERNAL), str(error))
        return CallFailed(grpc.StatusCode.UNAVAILABLE, str(error))

    def _check_end(self, http: Http2Connection) -> None:
        """Raises CallFailed unless the call ended with status OK."""
        status, details = _end_of(http.headers, http.trailers)
        if status is not grpc.StatusCode.OK:
            self.close()
            raise CallFailed(status, details)


def _end_of(headers: Headers, trailers: Headers) -> tuple[grpc.StatusCode, str]:
    last = dict(trailers or headers)
    if number := last.get("grpc-status", ""):
        status = _STATUSES.get(int(number) if number.isascii() and number.isdigit() else -1, grpc.StatusCode.UNKNOWN)
        return status, unquote(last.get("grpc-message", ""))
    answered = dict(headers).get(":status", "")
    return _HTTP.get(answered, grpc.StatusCode.UNKNOWN), f"HTTP status {answered or 'none'}, and no gRPC status"


def _with_tls(connected: socket.socket, host: str, credentials: ClientCredentials) -> socket.socket:
    context = credentials.ssl_context()
    context.set_alpn_protocols(["h2"])
    secured = context.wrap_socket(connected, server_hostname=host)
    if secured.selected_alpn_protocol() != "h2":
        secured.close()
        raise ssl.SSLError(f"{host} does not speak HTTP/2")
    return secured
