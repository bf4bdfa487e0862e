"""Connections as workers on hosts of their own have them: one for each client of a process."""

from __future__ import annotations

from mxserver.wire.calls import channels

__all__ = ["own_connections"]


def own_connections() -> None:
    """From now on each channel of this process connects by itself; else those to one address share a connection."""
    options = channels.channel_options
    channels.channel_options = lambda: [*options(), ("grpc.use_local_subchannel_pool", 1)]
