"""Object stores, for the worker and the server alike: what is there, and why something cannot be had."""

from __future__ import annotations

from mxserver.wire.stores.causes import Kind, cause_of
from mxserver.wire.stores.listing import listed_objects

__all__ = ["Kind", "cause_of", "listed_objects"]
