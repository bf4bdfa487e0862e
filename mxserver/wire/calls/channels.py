"""How all our gRPC clients and servers are set up."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 100 * 1024 * 1024  # the protocol's limit, each way; gRPC's own for receiving is 4 MiB

KEEPALIVE_INTERVAL_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000


def channel_options() -> list[tuple[str, int]]:
    """Options for channels and servers alike: each side leaves aside what concerns the other."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # A peer whose host vanished is noticed while a call runs. Nothing is pinged while idle: servers that do not
        # know us would answer that with GOAWAY.
        ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 0),
        # Server: pings of clients that do ping more eagerly are no offence.
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIMEOUT_MS),
        # Server: a port in use is an error, not shared in silence with another process.
        ("grpc.so_reuseport", 0),
        # Client: after an outage of the server, back within seconds (gRPC's own limit is two minutes).
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # Client: peers are in the same cluster; a proxy for the way out does not know them.
        ("grpc.enable_http_proxy", 0),
    ]
