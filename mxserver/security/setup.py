"""What the settings mean for the gRPC server: interceptors, options, credentials, and the line about what is open."""

from __future__ import annotations

import os
from typing import Any

import grpc

from mxserver.security.access_file import AccessFile
from mxserver.security.interceptors import AccessInterceptor, Authenticator, StreamLimit
from mxserver.security.service_accounts import subjects
from mxserver.security.token_review import ACCOUNT_FOLDER, TokenReviews, api_server
from mxserver.settings import ServerSettings
from mxserver.wire import SettingError
from mxserver.wire.calls import channel_options, server_credentials
from mxserver.wire.credentials import ServerTls, is_loopback

LONGEST_CONNECTION_SECONDS = 3600
MOST_CALLS_A_CONNECTION = 128
UNASKED_BYTES = 64 * 1024


def authenticator(settings: ServerSettings) -> Authenticator | None:
    """What judges tokens; None if nothing does. Raises SettingError."""
    if settings.auth == "off":
        return None
    access = AccessFile(settings.auth_file) if settings.auth_file is not None else None
    if settings.auth == "file":
        if access is None:
            raise SettingError("--auth file needs --auth-file, which says who has which role")
        return access
    return TokenReviews(
        subjects(settings.auth_accounts, access),
        api_server(os.environ),
        audiences=settings.auth_audience,
        account_folder=ACCOUNT_FOLDER,
        good_seconds=settings.auth_cache_seconds,
    )


def interceptors(settings: ServerSettings, judge: Authenticator | None) -> list[grpc.ServerInterceptor]:
    """What stands before calls, the outermost first."""
    found: list[grpc.ServerInterceptor] = []
    if judge is not None or settings.tls_client_ca_file is not None:
        found.append(AccessInterceptor(judge))
    found.append(StreamLimit(settings.limits.streams_per_client))
    return found


def server_options(settings: ServerSettings) -> list[tuple[str, Any]]:
    """Options of the gRPC server."""
    own = {
        "grpc.max_receive_message_length": settings.limits.publish_bytes,
        "grpc.keepalive_time_ms": settings.limits.silence_seconds * 1000,
        # gRPC holds this much of a request that nothing here has begun to receive; by default it guesses how much
        # the connection could bring, which was 110 MiB each of four. What is received comes as fast as it can.
        "grpc.http2.bdp_probe": 0,
        "grpc.http2.lookahead_bytes": UNASKED_BYTES,
        # Connections of hosts that vanished end, and all end some time: for certificates that were revoked, and so that
        # replicas share the load. Running calls go on.
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.max_connection_age_ms": LONGEST_CONNECTION_SECONDS * 1000,
        # More calls at once over one connection wait in the client until others end. gRPC itself turns calls away at
        # random when about a thousand arrived that Python has not looked at, so that one connection must not do that.
        "grpc.max_concurrent_streams": min(settings.limits.calls, MOST_CALLS_A_CONNECTION),
    }
    return list({**dict(channel_options()), **own}.items())


def credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    """None: no TLS. Raises SettingError."""
    return server_credentials(settings.tls) if settings.tls is not None else None


def metrics_tls(settings: ServerSettings) -> ServerTls | None:
    """The files for TLS on the HTTP port; None: it is plain."""
    return settings.tls if settings.metrics_tls == "auto" else None


def warning(settings: ServerSettings) -> str | None:
    """A warning about a server that others can reach; None if it is protected, or listens on loopback only."""
    if is_loopback(settings.host):
        return None
    if settings.auth == "off" and settings.tls_client_ca_file is None:
        return (
            f"NOT PROTECTED: whoever reaches {settings.host} on this port can publish workers and delete models; give "
            "--auth (tokens) or --tls-client-ca (certificates), or let only the fleet's network reach it"
        )
    if settings.auth != "off" and metrics_tls(settings) is None:
        return (
            "tokens are taken over connections that are not encrypted: whoever listens to them can use them; give "
            "--tls-cert and --tls-key (and not --metrics-tls off), or let a proxy or the network encrypt"
        )
    return None
