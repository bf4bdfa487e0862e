"""Calls to a server: channels, credentials, the client of workers, source ids."""

from __future__ import annotations

from mxserver.wire.calls.channels import (
    KEEPALIVE_INTERVAL_MS,
    KEEPALIVE_TIMEOUT_MS,
    MAX_MESSAGE_BYTES,
    NO_ANSWER,
    ServerChannel,
    call_failure,
    channel_options,
    open_channel,
    server_credentials,
)
from mxserver.wire.calls.client import ERROR_CODE_METADATA, ServerClient
from mxserver.wire.calls.closing import Closing
from mxserver.wire.calls.credentials import (
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
from mxserver.wire.calls.patience import Patience
from mxserver.wire.calls.source_ids import canonical_json, source_id
from mxserver.wire.calls.tls_files import ServerTls, server_context

__all__ = [
    "CA_FILE",
    "CERT_FILE",
    "ERROR_CODE_METADATA",
    "KEEPALIVE_INTERVAL_MS",
    "KEEPALIVE_TIMEOUT_MS",
    "KEY_FILE",
    "LONGEST_TOKEN_BYTES",
    "MAX_MESSAGE_BYTES",
    "NO_ANSWER",
    "TOKEN_FILE",
    "TOKEN_IN_CLEAR",
    "ClientCredentials",
    "Closing",
    "Patience",
    "ServerChannel",
    "ServerClient",
    "ServerTls",
    "call_failure",
    "canonical_json",
    "channel_options",
    "is_loopback",
    "open_channel",
    "server_context",
    "server_credentials",
    "source_id",
    "worker_tls",
]
