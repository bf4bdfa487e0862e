"""TLS and tokens for channels and servers: what to trust, what to show, and when a token may be sent.

Files are looked at again before each connection (servers) or call (clients): a certificate or token that was replaced
is used from then on, without a restart. A new file that cannot be used is reported, and the old one stays in use.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import ssl
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from mxserver.wire.address import split_scheme
from mxserver.wire.environment import setting, unprotected
from mxserver.wire.errors import SettingError

_LOG = logging.getLogger(__name__)

CA_FILE, CERT_FILE, KEY_FILE = "MX_TLS_CA_FILE", "MX_TLS_CERT_FILE", "MX_TLS_KEY_FILE"
CLIENT_CA_FILE, PEER_NAME = "MX_TLS_CLIENT_CA_FILE", "MX_TLS_PEER_NAME"
TOKEN_FILE, TOKEN_IN_CLEAR = "MX_AUTH_TOKEN_PATH", "MX_AUTH_TOKEN_IN_CLEAR"

WORKER_NAMES = (CA_FILE, CERT_FILE, KEY_FILE, CLIENT_CA_FILE, PEER_NAME, TOKEN_FILE, TOKEN_IN_CLEAR)
"""All that a worker, or any client, reads here from its environment."""

PROJECTED_TOKEN = Path("/var/run/secrets/tokens/modelexpress")
"""Where manifests for NVIDIA's clients project a pod's token, which these take without being told."""

LONGEST_TOKEN_BYTES = 16 * 1024
_LOOPBACK_NAMES = ("localhost", "ip6-localhost", "ip6-loopback")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

Options = Sequence[tuple[str, Any]]


def is_loopback(address: str) -> bool:
    """Whether what is sent to this `host:port` (or host) stays on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address
    if address.startswith("["):
        host = address[1:].partition("]")[0]
    elif address.count(":") == 1:
        host = address.partition(":")[0]
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower().removesuffix(".") in _LOOPBACK_NAMES


class _Files:
    """Files that are read again when they have changed. Thread-safe."""

    def __init__(self, *paths: Path | None) -> None:
        self._paths = tuple(path for path in paths if path is not None)
        self._seen: tuple[object, ...] | None = None
        self._lock = threading.Lock()

    def changed(self) -> bool:
        """Whether any file is another one than at the last call; the first call says True."""
        seen = tuple(_stamp(path) for path in self._paths)
        with self._lock:
            changed, self._seen = seen != self._seen, seen
        return changed


def _stamp(path: Path) -> object:
    with contextlib.suppress(OSError):
        status = path.stat()  # of what a link leads to: Kubernetes replaces links
        return status.st_mtime_ns, status.st_ino, status.st_size
    return None


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingError(f"{what} {path} cannot be read ({error.strerror}); give a file that can") from error


def _read_pair(cert: Path, key: Path) -> tuple[bytes, bytes]:
    """Key and chain, PEM. Raises SettingError when they cannot be read, or do not belong together."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise SettingError(
            f"certificate {cert} and key {key} cannot be used ({reason}); give a PEM chain and its key, not encrypted"
        ) from error
    return _read(key, "the key"), _read(cert, "the certificate")


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _read_ca(path: Path) -> bytes:
    text = _read(path, "the CA file")
    try:
        ssl.create_default_context(cadata=text.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise SettingError(f"CA file {path} cannot be used ({error}); give PEM certificates") from error
    return text


class ServerTls(NamedTuple):
    """The files of a server: its certificate and key, and the CA of the clients that it takes (None: any client)."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Credentials that follow their files. Raises SettingError for files that cannot be used now."""
    files = _Files(*tls)
    files.changed()

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = _read_pair(tls.cert_file, tls.key_file)
        ca = _read_ca(tls.client_ca_file) if tls.client_ca_file else None
        return grpc.ssl_server_certificate_configuration([pair], ca)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """Called before each new connection; None leaves all as it is."""
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


def server_context(tls: ServerTls) -> ssl.SSLContext:
    """For servers that are not gRPC's: any client is taken, and the files are followed as there. Raises SettingError.

    Clients' certificates are not asked for: `tls.client_ca_file` plays no part.
    """
    files = _Files(tls.cert_file, tls.key_file)
    files.changed()

    def fresh() -> ssl.SSLContext:
        _read_pair(tls.cert_file, tls.key_file)  # says what is wrong with them
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.cert_file, tls.key_file)
        return context

    current = fresh()

    def follow(connection: ssl.SSLSocket | ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        """At the start of each handshake."""
        nonlocal current
        if files.changed():
            try:
                current = fresh()
            except (SettingError, OSError, ssl.SSLError) as error:
                _LOG.error("the old certificate stays in use reason=%s", error)
        connection.context = current

    outer = fresh()
    outer.sni_callback = follow
    return outer


@dataclass(frozen=True)
class ClientCredentials:
    """What a client trusts and shows. Nothing in it is secret by itself: it has files' names."""

    ca_file: Path | None = None  # None: the system's
    cert_file: Path | None = None
    key_file: Path | None = None
    peer_name: str = ""  # the name to expect in certificates of workers, which are called by address
    token_file: Path | None = None
    token_in_clear: bool = False  # also over connections that others may listen to

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> ClientCredentials:
        """As the environment says (MX_TLS_*, MX_AUTH_TOKEN_*). Raises SettingError, for misspelt names as well."""
        variables = os.environ if environ is None else environ
        if reason := unprotected(variables):
            raise SettingError(reason)

        def path(name: str) -> Path | None:
            text = setting(variables, name)
            return Path(text) if text else None

        clear = (setting(variables, TOKEN_IN_CLEAR) or "0").lower()
        if clear not in (*_TRUE, *_FALSE):
            raise SettingError(f"{TOKEN_IN_CLEAR}={clear!r} is refused: it must be 1 or 0")
        found = cls(
            ca_file=path(CA_FILE),
            cert_file=path(CERT_FILE),
            key_file=path(KEY_FILE),
            peer_name=setting(variables, PEER_NAME) or "",
            token_file=path(TOKEN_FILE) or (PROJECTED_TOKEN if PROJECTED_TOKEN.exists() else None),
            token_in_clear=clear in _TRUE,
        )
        if (found.cert_file is None) != (found.key_file is None):
            raise SettingError(f"{CERT_FILE} and {KEY_FILE} belong together; set both or none")
        return found

    @property
    def peers_use_tls(self) -> bool:
        """Whether workers talk TLS to each other: those that have a certificate do."""
        return self.cert_file is not None

    def context(self) -> ssl.SSLContext:
        """For clients that are not gRPC's. Raises SettingError for files that cannot be used."""
        context = ssl.create_default_context(cadata=_read_ca(self.ca_file).decode("ascii") if self.ca_file else None)
        if self.cert_file and self.key_file:
            _read_pair(self.cert_file, self.key_file)
            context.load_cert_chain(self.cert_file, self.key_file)
        return context

    def token_for(self, host: str, *, secure: bool) -> str | None:
        """The token that a call to this host may carry; None: there is none, or it would go in clear.

        Raises SettingError for a token file that cannot be used.
        """
        if self.token_file is None or not (secure or self.token_in_clear or is_loopback(host)):
            return None
        return _Bearer(self.token_file).token()

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Raises SettingError for files that cannot be used."""
        ca = _read_ca(self.ca_file) if self.ca_file else None
        key, chain = None, None
        if self.cert_file and self.key_file:
            key, chain = _read_pair(self.cert_file, self.key_file)
        return grpc.ssl_channel_credentials(ca, key, chain)

    def ssl_context(self) -> ssl.SSLContext:
        """The same for connections that are not grpcio's. Raises SettingError for files that cannot be used."""
        context = ssl.create_default_context(cadata=_read_ca(self.ca_file).decode("ascii") if self.ca_file else None)
        if self.cert_file and self.key_file:
            _read_pair(self.cert_file, self.key_file)
            context.load_cert_chain(self.cert_file, self.key_file, password=_no_password)
        return context

    def authorization(self, address: str) -> str | None:
        """The header `authorization` for calls to a server; None without a token, or where it may not be sent.

        Raises SettingError.
        """
        bearer = _bearer(address, self)
        return bearer.value() if bearer else None


def worker_tls(environ: Mapping[str, str] | None = None) -> ServerTls | None:
    """The files of a worker's own services; None where it has no certificate. Raises SettingError."""
    variables = os.environ if environ is None else environ
    credentials = ClientCredentials.from_environ(variables)
    client_ca = setting(variables, CLIENT_CA_FILE)
    if credentials.cert_file is None or credentials.key_file is None:
        if client_ca:
            raise SettingError(f"{CLIENT_CA_FILE} asks clients for certificates, which needs {CERT_FILE} as well")
        return None
    return ServerTls(credentials.cert_file, credentials.key_file, Path(client_ca) if client_ca else None)


@dataclass(frozen=True)
class _Details(grpc.ClientCallDetails):
    """A call with other metadata than it was made with."""

    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...] | None
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: Any


class _Bearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the token of a file to every call; reads the file again when it has changed (tokens of pods rotate)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = _Files(path)
        self._token = ""

    def token(self) -> str:
        """Raises SettingError."""
        if not self._files.changed() and self._token:
            return self._token
        text = _read(self._path, f"{TOKEN_FILE}, the token file").strip()
        if not text or len(text) > LONGEST_TOKEN_BYTES or not text.isascii() or any(byte <= 32 for byte in text):
            raise SettingError(f"{TOKEN_FILE}, the token file {self._path}, must have one token in ASCII and no more")
        self._token = text.decode()
        return self._token

    def value(self) -> str:
        """What the header says. Raises SettingError."""
        return f"Bearer {self.token()}"

    def _with_token(self, call: Any) -> _Details:
        metadata = (*(call.metadata or ()), ("authorization", self.value()))
        return _Details(
            call.method,
            call.timeout,
            metadata,
            call.credentials,
            getattr(call, "wait_for_ready", None),
            getattr(call, "compression", None),
        )

    def intercept_unary_unary(self, continuation: Any, call: Any, request: Any) -> Any:
        return continuation(self._with_token(call), request)

    def intercept_unary_stream(self, continuation: Any, call: Any, request: Any) -> Any:
        return continuation(self._with_token(call), request)


def open_channel(
    address: str, options: Options, credentials: ClientCredentials | None = None, *, to_worker: bool = False
) -> grpc.Channel:
    """A channel to `host:port` or `https://host:port`, as `parse_server_address` returns it.

    `https`, and calls `to_worker` where workers have certificates, go over TLS; never over anything else instead.
    The token goes along to servers, not to workers: over TLS, to loopback, or where it was allowed in clear. Without
    `credentials`, they are what the environment says.

    Raises:
        SettingError: the files cannot be used.
    """
    credentials = ClientCredentials.from_environ() if credentials is None else credentials
    scheme, target = split_scheme(address)
    secure = scheme == "https" or (to_worker and credentials.peers_use_tls)
    if secure:
        if to_worker and credentials.peer_name:
            options = [*options, ("grpc.ssl_target_name_override", credentials.peer_name)]
        channel = grpc.secure_channel(target, credentials.channel_credentials(), options=options)
    else:
        channel = grpc.insecure_channel(target, options=options)
    bearer = None if to_worker else _bearer(address, credentials)
    return grpc.intercept_channel(channel, bearer) if bearer else channel


def _bearer(address: str, credentials: ClientCredentials) -> _Bearer | None:
    """The token for a server, where there is one and it may be sent there."""
    if credentials.token_file is None:
        return None
    scheme, target = split_scheme(address)
    if not (scheme == "https" or credentials.token_in_clear or is_loopback(target)):
        _LOG.warning(
            "the token is not sent to %s, for others could read it on its way: write the server's address with "
            "https://, or allow it with %s=1",
            target,
            TOKEN_IN_CLEAR,
        )
        return None
    return _Bearer(credentials.token_file)


@dataclass
class Connection:
    """A channel that is made anew when its certificates change. Thread-safe."""

    address: str
    options: Options
    credentials: ClientCredentials | None = None
    to_worker: bool = False
    _channel: grpc.Channel | None = field(default=None, init=False)
    _previous: grpc.Channel | None = field(default=None, init=False)
    _closed: bool = field(default=False, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _files: _Files | None = field(default=None, init=False)

    def channel(self) -> grpc.Channel:
        """The channel for the next call. Raises SettingError, and ValueError once it is closed."""
        with self._lock:
            if self._closed:
                raise ValueError("the connection is closed")
            if self.credentials is None:
                self.credentials = ClientCredentials.from_environ()
            if self._files is None:
                self._files = _Files(self.credentials.ca_file, self.credentials.cert_file, self.credentials.key_file)
            if self._files.changed() or self._channel is None:
                self._channel = self._replaced(self.credentials)
            return self._channel

    def _replaced(self, credentials: ClientCredentials) -> grpc.Channel:
        """Calls that run go on over the old channel; the one before that has none left by now."""
        try:
            fresh = open_channel(self.address, self.options, credentials, to_worker=self.to_worker)
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
        """Ends the calls that run. Idempotent."""
        with self._lock:
            self._closed = True
            for channel in (self._channel, self._previous):
                if channel is not None:
                    channel.close()
            self._channel = self._previous = None
