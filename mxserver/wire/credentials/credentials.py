"""What a client trusts and shows: CA, certificate and token, and when the token may be sent.

All files are read again when they have changed, without a restart (`channels` and `tls_files` see to it).
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mxserver.wire.address import split_scheme
from mxserver.wire.credentials.tls_files import ServerTls, load_pair, read_ca, read_file
from mxserver.wire.environment import setting, unprotected
from mxserver.wire.errors import SettingError

CA_FILE, CERT_FILE, KEY_FILE = "MX_TLS_CA_FILE", "MX_TLS_CERT_FILE", "MX_TLS_KEY_FILE"
CLIENT_CA_FILE, PEER_NAME = "MX_TLS_CLIENT_CA_FILE", "MX_TLS_PEER_NAME"
TOKEN_FILE, TOKEN_IN_CLEAR = "MX_AUTH_TOKEN_PATH", "MX_AUTH_TOKEN_IN_CLEAR"

WORKER_NAMES = (CA_FILE, CERT_FILE, KEY_FILE, CLIENT_CA_FILE, PEER_NAME, TOKEN_FILE, TOKEN_IN_CLEAR)
"""All environment names that a worker, or any client, reads here."""

PROJECTED_TOKEN = Path("/var/run/secrets/tokens/modelexpress")
"""Where manifests for NVIDIA's clients project a pod's token, which these take without being told."""

LONGEST_TOKEN_BYTES = 16 * 1024
_LOOPBACK_NAMES = ("localhost", "ip6-localhost", "ip6-loopback")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


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


@dataclass(frozen=True)
class ClientCredentials:
    """What a client trusts and shows. It holds names of files, nothing secret."""

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

    def ssl_context(self) -> ssl.SSLContext:
        """For clients other than gRPC's. Raises SettingError for files that cannot be used."""
        context = ssl.create_default_context(cadata=read_ca(self.ca_file).decode("ascii") if self.ca_file else None)
        if self.cert_file and self.key_file:
            load_pair(context, self.cert_file, self.key_file)
        return context

    def may_send_token(self, address: str) -> bool:
        """Whether the token may go to this server: over TLS, to loopback, or where it was allowed in clear."""
        scheme, target = split_scheme(address)
        return scheme == "https" or self.token_in_clear or is_loopback(target)

    def authorization(self, address: str) -> str | None:
        """The header `authorization` for a call to a server; None without a token, or where it may not be sent.

        The file is read at each call, because tokens of pods rotate. Raises SettingError for a file that cannot be
        used.
        """
        if self.token_file is None or not self.may_send_token(address):
            return None
        text = read_file(self.token_file, f"{TOKEN_FILE}, the token file").strip()
        if not text or len(text) > LONGEST_TOKEN_BYTES or not text.isascii() or any(byte <= 32 for byte in text):
            raise SettingError(
                f"{TOKEN_FILE}, the token file {self.token_file}, must have one token in ASCII and no more"
            )
        return f"Bearer {text.decode()}"


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
