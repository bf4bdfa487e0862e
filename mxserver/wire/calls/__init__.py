"""Calls to a server: channels, credentials, the client of workers, source ids."""

from __future__ import annotations

from mxserver.wire.calls.channels import (
    KEEPALIVE_INTERVAL_MS,
    KEEPALIVE_TIMEOUT_MS,
    NO_ANSWER,
    ServerChannel,
    call_failure,
    channel_options,
    open_channel,
    server_credentials,
)
from mxserver.wire.calls.client import ERROR_CODE_METADATA, Near, OpenWatch, ServerClient, shared_levels
from mxserver.wire.calls.closing import Closing
from mxserver.wire.calls.patience import Patience
from mxserver.wire.calls.source_ids import canonical_json, source_id

__all__ = [
    "ERROR_CODE_METADATA",
    "KEEPALIVE_INTERVAL_MS",
    "KEEPALIVE_TIMEOUT_MS",
    "NO_ANSWER",
    "Closing",
    "Near",
    "OpenWatch",
    "Patience",
    "ServerChannel",
    "ServerClient",
    "call_failure",
    "canonical_json",
    "channel_options",
    "open_channel",
    "server_credentials",
    "shared_levels",
    "source_id",
]
