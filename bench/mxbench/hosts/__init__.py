"""Other machines: an agent on each, reached over ssh or a port, that starts the processes of a bench there."""

from __future__ import annotations

from mxbench.hosts.channel import Channel, over_socket, over_ssh, started_here
from mxbench.hosts.errors import HostError
from mxbench.hosts.host import Child, Host
from mxbench.hosts.listener import DEFAULT_PORT, finish, listen

__all__ = [
    "DEFAULT_PORT",
    "Channel",
    "Child",
    "Host",
    "HostError",
    "finish",
    "listen",
    "over_socket",
    "over_ssh",
    "started_here",
]
