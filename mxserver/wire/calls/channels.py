"""How all our gRPC clients and servers are set up: options, TLS, and the token on calls to the server."""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass
from typing import Any, cast

import grpc

from mxserver.wire.address import split_scheme, with_advice
from mxserver.wire.credentials import TOKEN_IN_CLEAR, ClientCredentials, FollowedFiles, ServerTls, read_ca, read_pair
from mxserver.wire.errors import SettingError

_LOG = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 100 * 1024 * 1024  # the protocol's limit, each way; gRPC's own for receiving is 4 MiB

KEEPALIVE_INTERVAL_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000

# What gRPC puts before the reason of a connection that failed; our message names the address already.
_CANNOT_CONNECT = re.compile(
    r"^failed to connect to all addresses; last error: "
    r"([A-Z_]+: )?(ipv[46]:\S+: )?(Failed to connect to remote host: )?"
)

NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""The statuses of calls that the server did not answer."""


def call_failure(name: str, address: str, error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """The status of a failed call, and a message with advice where the address looks wrong."""
    call = cast("grpc.Call", error)  # every RpcError of an invocation is one
    status: grpc.StatusCode = call.code()
    said = _CANNOT_CONNECT.sub("", with_advice(call.details() or "", address))
    return status, f"{name} at {address} failed with {status.name}: {said}"


def channel_options() -> list[tuple[str, int]]:
    """Options for channels and servers alike: each side ignores what concerns the other."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # A peer whose host vanished is noticed while a call runs. Idle connections are not pinged: servers that do
        # not know us would answer that with GOAWAY.
        ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 0),
        # Server: clients that ping more often are not disconnected.
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIMEOUT_MS),
        # Server: a port in use is an error; it is not shared silently with another process.
        ("grpc.so_reuseport", 0),
        # Client: after an outage of the server, back within seconds (gRPC's own limit is two minutes).
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # Client: peers are in the same cluster; a proxy for outgoing traffic does not know them.
        ("grpc.enable_http_proxy", 0),
    ]


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Credentials that follow their files. Raises SettingError for files that cannot be used now."""
    files = FollowedFiles(*tls)
    files.changed()

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = read_pair(tls.cert_file, tls.key_file)
        ca = read_ca(tls.client_ca_file) if tls.client_ca_file else None
        return grpc.ssl_server_certificate_configuration([pair], ca)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """Called before each new connection; None keeps what is in use."""
        if not files.changed():
            return None
        try:
            fresh = configuration()
        except SettingError as error:
            _LOG.error("the old certificate stays in use reason=%s", error)
            return None
        _LOG.info("certificate %s is used from now on", tls.cert_file)
        return fresh

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        renewed,  # type: ignore[arg-type] # None is what grpcio documents for "as it is"
        require_client_authentication=tls.client_ca_file is not None,
    )


def open_channel(
    address: str, credentials: ClientCredentials | None = None, *, to_worker: bool = False
) -> grpc.Channel:
    """A channel to `host:port` or `https://host:port`, as `parse_server_address` returns it.

    `https`, and calls `to_worker` where workers have certificates, go over TLS and over nothing else. Servers get the
    token where it may be sent (`ClientCredentials.may_send_token`), workers never do. Without `credentials`, the
    environment's are used.

    Raises:
        SettingError: the files cannot be used.
    """
    credentials = ClientCredentials.from_environ() if credentials is None else credentials
    options: list[tuple[str, Any]] = [*channel_options()]
    scheme, target = split_scheme(address)
    if scheme == "https" or (to_worker and credentials.peers_use_tls):
        if to_worker and credentials.peer_name:
            options.append(("grpc.ssl_target_name_override", credentials.peer_name))
        channel = grpc.secure_channel(target, _channel_credentials(credentials), options=options)
    else:
        channel = grpc.insecure_channel(target, options=options)
    if to_worker or credentials.token_file is None:
        return channel
    if not credentials.may_send_token(address):
        _LOG.warning(
            "the token is not sent to %s, because others could read it on its way: write the server's address with "
            "https://, or allow it with %s=1",
            target,
            TOKEN_IN_CLEAR,
        )
        return channel
    return grpc.intercept_channel(channel, _TokenOnCalls(credentials, address))


def _channel_credentials(credentials: ClientCredentials) -> grpc.ChannelCredentials:
    ca = read_ca(credentials.ca_file) if credentials.ca_file else None
    cert, key = credentials.cert_file, credentials.key_file
    return grpc.ssl_channel_credentials(ca, *(read_pair(cert, key) if cert and key else ()))


@dataclass(frozen=True)
class _CallDetails(grpc.ClientCallDetails):
    """A call with the token added to its metadata."""

    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...] | None
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: Any


class _TokenOnCalls(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the token to every call. gRPC's own call credentials work over TLS only; a token may also go to loopback."""

    def __init__(self, credentials: ClientCredentials, address: str) -> None:
        self._credentials = credentials
        self._address = address

    def _with_token(self, call: Any) -> _CallDetails:
        token = self._credentials.authorization(self._address)
        return _CallDetails(
            call.method,
            call.timeout,
            (*(call.metadata or ()), *([("authorization", token)] if token else [])),
            call.credentials,
            getattr(call, "wait_for_ready", None),
            getattr(call, "compression", None),
        )

    def intercept_unary_unary(self, continuation: Any, call: Any, request: Any) -> Any:
        return continuation(self._with_token(call), request)

    def intercept_unary_stream(self, continuation: Any, call: Any, request: Any) -> Any:
        return continuation(self._with_token(call), request)


class ServerChannel:
    """The channel to one server, made again when the certificate files change. Thread-safe."""

    def __init__(self, address: str, credentials: ClientCredentials | None = None) -> None:
        """Without `credentials`, the environment's are used, as they are at the first call."""
        self._address = address
        self._credentials = credentials
        self._channel: grpc.Channel | None = None
        self._previous: grpc.Channel | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._files: FollowedFiles | None = None

    def channel(self) -> grpc.Channel:
        """The channel for the next call. Raises SettingError, and ValueError once it is closed."""
        with self._lock:
            if self._closed:
                raise ValueError("the connection is closed")
            if self._credentials is None:
                self._credentials = ClientCredentials.from_environ()
            if self._files is None:
                files = (self._credentials.ca_file, self._credentials.cert_file, self._credentials.key_file)
                self._files = FollowedFiles(*files)
            if self._files.changed() or self._channel is None:
                self._channel = self._replaced(self._credentials)
            return self._channel

    def _replaced(self, credentials: ClientCredentials) -> grpc.Channel:
        """Running calls go on over the old channel; the one before that has none left by now."""
        try:
            fresh = open_channel(self._address, credentials)
        except SettingError as error:
            if self._channel is None:
                raise
            _LOG.error("the old certificates stay in use reason=%s", error)
            return self._channel
        if self._previous is not None:
            self._previous.close()
        self._previous = self._channel
        return fresh

    def close(self) -> None:
        """Ends running calls. Idempotent."""
        with self._lock:
            self._closed = True
            for channel in (self._channel, self._previous):
                if channel is not None:
                    channel.close()
            self._channel = self._previous = None
