"""What a client trusts and shows: certificates, tokens, and when a token may be sent. Needs no gRPC."""

from __future__ import annotations

from mxserver.wire.credentials.credentials import (
    CA_FILE,
    CERT_FILE,
    KEY_FILE,
    LONGEST_TOKEN_BYTES,
    TOKEN_FILE,
    TOKEN_IN_CLEAR,
    ClientCredentials,
    is_loopback,
    worker_tls,
)
from mxserver.wire.credentials.tls_files import (
    FollowedFiles,
    ServerTls,
    certificate_not_after,
    read_ca,
    read_pair,
    server_context,
)

__all__ = [
    "CA_FILE",
    "CERT_FILE",
    "KEY_FILE",
    "LONGEST_TOKEN_BYTES",
    "TOKEN_FILE",
    "TOKEN_IN_CLEAR",
    "ClientCredentials",
    "FollowedFiles",
    "ServerTls",
    "certificate_not_after",
    "is_loopback",
    "read_ca",
    "read_pair",
    "server_context",
    "worker_tls",
]
