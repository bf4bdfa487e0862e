"""What a link between two machines gives: sockets, NIXL's one descriptor, ib_write_bw."""

from __future__ import annotations

from mxbench.link.rates import nixl_rate, socket_rate, verbs_rate

__all__ = ["nixl_rate", "socket_rate", "verbs_rate"]
