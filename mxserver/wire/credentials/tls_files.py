"""TLS files: certificates, keys and CAs, checked when they are read, and followed when they are replaced."""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
from pathlib import Path
from typing import NamedTuple

from mxserver.wire.errors import SettingError

_LOG = logging.getLogger(__name__)


class FollowedFiles:
    """Files that are read again when they have changed. Thread-safe."""

    def __init__(self, *paths: Path | None) -> None:
        self._paths = tuple(path for path in paths if path is not None)
        self._seen: tuple[object, ...] | None = None
        self._lock = threading.Lock()

    def changed(self) -> bool:
        """Whether any file was replaced since the last call. The first call says True."""
        seen = tuple(_stamp(path) for path in self._paths)
        with self._lock:
            changed, self._seen = seen != self._seen, seen
        return changed


def _stamp(path: Path) -> object:
    with contextlib.suppress(OSError):
        status = path.stat()  # follows links: Kubernetes replaces the link, not the file
        return status.st_mtime_ns, status.st_ino, status.st_size
    return None


def read_file(path: Path, what: str) -> bytes:
    """The file's bytes. Raises SettingError, which calls the file `what`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingError(f"{what} {path} cannot be read ({error.strerror}); give a file that can") from error


def load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Loads a certificate chain and its key. Raises SettingError for files that cannot be used together."""
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise SettingError(
            f"certificate {cert} and key {key} cannot be used ({reason}); give a PEM chain and its key, not encrypted"
        ) from error


def read_pair(cert: Path, key: Path) -> tuple[bytes, bytes]:
    """Key and chain, PEM. Raises SettingError when they cannot be read, or do not belong together."""
    load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert, key)
    return read_file(key, "the key"), read_file(cert, "the certificate")


def certificate_not_after(path: Path) -> float | None:
    """Unix time at which the first certificate of a PEM file expires; None where it cannot be read."""
    try:
        # Python offers the fields of peers' certificates alone, and of a file's only this (tests/security/test_tls.py).
        fields = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined]
        return float(ssl.cert_time_to_seconds(fields["notAfter"]))
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def read_ca(path: Path) -> bytes:
    """The CA's certificates, PEM. Raises SettingError when they cannot be used."""
    text = read_file(path, "the CA file")
    try:
        ssl.create_default_context(cadata=text.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise SettingError(f"CA file {path} cannot be used ({error}); give PEM certificates") from error
    return text


class ServerTls(NamedTuple):
    """The files of a server: its certificate, its key, and the CA of the clients that it accepts (None: any client)."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None


def server_context(tls: ServerTls, *, ask_clients: bool = False) -> ssl.SSLContext:
    """For servers other than gRPC's; follows its files. Raises SettingError.

    `ask_clients`: only clients with a certificate of `tls.client_ca_file` are accepted, where there is one; else any.
    """
    client_ca = tls.client_ca_file if ask_clients else None
    files = FollowedFiles(tls.cert_file, tls.key_file, client_ca)
    files.changed()

    def fresh() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        load_pair(context, tls.cert_file, tls.key_file)
        if client_ca is not None:
            context.load_verify_locations(cadata=read_ca(client_ca).decode("ascii"))
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    current = fresh()

    def follow(connection: ssl.SSLSocket | ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        """Called at the start of each handshake."""
        nonlocal current
        if files.changed():
            try:
                current = fresh()
            except SettingError as error:
                _LOG.error("the old certificate stays in use reason=%s", error)
        connection.context = current

    outer = fresh()
    outer.sni_callback = follow
    return outer
