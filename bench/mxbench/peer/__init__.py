"""`mx bench peer`: two machines, what the link between them gives, and what the product makes of it."""

from __future__ import annotations

from mxbench.peer.product import TRANSPORTS, Received, received

__all__ = ["TRANSPORTS", "Received", "received"]
